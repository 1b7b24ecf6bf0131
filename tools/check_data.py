"""Read a whole data set before a long training, and report what is wrong with it and what it is made of.

  python tools/check_data.py CONFIG --out report

finds files that are missing, unreadable or never read, annotations that are malformed or contradict their image,
labels that are no class or all ignored, classes that differ between data, config and heads, and images of train in val
or test; then it runs some batches of the training pipeline. Tables show the images and the balance of classes. Exit
code: 0 no problems (there may be notes), 1 problems found. --out gets all findings as text, and plots.
"""

import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from rich.console import Console

from swin_mm import cli
from swin_mm.analysis.dataset_check import check_datasets
from swin_mm.openmmlab.config import require_data
from swin_mm.utils.errors import InputError

PARTS = ('train', 'val', 'test')


def parse_args() -> Namespace:
    """Read the command line."""
    parser = cli.parser(__doc__, runner=False, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('--part', nargs='+', choices=PARTS, help='what to read (default: all that the config has)')
    parser.add_argument('--out', type=Path, metavar='DIR', help='folder for problems.txt and plots')
    parser.add_argument('--workers', type=int, help='decoding processes (default: one per core)')
    return parser.parse_args()


def main(args: Namespace) -> None:
    """Check the data, print the report, and exit with 1 if there are problems."""
    cfg = cli.read_config(args)
    names = args.part or [name for name in PARTS if cfg.get(f'{name}_dataloader')]
    if lacking := [name for name in names if not cfg.get(f'{name}_dataloader')]:
        raise InputError(f'{args.config} has no {lacking[0]}_dataloader')
    if args.workers is not None and args.workers < 1:
        raise InputError(f'--workers {args.workers}: at least 1 is needed')
    require_data(cfg, *names)
    report = check_datasets(cfg, names, args.workers)
    report.show(Console())
    if args.out:
        report.save(args.out)
        print(f'written: {args.out}')
    if report.faults:
        sys.exit(report.summary())
    print(report.summary())


if __name__ == '__main__':
    sys.exit(cli.run(main, parse_args()))
