"""Curves of training from mmengine's scalar logs: losses, learning rate and metrics over iterations."""

import json
import math
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter

from swin_mm.analysis.figures import figure
from swin_mm.utils.errors import InputError

POSITION_KEYS = ('at', 'epoch', 'iter', 'step')  # where a record stands in the run
COST_KEYS = ('time', 'data_time', 'memory')
DETAIL_SUFFIXES = ('_50', '_75', '_s', '_m', '_l')  # COCO's finer metrics: drawn when asked for
MAX_PANELS = 12  # unless more are asked for


class Curve(NamedTuple):
    """A value over iterations.

    Args:
        iterations: (n,), ascending.
        values: (n,), possibly with NaN.
        is_metric: whether it was measured in validation, where more is better, or in training.
    """

    iterations: np.ndarray
    values: np.ndarray
    is_metric: bool


class Extreme(NamedTuple):
    """Last and best value of a curve; best is None for values that are neither losses nor metrics."""

    last: float
    last_at: int
    best: float | None = None
    best_at: int | None = None


class LogError(Exception):
    """Raised if a run has nothing to draw; the message says why."""


def read_runs(paths: list[Path]) -> tuple[dict[str, dict[str, Curve]], list[str]]:
    """Read the curves of several runs.

    Args:
        paths: work_dirs, or files of scalars.

    Returns:
        The curves of each run by key, and one line about each run or line that cannot be read.
    """
    runs: dict[str, dict[str, Curve]] = {}
    problems: list[str] = []
    for path in paths:
        try:
            records, bad = read_records(path)
            problems += bad
            runs[str(path)] = to_curves(records)
        except LogError as error:
            problems.append(f'{path}: {error}')
    return runs, problems


def find_logs(run: Path) -> list[Path]:
    """The scalar logs of a run, one for each time that it was started, in order.

    Raises:
        LogError: there are none.
    """
    if run.is_file():
        return [run]
    if not run.exists():
        raise LogError('does not exist; give a work_dir or a *.json file')
    folders = sorted({path.parent for path in [*run.glob('*/vis_data/*.json'), *run.glob('vis_data/*.json')]})
    if not folders:
        raise LogError('no */vis_data/*.json in it; training writes them, if the config has a LocalVisBackend')
    # mmengine writes the same values into two files.
    return [next(iter(sorted(f.glob('scalars.json')) or sorted(f.glob('*.json')))) for f in folders]


def read_records(run: Path) -> tuple[list[dict], list[str]]:
    """Read the records of a run, each with its iteration as ``at``, and one line per file that is partly unreadable.

    A resumed run repeats iterations that were logged after its last checkpoint: the later record counts.

    Raises:
        LogError: nothing is logged.
    """
    joined: list[dict] = []
    problems: list[str] = []
    for path in find_logs(run):
        found, bad, last = [], [], 0
        try:
            lines = path.read_text(errors='replace').splitlines()
        except OSError as error:
            raise LogError(f'{path} cannot be read: {error.strerror or error}') from error
        for number, line in enumerate(lines, start=1):
            try:
                record = json.loads(line)
                step = record['step']
                if not math.isfinite(step):
                    raise ValueError
            except (ValueError, TypeError, KeyError, OverflowError):
                if line.strip():
                    bad.append(f'line {number}, {line[:60]!r}')
                continue
            # In validation the step may be an epoch.
            last = step if 'iter' in record else max(step, last)
            found.append(record | {'at': last})
        if bad:
            more = f' (and {len(bad) - 1} more)' if len(bad) > 1 else ''
            problems.append(f'{path}: {bad[0]}{more}: not a record of scalars with a step')
        begin = min((r['at'] for r in found if 'iter' in r), default=math.inf)
        joined = [r for r in joined if r['at'] < begin] + found
    if not joined:
        raise LogError('; '.join(['no values are logged in it yet', *problems]))
    return joined, problems


def to_curves(records: list[dict]) -> dict[str, Curve]:
    """Every number in the records as a curve; where training and validation log the same key, training's."""
    points: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    for record in records:
        for key, value in record.items():
            if isinstance(value, int | float):
                points.setdefault((key, 'iter' not in record), []).append((record['at'], value))
    curves: dict[str, Curve] = {}
    for (key, is_metric), pairs in sorted(points.items(), key=lambda item: item[0][1]):
        if key not in POSITION_KEYS and not (is_metric and key in COST_KEYS):
            iterations, values = np.array(pairs, float).T
            curves.setdefault(key, Curve(iterations, values, is_metric))
    return curves


def choose_keys(runs: dict[str, dict[str, Curve]], patterns: list[str] | None) -> list[str]:
    """The keys to draw: those that match the patterns, or all losses, the learning rate and the metrics.

    Raises:
        InputError: a pattern matches nothing, or without patterns there is nothing to draw.
    """
    is_metric = {key: curve.is_metric for run in runs.values() for key, curve in run.items()}
    if patterns:
        matches = {pattern: [key for key in is_metric if fnmatch(key, pattern)] for pattern in patterns}
        if unmatched := [pattern for pattern, keys in matches.items() if not keys]:
            raise InputError(f'--keys {" ".join(unmatched)} match nothing; there are: {", ".join(is_metric)}')
        return list(dict.fromkeys(key for keys in matches.values() for key in keys))
    keys: list[str] = [key for key in ('loss', 'lr') if key in is_metric]
    keys += [key for key in is_metric if is_metric[key] and not key.endswith(DETAIL_SUFFIXES)]
    keys += [key for key in is_metric if not is_metric[key] and 'loss' in key and key != 'loss']
    if not keys:
        raise InputError(f'no losses, lr or metrics are logged; choose with --keys from: {", ".join(is_metric)}')
    return keys


