"""Curves from logs as mmengine writes them."""

from contextlib import contextmanager

import numpy as np
import pytest
from support.run_logs import interrupted_run, train, write

from swin_mm.analysis import curves
from swin_mm.analysis.figures import figure
from swin_mm.utils.errors import InputError


@pytest.fixture
def run(tmp_path):
    return interrupted_run(tmp_path)


def test_resumed_runs_are_joined_and_metrics_are_placed_at_iterations(run):
    records, problems = curves.read_records(run)
    assert not problems
    found = curves.to_curves(records)
    np.testing.assert_array_equal(found['loss'].iterations, [2, 4, 6, 8, 10])
    np.testing.assert_array_equal(found['loss'].values, [3, 2, 1.5, np.nan, 1.75])
    np.testing.assert_array_equal(found['mIoU'].iterations, [4, 8, 10])  # and not the epochs 1, 2, 3
    np.testing.assert_array_equal(found['mIoU'].values, [0.5, 0.75, 0.625])
    assert found['mIoU'].is_metric and not found['loss'].is_metric
    assert found['time'].values.tolist() == [0.5] * 5, 'the time of validation is not the time of an iteration'


def test_metrics_of_iteration_based_training_keep_their_iteration(tmp_path):
    write(tmp_path / '1', train(50, loss=1.0), (70, {'mIoU': 0.5}), train(100, loss=1.0), (140, {'mIoU': 0.6}))
    found = curves.to_curves(curves.read_records(tmp_path)[0])
    assert found['mIoU'].iterations.tolist() == [70, 140]


@pytest.mark.parametrize('count', [1, 2, 3, 8, 50])
def test_smoothing_is_a_moving_average(count):
    values = np.random.default_rng(0).normal(size=20)
    values[[3, 4, 11]] = np.nan, np.inf, np.nan
    known = np.where(np.isfinite(values), values, np.nan)
    size = min(count, 20)
    expected = []
    for i in range(20):  # for even counts one more of what comes before
        around = known[max(i - size // 2, 0) : i + (size - 1) // 2 + 1]
        expected.append(np.nanmean(around) if np.isfinite(around).any() else np.nan)
    np.testing.assert_allclose(curves.moving_average(values, count), expected)


def test_default_keys():
    point = np.array([1.0])
    names = ['lr', 'grad_norm', 'loss', 'loss_cls', 'time', 'data_time', 'memory', 'base_lr']
    run = {name: curves.Curve(point, point, False) for name in names}
    run |= {name: curves.Curve(point, point, True) for name in ('coco/bbox_mAP', 'coco/bbox_mAP_50', 'coco/bbox_mAP_s')}
    assert curves.choose_keys({'a': run}, None) == ['loss', 'lr', 'coco/bbox_mAP', 'loss_cls']
    assert curves.choose_keys({'a': run}, ['*_50', 'loss*', 'loss']) == ['coco/bbox_mAP_50', 'loss', 'loss_cls']
    many = {f'd{i}.loss_cls': run['loss'] for i in range(30)}
    assert curves.choose_keys({'a': many | run}, None)[:3] == ['loss', 'lr', 'coco/bbox_mAP']
    with pytest.raises(InputError, match='no losses, lr or metrics are logged; .* from: time'):
        curves.choose_keys({'a': {'time': run['time']}}, None)


def test_a_single_file_is_a_run(run):
    records, _ = curves.read_records(run / '1/vis_data/scalars.json')
    assert [r['loss'] for r in records if 'loss' in r] == [3.0, 2.0, 9.0]


def test_last_and_best_values():
    steps = np.array([1.0, 2.0, 3.0])
    run = {
        'loss': curves.Curve(steps, np.array([2.0, -np.inf, 3.0]), False),
        'mIoU': curves.Curve(steps, np.array([0.5, np.nan, 0.25]), True),
        'lr': curves.Curve(steps, steps, False),
        'memory': curves.Curve(steps, steps, False),
    }
    assert curves.extremes(run) == {'loss': (3, 3, 2, 1), 'mIoU': (0.25, 3, 0.5, 1), 'lr': (3, 3, None, None)}


@pytest.fixture
def drawn(monkeypatch):
    """Figures that have been drawn."""
    kept = []

    @contextmanager
    def keep(path, width, height):
        with figure(path, width, height) as made:
            yield made
        kept.append(made)

    monkeypatch.setattr(curves, 'figure', keep)
    return kept


def test_names_that_look_like_formulas_are_drawn_as_they_are(drawn, tmp_path):
    curve = curves.Curve(np.array([1.0, 2.0]), np.array([1.0, 2.0]), False)
    curves.draw(tmp_path / 'a.png', {'$run_{$': {'$x_{$': curve}, 'b': {'$x_{$': curve}}, ['$x_{$'])
    assert drawn[0].axes[0].get_title() == '$x_{$'


@pytest.mark.parametrize('values, limits', [([0.3], (0, 0.375)), ([-2.0, -2.0], (-2.5, 0)), ([0.1, 0.1], (0, 0.125))])
def test_the_axis_of_equal_values_starts_at_zero(drawn, tmp_path, values, limits):
    curve = curves.Curve(np.arange(1.0, len(values) + 1), np.array(values), True)
    loss = curves.Curve(np.array([1.0, 100.0]), np.array([3.0, 2.0]), False)
    curves.draw(tmp_path / 'a.png', {'run': {'loss': loss, 'mIoU': curve}}, ['loss', 'mIoU'])
    loss_axes, metric_axes = drawn[0].axes
    assert metric_axes.get_ylim() == pytest.approx(limits) and loss_axes.get_ylim()[0] > 1
    assert metric_axes.get_xlim() == loss_axes.get_xlim()
    assert [text.get_text() for text in metric_axes.texts] == [f'{values[-1]:.4g}']
