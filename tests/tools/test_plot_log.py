import json

import numpy as np
import pytest
from mmengine.visualization import LocalVisBackend
from PIL import Image


def write(folder, *entries):
    """Log scalars as mmengine does: (iteration, values) in training, (step, values) in validation."""
    backend = LocalVisBackend(str(folder / 'vis_data'))
    for step, values in entries:
        backend.add_scalars(dict(values), step=step, file_path='20260101.json')
    return folder


def train(iteration, **values):
    return iteration, {'lr': 0.1, 'base_lr': 0.1, 'time': 0.5, **values, 'epoch': 1, 'iter': iteration}


@pytest.fixture
def run(tmp_path):
    """A work_dir, interrupted after iteration 6 and resumed after 4."""
    work = tmp_path / 'work'
    write(
        work / '1',
        train(2, loss=3.0, memory=10),
        train(4, loss=2.0),
        (1, {'mIoU': 0.5, 'time': 9.0}),
        train(6, loss=9.0),
    )
    write(work / '2', train(6, loss=1.5, memory=30), train(8, loss=float('nan')), (2, {'mIoU': 0.75, 'val_loss': 2}))
    write(work / '2', train(10, loss=1.75), (3, {'mIoU': 0.625, 'val_loss': 3}))
    return work


def test_resumed_runs_are_one_curve_and_metrics_stand_at_iterations(tool, run):
    problems = []
    curves = tool('plot_log').curves(tool('plot_log').records(run, problems))
    assert not problems
    np.testing.assert_array_equal(curves['loss'].iterations, [2, 4, 6, 8, 10])
    np.testing.assert_array_equal(curves['loss'].values, [3, 2, 1.5, np.nan, 1.75])
    np.testing.assert_array_equal(curves['mIoU'].iterations, [4, 8, 10])  # and not the epochs 1, 2, 3
    np.testing.assert_array_equal(curves['mIoU'].values, [0.5, 0.75, 0.625])
    assert curves['mIoU'].metric and not curves['loss'].metric
    assert curves['time'].values.tolist() == [0.5] * 5, 'the time of validation is no time per iteration'


def test_metrics_of_training_by_iterations_stand_where_they_were_measured(tool, tmp_path):
    write(tmp_path / '1', train(50, loss=1.0), (70, {'mIoU': 0.5}), train(100, loss=1.0), (140, {'mIoU': 0.6}))
    curves = tool('plot_log').curves(tool('plot_log').records(tmp_path, []))
    assert curves['mIoU'].iterations.tolist() == [70, 140]


