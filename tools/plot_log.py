"""Curves of training: losses, learning rate and metrics over iterations, and a table of their last and best values.

  python tools/plot_log.py work_dirs/mask-rcnn_swin-t work_dirs/mask-rcnn_swin-s --out curves.png
  python tools/plot_log.py work_dirs/upernet --keys loss '*acc*' mIoU --smooth 50 --out curves.svg

RUN is a work_dir, whose resumed runs are joined into one curve, or a *.json file of scalars that mmengine has written.
Training values are smoothed (moving average); the raw curve stays visible behind. What cannot be read is named and
skipped, and the exit code is 1.
"""

import json
import math
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from fnmatch import fnmatch
from pathlib import Path
from typing import NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.lines import Line2D
from matplotlib.ticker import EngFormatter
from rich import box
from rich.console import Console
from rich.table import Table

from swin_mm import cli
from swin_mm.analysis.figures import figure
from swin_mm.utils.errors import InputError

FORMATS = ('.png', '.svg', '.pdf')
PLACES = ('at', 'epoch', 'iter', 'step')  # of a record in the run
COSTS = ('time', 'data_time', 'memory')
DETAILS = ('_50', '_75', '_s', '_m', '_l')  # COCO's finer metrics: drawn when asked for
MOST = 12  # panels, unless more are asked for


def parse_args() -> Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN', help='work_dir or *.json file')
    parser.add_argument('--out', type=Path, required=True, metavar='FILE', help=f'picture: {", ".join(FORMATS)}')
    parser.add_argument(
        '--keys', nargs='+', metavar='KEY', help='what to draw; * matches anything (default: losses, lr, metrics)'
    )
    parser.add_argument('--smooth', type=int, metavar='N', help='logged values to average (default: every 25th part)')
    parser.add_argument('--debug', action='store_true', help='show where an error arose')
    return parser.parse_args()


class Curve(NamedTuple):
    """A value over iterations.

    Args:
        iterations: (n,), ascending.
        values: (n,), perhaps with NaN.
        metric: whether it was measured in validation, so that more is better, or in training.
    """

    iterations: np.ndarray
    values: np.ndarray
    metric: bool


class LogError(Exception):
    """There is nothing to draw in a run; the message says why."""


def main(args: Namespace) -> None:
    """Draw the curves, print the table."""
    if args.out.suffix.lower() not in FORMATS:
        raise InputError(f'--out {args.out}: name the picture *{", *".join(FORMATS)}')
    if args.smooth is not None and args.smooth < 1:
        raise InputError(f'--smooth {args.smooth}: at least 1 is needed, which leaves the curves as they are')
    runs, problems = {}, []
    for path in args.runs:
        try:
            runs[str(path)] = curves(records(path, problems))
        except LogError as error:
            problems.append(f'{path}: {error}')
    for problem in problems:
        print(f'skipped {problem}', file=sys.stderr)
    if not runs:
        raise InputError('there is nothing to draw in any of the runs, for the reasons named above')
    keys = choose(runs, args.keys)
    draw(args.out, runs, keys, args.smooth)
    console = Console()
    for name, run in runs.items():
        console.print(headline(name, run), markup=False, highlight=False, soft_wrap=True)
        console.print(summary(run))
    console.print(f'{args.out}', markup=False, highlight=False, soft_wrap=True)
    if problems:
        sys.exit(1)


def find(run: Path) -> list[Path]:
    """The scalar logs of a run, one per time that it was started, in order."""
    if run.is_file():
        return [run]
    if not run.exists():
        raise LogError('does not exist; give a work_dir or a *.json file')
    folders = sorted({path.parent for path in [*run.glob('*/vis_data/*.json'), *run.glob('vis_data/*.json')]})
    if not folders:
        raise LogError('no */vis_data/*.json in it; training writes them, if the config has a LocalVisBackend')
    # mmengine writes the same into two files.
    return [next(iter(sorted(f.glob('scalars.json')) or sorted(f.glob('*.json')))) for f in folders]


def records(run: Path, problems: list[str]) -> list[dict]:
    """What a run has logged, each with the iteration ``at``; lines that do not read go to ``problems``.

    A resumed run repeats iterations that an earlier one logged after its last checkpoint: the later one counts.

    Raises:
        LogError: nothing is there.
    """
    joined: list[dict] = []
    for path in find(run):
        found, bad, last = [], [], 0
        for number, line in enumerate(path.read_text(errors='replace').splitlines(), start=1):
            try:
                record = json.loads(line)
                step = record['step'] + 0
            except (ValueError, TypeError, KeyError):
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
        raise LogError('no values are logged in it yet')
    return joined


