"""Evaluation of the measured times: ratios, floors, bars, tables and plots."""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from swin_mm.utils.files import atomic_write


@dataclass(frozen=True)
class Bar:
    """A required value of a case, such as a ratio of at least 1.3.

    Args:
        case: where; its text is the name of the result.
        kind: 'ratio', time of the rival over ours, at least; or at most 'ms', 'floor' (time over the floor's) or
            'memory' (of the rival's).
        asked: the number asked for.
        ours: which of ours.
        rival: against whom.
    """

    case: Any
    kind: str
    asked: float
    ours: str = 'ours'
    rival: str = 'mmdet'

    def judge(self, results: list[dict]) -> dict:
        """The measured value, and whether it meets the requirement."""
        result = next((result for result in results if result['name'] == str(self.case)), {'rows': {}, 'seconds': {}})
        rows = {name: row for name, row in result['rows'].items() if name in result['seconds']}
        measured = None
        if self.ours in rows and self.kind in ('ms', 'floor'):
            measured = rows[self.ours][self.kind][0]
        elif self.kind == 'memory' and {self.ours, self.rival} <= rows.keys():
            measured = rows[self.ours]['memory'] / rows[self.rival]['memory']
        elif {self.ours, self.rival} <= rows.keys():
            theirs, ours = (np.array(result['seconds'][name]) for name in (self.rival, self.ours))
            measured = quartiles(theirs / ours)[0]
        texts = {'ratio': '{1} / {0}, time', 'ms': '{0}, ms', 'floor': '{0} / floor', 'memory': '{0} / {1}, memory'}
        enough = measured is not None and (measured >= self.asked if self.kind == 'ratio' else measured <= self.asked)
        return {
            'name': str(self.case),
            'what': texts[self.kind].format(self.ours, self.rival),
            'measured': measured,
            'asked': ('≥' if self.kind == 'ratio' else '≤') + f' {self.asked}',
            'verdict': 'not measured' if measured is None else 'met' if enough else 'not met',
        }


def quartiles(values: Iterable[float]) -> list[float]:
    """Median, lower and upper quartile."""
    return [float(q) for q in np.percentile(list(values), (50, 25, 75))]


def summarise(result: dict) -> None:
    """Add to each row of a result the values derived from the times of each round.

    ms; images per second; ratio: its time over ours of the same mode; floor: its time over what the result's ``flops``
    take at the rate of the matrix product; share: of the whole model's time, for its backbone.
    """
    seconds = {name: np.array(values) for name, values in result['seconds'].items()}
    for name, row in result['rows'].items():
        if name not in seconds:
            continue
        own, (kind, plus, mode) = seconds[name], name.partition('+')
        row['ms'] = quartiles(1000 * own)
        row['images_per_s'] = result['case']['batch'] / float(np.median(own))
        base = 'ours' + plus + mode
        if name != base and base in seconds:
            row['ratio'] = quartiles(own / seconds[base])
        if result['flops']:
            row['floor'] = quartiles(own / (seconds['matmul'] * result['flops'] / (2 * result['cube'] ** 3)))
        if mode == 'backbone' and kind in seconds:
            row['share'] = quartiles(own / seconds[kind])