@pytest.mark.parametrize('count', [1, 2, 3, 8, 50])
def test_smoothing_is_a_moving_average(tool, count):
    values = np.random.default_rng(0).normal(size=20)
    values[[3, 4, 11]] = np.nan, np.inf, np.nan
    known = np.where(np.isfinite(values), values, np.nan)
    size = min(count, 20)
    expected = []
    for i in range(20):  # for even counts one more of what comes before
        around = known[max(i - size // 2, 0) : i + (size - 1) // 2 + 1]
        expected.append(np.nanmean(around) if np.isfinite(around).any() else np.nan)
    np.testing.assert_allclose(tool('plot_log').smoothed(values, count), expected)


def test_what_is_drawn_unless_keys_are_given(tool):
    module = tool('plot_log')
    point = np.array([1.0])
    names = ['lr', 'grad_norm', 'loss', 'loss_cls', 'time', 'data_time', 'memory', 'base_lr']
    run = {name: module.Curve(point, point, False) for name in names}
    run |= {name: module.Curve(point, point, True) for name in ('coco/bbox_mAP', 'coco/bbox_mAP_50', 'coco/bbox_mAP_s')}
    assert module.choose({'a': run}, None) == ['loss', 'lr', 'coco/bbox_mAP', 'loss_cls']
    assert module.choose({'a': run}, ['*_50', 'loss*', 'loss']) == ['coco/bbox_mAP_50', 'loss', 'loss_cls']
    many = {f'd{i}.loss_cls': run['loss'] for i in range(30)}
    chosen = module.choose({'a': many | run}, None)
    assert len(chosen) == module.MOST and chosen[:3] == ['loss', 'lr', 'coco/bbox_mAP']
    with pytest.raises(module.cli.InputError, match='no losses, lr or metrics are logged; .* from: time'):
        module.choose({'a': {'time': run['time']}}, None)


def call(tool, monkeypatch, *arguments):
    module = tool('plot_log')
    monkeypatch.setattr('sys.argv', ['plot_log', *map(str, arguments)])
    monkeypatch.setenv('COLUMNS', '120')
    return module.cli.run(module.main, module.parse_args())


def test_picture_and_table(tool, run, tmp_path, monkeypatch, capsys):
    write(tmp_path / 'other/1', train(5, loss=1.0), (5, {'mIoU': 0.25}))
    out = tmp_path / 'pictures/curves.png'
    assert call(tool, monkeypatch, run, tmp_path / 'other', '--out', out, '--smooth', 3) == 0
    with Image.open(out) as picture:
        assert min(picture.size) > 300 and len(np.unique(np.asarray(picture.convert('L')))) > 20
    rows = [line.split() for line in capsys.readouterr().out.splitlines()]
    assert (
        ['loss', '1.75', '10', '1.5', '6'] in rows
        and ['val_loss', '3', '10', '2', '8'] in rows
        and ['mIoU', '0.625', '10', '0.75', '8'] in rows
    )
    text = ' '.join(word for row in rows for word in row)
    assert '10 iterations, 0.500 s per iteration, 30 MiB' in text and '5 iterations, 0.500 s per iteration' in text


def test_lines_and_runs_that_cannot_be_read_are_named(tool, run, tmp_path, monkeypatch, capsys):
    log = run / '2/vis_data/scalars.json'
    lines = log.read_text().splitlines()
    log.write_text('\n'.join([*lines[:1], '{"loss": 1.0, "it', '[1, 2]', '{"loss": 2.0}', *lines[1:]]))
    (tmp_path / 'empty').mkdir()
    (tmp_path / 'new/1/vis_data').mkdir(parents=True)
    (tmp_path / 'new/1/vis_data/scalars.json').touch()
    arguments = [run, tmp_path / 'empty', tmp_path / 'new', tmp_path / 'none', '--out', tmp_path / 'curves.svg']
    with pytest.raises(SystemExit) as stop:
        call(tool, monkeypatch, *arguments)
    assert stop.value.code == 1 and (tmp_path / 'curves.svg').is_file()
    errors = capsys.readouterr().err
    for name in (
        f'{log}: line 2, \'{{"loss": 1.0, "it\' (and 2 more): not a record',
        'empty: no */vis_data',
        'new: no values',
        'none: does',
    ):
        assert name in errors
    assert errors.count('skipped') == 4


def test_bad_input_is_named(refuse, run):
    assert 'nothing to draw' in refuse('plot_log', 'nowhere', '--out', 'curves.png')
    assert 'name the picture *.png' in refuse('plot_log', run, '--out', 'curves.jpg')
    assert '--keys acc match nothing; there are: lr, base_lr, time, loss, memory, mIoU, val_loss' in refuse(
        'plot_log', run, '--keys', 'loss', 'acc', '--out', 'curves.png'
    )
    assert 'cannot be written' in refuse('plot_log', run, '--out', 'work/1/vis_data/scalars.json/curves.png')
    assert '--smooth 0: at least 1' in refuse('plot_log', run, '--smooth', '0', '--out', 'curves.png')


def test_a_file_alone_is_a_run(tool, run):
    path = run / '1/vis_data/scalars.json'
    assert [r['loss'] for r in tool('plot_log').records(path, []) if 'loss' in r] == [3.0, 2.0, 9.0]
    assert json.loads(path.read_text().splitlines()[0])['step'] == 2