def curves(logged: list[dict]) -> dict[str, Curve]:
    """Every number in the records as a curve; of what training and validation both log, training's."""
    points: dict[tuple[str, bool], list[tuple[float, float]]] = {}
    for record in logged:
        for key, value in record.items():
            if isinstance(value, int | float):
                points.setdefault((key, 'iter' not in record), []).append((record['at'], value))
    found = {}
    for (key, metric), pairs in sorted(points.items(), key=lambda item: item[0][1]):
        if key not in PLACES and not (metric and key in COSTS):
            iterations, values = np.array(pairs, float).T
            found.setdefault(key, Curve(iterations, values, metric))
    return found


def choose(runs: dict[str, dict[str, Curve]], patterns: list[str] | None) -> list[str]:
    """The keys to draw: those that match, or the losses, the learning rate and the metrics.

    Raises:
        InputError: a pattern matches nothing, or there is nothing of the latter.
    """
    metric = {key: curve.metric for run in runs.values() for key, curve in run.items()}
    if patterns:
        matches = {pattern: [key for key in metric if fnmatch(key, pattern)] for pattern in patterns}
        if lacking := [pattern for pattern, keys in matches.items() if not keys]:
            raise InputError(f'--keys {" ".join(lacking)} match nothing; there are: {", ".join(metric)}')
        return list(dict.fromkeys(key for keys in matches.values() for key in keys))
    keys = [key for key in ('loss', 'lr') if key in metric]
    keys += [key for key in metric if metric[key] and not key.endswith(DETAILS)]
    keys += [key for key in metric if not metric[key] and 'loss' in key and key != 'loss']
    if not keys:
        raise InputError(f'no losses, lr or metrics are logged; choose with --keys from: {", ".join(metric)}')
    if len(keys) > MOST:
        print(f'drawn are {MOST} of {len(keys)} keys; --keys draws others: {", ".join(keys[MOST:])}')
    return keys[:MOST]


def smoothed(values: np.ndarray, count: int) -> np.ndarray:
    """The mean of the ``count`` values around each, of fewer at the ends; what is not finite does not take part."""
    known = np.isfinite(values)
    kernel = np.ones(min(count, len(values)))
    total = np.convolve(np.where(known, values, 0), kernel, 'same')
    number = np.convolve(known, kernel, 'same')
    return np.divide(total, number, out=np.full(len(values), np.nan), where=number > 0.5)


def draw(path: Path, runs: dict[str, dict[str, Curve]], keys: list[str], count: int | None) -> None:
    """A panel for each key, a colour for each run."""
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
            for index, run in enumerate(runs.values()):
                if curve := run.get(key):
                    exact = curve.metric or key == 'lr'
                    draw_curve(axes, curve, f'C{index}', 1 if exact else count or len(curve.values) // 25)
        for axes in panels[len(keys) :]:
            axes.remove()
        drawn.supxlabel('iteration', fontsize=9)
        if len(runs) == 1:
            drawn.suptitle(next(iter(runs)), fontsize='medium')
        else:
            handles = [Line2D([], [], color=f'C{index}') for index in range(len(runs))]
            drawn.legend(handles, runs, loc='outside upper center')


def draw_curve(axes: Axes, curve: Curve, colour: str, count: int) -> None:
    """One curve: points in validation; in training, where it is smoothed over several values, pale behind that."""
    if count <= 1:
        axes.plot(curve.iterations, curve.values, color=colour, marker='o' if curve.metric else None, ms=3)
    else:
        axes.plot(curve.iterations, curve.values, color=colour, alpha=0.25, lw=0.8)
        axes.plot(curve.iterations, smoothed(curve.values, count), color=colour)


def headline(name: str, run: dict[str, Curve]) -> str:
    """How far a run is and what it costs."""
    words = [name, f'{max(curve.iterations[-1] for curve in run.values()):.0f} iterations']
    if 'time' in run:
        words.append(f'{np.nanmean(run["time"].values):.3f} s per iteration')
    if 'memory' in run:
        words.append(f'{np.nanmax(run["memory"].values):,.0f} MiB of GPU memory')
    return ', '.join(words)


def summary(run: dict[str, Curve]) -> Table:
    """Last and best values of a run: the least of a loss, the largest of a metric."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column('')
    for title in ('last', 'at', 'best', 'at'):
        table.add_column(title, justify='right')
    for key, (iterations, values, metric) in run.items():
        if key in (*COSTS, 'base_lr'):
            continue
        cells = [f'{values[-1]:.4g}', f'{iterations[-1]:.0f}']
        if (metric or 'loss' in key) and np.isfinite(values).any():
            best = np.nanargmin(values) if 'loss' in key else np.nanargmax(values)
            cells += [f'{values[best]:.4g}', f'{iterations[best]:.0f}']
        table.add_row(key, *cells)
    return table


if __name__ == '__main__':
    sys.exit(cli.run(main, parse_args()))