def print_table(title: str, headings: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Print a table."""
    try:
        from rich import box
        from rich.console import Console
        from rich.table import Table
    except ImportError:
        widths = [max(map(len, column)) for column in zip(headings, *rows, strict=True)]
        print(f'\n{title}', *('  '.join(map(str.ljust, row, widths)) for row in (headings, *rows)), sep='\n')
        return
    table = Table(*headings, title=title, box=box.SIMPLE_HEAD)
    for row in rows:
        table.add_row(*row)
    Console(highlight=False, markup=False, width=160).print(table)


def show(record: dict) -> None:
    """Print the tables of a record."""
    show_results(record['results'])
    show_machine(record)
    if record.get('bars'):
        show_bars(record['bars'])


def plot(record: dict, file: Path, growth: bool) -> None:
    """Draw ratios, or growth if several sizes were measured.

    Raises:
        InputError: the file cannot be written.
    """
    pixels = {(r['case']['batch'], *r['case']['size']) for r in record['results']}
    with atomic_write(file) as part:
        (plot_growth if growth and len(pixels) > 1 else plot_ratios)(record['results'], part)


def show_results(results: list[dict]) -> None:
    """Print the table of all cases, medians with quartiles."""
    rows = []
    for result in results:
        for name, row in result['rows'].items():
            ms, ratio = ('{:.4g} ({:.4g}-{:.4g})'.format(*row[key]) if key in row else '' for key in ('ms', 'ratio'))
            rate, floor, memory = (row.get(key) for key in ('images_per_s', 'floor', 'memory'))
            share = f'{row["share"][0]:.0%} of the whole' if 'share' in row else ''
            cells = [f'{rate:.4g}' if rate else '', ratio, f'{floor[0]:.2f}' if floor else '']
            cells += [f'{memory / 1e6:.0f}' if memory else '', row.get('note', share)]
            rows.append([result['name'] if name == next(iter(result['rows'])) else '', name, ms, *cells])
    print_table('results', ('case', 'candidate', 'ms', 'images/s', 'time / ours', 'x floor', 'MB', ''), rows)


def show_machine(record: dict) -> None:
    """Print the peak rates of the machine."""
    rates: dict[str, list[float]] = {}
    for result in record['results']:
        rates.setdefault(result['case']['dtype'], []).append(
            np.median(result['seconds']['matmul']) / result['cube'] ** 3
        )
    products = ', '.join(f'{dtype} {2e-12 / np.median(times):.3g}' for dtype, times in rates.items())
    machine = record['machine']
    print(f'{machine["device"]}, {machine["threads"]} threads: matrix products {products} TFLOP/s,', end=' ')
    print(f'copies {machine["copy_bytes_per_s"] / 1e9:.3g} GB/s')


def show_bars(bars: list[dict]) -> None:
    """Print the table of bars."""
    rows = [[b['name'], b['what'], f'{b["measured"] or math.nan:.3g}', b['asked'], b['verdict']] for b in bars]
    print_table('bars', ('case', 'what', 'measured', 'asked', ''), rows)


def plot_ratios(results: list[dict], file: Path) -> None:
    """Draw how much longer than ours the others take."""
    plt = _pyplot()
    points = [(r['name'], name, row) for r in results for name, row in r['rows'].items() if 'ratio' in row][::-1]
    colors = {name: f'C{i}' for i, name in enumerate(sorted({name for _, name, _ in points}))}
    figure, axes = plt.subplots(figsize=(10, 1.2 + 0.28 * len(points)), layout='constrained')
    for y, (_, name, row) in enumerate(points):
        middle, low, high = row['ratio']
        axes.barh(y, middle, color=colors[name])
        axes.errorbar(middle, y, xerr=[[middle - low], [high - middle]], color='black', capsize=2)
    axes.set_yticks(range(len(points)), [f'{case}: {name}' for case, name, _ in points], fontsize=8)
    axes.set_xlabel('time over ours (median and quartiles)')
    axes.axvline(1, color='black', lw=0.8)
    figure.savefig(file, dpi=150)
    plt.close(figure)


def plot_growth(results: list[dict], file: Path) -> None:
    """Draw time and memory against pixels, for larger images and for more of them; power 1 is linear growth."""
    plt = _pyplot()
    figure, panels = plt.subplots(1, 2, figsize=(12, 5), layout='constrained')
    lines: dict[tuple[str, str], list] = {}
    for result in results:
        case = result['case']
        sweep = 'more images' if case['batch'] > 1 else 'larger images'
        for name, row in result['rows'].items():
            if 'ms' in row:
                pixels = case['batch'] * math.prod(case['size']) / 1e6
                lines.setdefault((name, sweep), []).append((pixels, row['ms'][0], row['memory'] / 1e6))
    for i, ((name, sweep), line) in enumerate(lines.items()):
        pixels, *values = zip(*sorted(line), strict=True)
        for axes, y in zip(panels, values, strict=True):
            power = np.polyfit(np.log(pixels), np.log(y), 1)[0] if len(set(pixels)) > 1 else math.nan
            axes.loglog(
                pixels, y, 'o-' if sweep[0] == 'l' else 'x--', color=f'C{i}', label=f'{name}, {sweep}: {power:.2f}'
            )
    for axes, label in zip(panels, ('time in ms', 'memory in MB'), strict=True):
        axes.set(xlabel='megapixels in a batch', ylabel=label)
        axes.legend(title='power of growth', fontsize=8)
        axes.grid(alpha=0.3, which='both')
    figure.savefig(file, dpi=150)
    plt.close(figure)


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use('Agg')
    import matplotlib.pyplot

    return matplotlib.pyplot