def moving_average(values: np.ndarray, count: int) -> np.ndarray:
    """Centred moving average over ``count`` values, fewer at the ends; values that are not finite are ignored."""
    known = np.isfinite(values)
    kernel = np.ones(min(count, len(values)))
    total = np.convolve(np.where(known, values, 0), kernel, 'same')
    number = np.convolve(known, kernel, 'same')
    return np.divide(total, number, out=np.full(len(values), np.nan), where=number > 0.5)


def draw(path: Path, runs: dict[str, dict[str, Curve]], keys: list[str], smooth: int | None = None) -> None:
    """Draw a panel for each key with a line for each run.

    Training values are smoothed by a moving average; the raw curve stays visible behind it.

    Args:
        path: the picture to write.
        runs: curves by run and key.
        keys: what to draw.
        smooth: number of logged values to average; None for a 25th of all.

    Raises:
        InputError: the picture cannot be written.
    """
    columns = min(len(keys), 3 if len(keys) <= 9 else 4)
    rows = math.ceil(len(keys) / columns)
    with figure(path, max(3.6 * columns, 6), 2.4 * rows + 0.6) as drawn:
        panels = drawn.subplots(rows, columns, sharex=True, squeeze=False).ravel()
        for axes, key in zip(panels, keys, strict=False):
            axes.set_title(key)
            axes.grid(alpha=0.3)
            axes.tick_params(labelbottom=True)
            axes.ticklabel_format(axis='y', scilimits=(-3, 4))
            axes.xaxis.set_major_formatter(EngFormatter(sep=''))
            curves = {f'C{index}': run[key] for index, run in enumerate(runs.values()) if key in run}
            for colour, curve in curves.items():
                exact = curve.is_metric or key == 'lr'
                _draw_curve(axes, curve, colour, 1 if exact else smooth or len(curve.values) // 25)
            _widen_limits_of_constants(axes, list(curves.values()))
        for axes in panels[len(keys) :]:
            axes.remove()
        drawn.supxlabel('iteration', fontsize=9)
        if len(runs) == 1:
            drawn.suptitle(next(iter(runs)), fontsize='medium')
        else:
            handles = [Line2D([], [], color=f'C{index}') for index in range(len(runs))]
            drawn.legend(handles, runs, loc='outside upper center')


def _draw_curve(axes: Axes, curve: Curve, colour: str, count: int) -> None:
    """Draw validation values as points, and training values as a line, with the raw values behind a smoothed one."""
    if count <= 1:
        axes.plot(curve.iterations, curve.values, color=colour, marker='o' if curve.is_metric else None, ms=3)
    else:
        axes.plot(curve.iterations, curve.values, color=colour, alpha=0.25, lw=0.8)
        axes.plot(curve.iterations, moving_average(curve.values, count), color=colour)


def _widen_limits_of_constants(axes: Axes, curves: list[Curve]) -> None:
    """Start the y axis at zero where all values are equal: matplotlib would zoom in on differences of rounding."""
    values = np.concatenate([curve.values for curve in curves])
    values = values[np.isfinite(values)]
    if len(values) and np.allclose(values, values[0], rtol=1e-6, atol=0) and values[0] != 0:
        axes.set_ylim(*sorted((0, 1.25 * values[0])))
        last = curves[-1].iterations[-1], values[-1]
        axes.annotate(f'{values[-1]:.4g}', last, (0, 4), textcoords='offset points', ha='center')


def headline(name: str, run: dict[str, Curve]) -> str:
    """One line about a run: its iterations, time and memory."""
    words = [name, f'{max(curve.iterations[-1] for curve in run.values()):.0f} iterations']
    if 'time' in run:
        words.append(f'{np.nanmean(run["time"].values):.3f} s per iteration')
    if 'memory' in run:
        words.append(f'{np.nanmax(run["memory"].values):,.0f} MiB of GPU memory')
    return ', '.join(words)


def extremes(run: dict[str, Curve]) -> dict[str, Extreme]:
    """Last and best values of a run by key: the smallest of a loss, the largest of a metric."""
    found = {}
    for key, (iterations, values, is_metric) in run.items():
        if key in (*COST_KEYS, 'base_lr'):
            continue
        found[key] = Extreme(values[-1], int(iterations[-1]))
        if (is_metric or 'loss' in key) and np.isfinite(values).any():
            finite = np.where(np.isfinite(values), values, np.nan)
            best = int(np.nanargmin(finite) if 'loss' in key else np.nanargmax(finite))
            found[key] = found[key]._replace(best=values[best], best_at=int(iterations[best]))
    return found
