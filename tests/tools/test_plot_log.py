"""tools/plot_log.py: its picture, table and errors."""

import numpy as np
import pytest
from PIL import Image
from support.run_logs import interrupted_run, train, write

from swin_mm import cli


@pytest.fixture
def run(tmp_path):
    return interrupted_run(tmp_path)


def call(tool, monkeypatch, *arguments):
    module = tool('plot_log')
    monkeypatch.setattr('sys.argv', ['plot_log', *map(str, arguments)])
    monkeypatch.setenv('COLUMNS', '120')
    return cli.run(module.main, module.parse_args())


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


def test_unreadable_lines_and_runs_are_named(tool, run, tmp_path, monkeypatch, capsys):
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
    assert '--smooth 0: expected at least 1' in refuse('plot_log', run, '--smooth', '0', '--out', 'curves.png')


def test_markup_and_formulas_in_names(tool, tmp_path, monkeypatch, capsys):
    folder = tmp_path / '[bold]run$_{'
    write(folder / '1', train(5, **{'[/b]loss': 1.0, '$x_{$loss': 2.0}))
    assert call(tool, monkeypatch, folder, '--out', tmp_path / 'curves.svg') == 0
    printed = capsys.readouterr().out
    assert '[/b]loss' in printed and '$x_{$loss' in printed and f'{folder}, 5 iterations' in printed


def test_more_keys_than_panels(tool, tmp_path, monkeypatch, capsys):
    write(tmp_path / '1', train(5, **{f'd{i}.loss': 1.0 for i in range(20)}))
    assert call(tool, monkeypatch, tmp_path, '--out', tmp_path / 'curves.svg') == 0
    assert 'drawing 12 of 21 keys; --keys draws others: d11.loss' in capsys.readouterr().out
