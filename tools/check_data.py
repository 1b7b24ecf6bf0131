"""Read a whole data set before a long training, and say what is wrong with it and what it is made of.

  python tools/check_data.py CONFIG --out report

finds files that are missing or do not decode, sizes that differ, labels out of range, boxes and masks that are empty or
invalid, classes that differ between data, config and heads, and images of train in val or test. Tables show the
images and the balance of classes. Exit code: 0 clean, 1 problems found. --out gets all problems as text, and plots.
"""

import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

import numpy as np
from matplotlib.ticker import NullLocator
from rich.console import Console
from rich.table import Table

from swin_mm import cli
from swin_mm.analysis.dataset_check import Part, check
from swin_mm.analysis.figures import figure
from swin_mm.openmmlab.config import require_data
from swin_mm.utils.errors import InputError
from swin_mm.utils.files import atomic_write

PARTS = ('train', 'val', 'test')


def parse_args() -> Namespace:
    """Read the command line."""
    parser = cli.parser(__doc__, runner=False, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('--part', nargs='+', choices=PARTS, help='what to read (default: all that the config has)')
    parser.add_argument('--out', type=Path, metavar='DIR', help='folder for problems.txt and plots')
    parser.add_argument('--workers', type=int, help='processes that decode (default: one per core)')
    return parser.parse_args()


def main(args: Namespace) -> None:
    """Check."""
    cfg = cli.read_config(args)
    names = args.part or [name for name in PARTS if cfg.get(f'{name}_dataloader')]
    if lacking := [name for name in names if not cfg.get(f'{name}_dataloader')]:
        raise InputError(f'{args.config} has no {lacking[0]}_dataloader')
    if args.workers is not None and args.workers < 1:
        raise InputError(f'--workers {args.workers}: at least 1 is needed')
    require_data(cfg, *names)
    parts = check(cfg, names, args.workers)
    problems = sorted(problem for part in parts for problem in part.problems)
    console = Console(highlight=False)
    console.print(images_table(parts), classes_table(parts))
    for kind, group in groupby(problems, lambda problem: problem[0]):
        lines = [what for _, what in group]
        console.print(f'[bold red]{kind}: {len(lines)}')
        for line in lines[:5]:
            console.print(f'  {line}', markup=False, soft_wrap=True)
        if len(lines) > 5:
            console.print(f'  and {len(lines) - 5} more')
    if args.out:
        with atomic_write(args.out / 'problems.txt') as file:
            file.write_text(''.join(f'{kind}: {what}\n' for kind, what in problems))
        plot(parts, args.out)
        console.print(f'written: {args.out}')
    if problems:
        sys.exit(f'{len(problems)} problems found')
    console.print('[green]no problems found')


def spread(values: Sequence[float]) -> str:
    """Minimum, median and maximum."""
    return ' / '.join(f'{value:.0f}' for value in np.percentile(values, (0, 50, 100))) if len(values) else '-'


def images_table(parts: list[Part]) -> Table:
    """A row for each part."""
    table = Table('part', 'images', 'width: min / median / max', 'height', 'objects', 'their size, √area')
    for part in parts:
        widths, heights = zip(*part.sizes, strict=True) if part.sizes else ((), ())
        count = f'{sum(part.amounts.values()):,}' if part.objects else '-'
        table.add_row(part.name, f'{len(part.images):,}', spread(widths), spread(heights), count, spread(part.objects))
    return table


def classes_table(parts: list[Part]) -> Table:
    """A row for each class, the most frequent of train first."""
    table = Table('class', *(f'{part.name}: {"objects" if part.objects else "pixels"}' for part in parts))
    classes = [*dict.fromkeys(name for part in parts for name in part.classes)]
    for index in sorted(range(len(classes)), key=lambda index: -parts[0].amounts[index]):
        cells = []
        for part in parts:
            amount, total = part.amounts[index], part.amounts.total()
            cells.append(f'{amount:,} ({amount / total:.1%})' if amount else '[yellow]none')
        table.add_row(classes[index], *cells)
    return table


def plot(parts: list[Part], folder: Path) -> None:
    """Draw the balance of classes, and the sizes of images and objects."""
    classes = parts[0].classes
    order = sorted(range(len(classes)), key=lambda index: parts[0].amounts[index])
    with figure(folder / 'classes.png', 8, 1.5 + 0.25 * len(classes)) as drawn:
        axes = drawn.subplots()
        thick = 0.8 / len(parts)
        for row, part in enumerate(parts):
            shares = [100 * part.amounts[index] / (part.amounts.total() or 1) for index in order]
            axes.barh(np.arange(len(order)) - row * thick, shares, thick, label=part.name)
        axes.set_yticks(np.arange(len(order)) - 0.4 + thick / 2, [classes[index] for index in order])
        unit = 'objects' if parts[0].objects else 'labelled pixels'
        axes.set(xscale='log', ylim=(-1, len(order)), xlabel=f'% of {unit}', title='Balance of classes')
        axes.legend()

    with figure(folder / 'sizes.png', 12, 5) as drawn:
        axes = drawn.subplots(1, 2 if parts[0].objects else 1, squeeze=False)[0]
        for part in parts:
            axes[0].scatter(*np.array(part.sizes).reshape(-1, 2).T, s=12, alpha=0.4, label=part.name)
        axes[0].set(xlabel='width, pixels', ylabel='height, pixels', title='Sizes of images', xlim=0, ylim=0)
        if parts[0].objects:
            for part in parts:
                shares = np.full(len(part.objects), 100 / max(len(part.objects), 1))
                bins = np.geomspace(1, 2048, 34)
                axes[1].hist(part.objects, bins, weights=shares, histtype='step', label=part.name)
            axes[1].set(
                xscale='log', xlabel='√area of the box, pixels', ylabel='% of objects', title='Sizes of objects'
            )
            ticks = [2, 8, 32, 96, 256, 1024]  # between 32 and 96 COCO calls objects medium
            axes[1].set_xticks(ticks, ticks, minor=False)
            axes[1].xaxis.set_minor_locator(NullLocator())
        for panel in axes:
            panel.legend()


if __name__ == '__main__':
    sys.exit(cli.run(main, parse_args()))
