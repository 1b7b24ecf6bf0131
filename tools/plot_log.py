"""Curves of training: losses, learning rate and metrics over iterations, and a table of their last and best values.

  python tools/plot_log.py work_dirs/mask-rcnn_swin-t work_dirs/mask-rcnn_swin-s --out curves.png
  python tools/plot_log.py work_dirs/upernet --keys loss '*acc*' mIoU --smooth 50 --out curves.svg

RUN is a work_dir, whose resumed runs are joined into one curve, or a *.json file of scalars that mmengine has written.
Training values are smoothed by a moving average; the raw curve stays visible behind it. What cannot be read is named
and skipped, and the exit code is 1.
"""

import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from rich import box
from rich.console import Console
from rich.table import Table

from swin_mm import cli
from swin_mm.analysis import curves
from swin_mm.analysis.curves import MAX_PANELS, Curve
from swin_mm.analysis.figures import FORMATS
from swin_mm.utils.errors import InputError


def parse_args() -> Namespace:
    """Read the command line."""
    suffixes = ', '.join(f'.{suffix}' for suffix in FORMATS)
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('runs', nargs='+', type=Path, metavar='RUN', help='work_dir or *.json file')
    parser.add_argument('--out', type=Path, required=True, metavar='FILE', help=f'picture: {suffixes}')
    parser.add_argument(
        '--keys', nargs='+', metavar='KEY', help='what to draw; * matches anything (default: losses, lr, metrics)'
    )
    parser.add_argument('--smooth', type=int, metavar='N', help='logged values to average (default: a 25th of all)')
    parser.add_argument('--debug', action='store_true', help='show where an error arose')
    return parser.parse_args()


def main(args: Namespace) -> None:
    """Draw the curves and print the table."""
    if args.out.suffix.lower().removeprefix('.') not in FORMATS:
        raise InputError(f'--out {args.out}: name the picture *.{", *.".join(FORMATS)}')
    if args.smooth is not None and args.smooth < 1:
        raise InputError(f'--smooth {args.smooth}: expected at least 1, which leaves the curves as they are')
    runs, problems = curves.read_runs(args.runs)
    for problem in problems:
        print(f'skipped {problem}', file=sys.stderr)
    if not runs:
        raise InputError('there is nothing to draw in any of the runs, for the reasons named above')
    keys = curves.choose_keys(runs, args.keys)
    if not args.keys and len(keys) > MAX_PANELS:
        print(f'drawing {MAX_PANELS} of {len(keys)} keys; --keys draws others: {", ".join(keys[MAX_PANELS:])}')
        keys = keys[:MAX_PANELS]
    curves.draw(args.out, runs, keys, args.smooth)
    console = Console(markup=False, highlight=False)
    for name, run in runs.items():
        console.print(curves.headline(name, run), soft_wrap=True)
        console.print(table_of_extremes(run))
    console.print(f'{args.out}', soft_wrap=True)
    if problems:
        sys.exit(1)


def table_of_extremes(run: dict[str, Curve]) -> Table:
    """One row per key."""
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column('')
    for title in ('last', 'at', 'best', 'at'):
        table.add_column(title, justify='right')
    for key, row in curves.extremes(run).items():
        cells = [f'{row.last:.4g}', f'{row.last_at}']
        if row.best is not None:
            cells += [f'{row.best:.4g}', f'{row.best_at}']
        table.add_row(key, *cells)
    return table


if __name__ == '__main__':
    sys.exit(cli.run(main, parse_args()))
