"""Export a backbone or a whole model for use without this project, and compare the file with PyTorch.

  python tools/export.py CONFIG CHECKPOINT --to onnx --out swin.onnx
  python tools/export.py CONFIG CHECKPOINT --to torch.export --part model --out segmentor.pt2

Batch, height and width of the images stay dynamic, unless --size fixes height and width. The file takes what the
config's data_preprocessor gives: float32, (batch, channels, height, width), normalised. It is run at several sizes and
written only if it gives what the model gives. See docs/export.md for more.
"""

import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from itertools import groupby
from pathlib import Path

from rich.console import Console
from rich.table import Table
from rich.text import Text

from swin_mm import cli
from swin_mm.analysis.export import OPSET, OPSETS, PARTS, SUFFIXES, Difference, ExportDiffersError, export


def parse_args() -> Namespace:
    """Read the command line."""
    parser = cli.parser(__doc__, runner=False, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--to', choices=SUFFIXES, required=True, help='format of the file')
    parser.add_argument(
        '--out', type=Path, required=True, metavar='FILE', help=f'ends in {", ".join(SUFFIXES.values())}'
    )
    parser.add_argument(
        '--part',
        choices=PARTS,
        default='backbone',
        help='model: logits of a segmentor, or the maps of a one-stage detector before boxes are selected '
        '(default: backbone)',
    )
    parser.add_argument('--size', metavar='WxH', help='fix width and height of the images; torchscript needs it')
    parser.add_argument(
        '--opset', type=int, metavar='N', help=f'of ONNX, {OPSETS[0]} to {OPSETS[-1]} (default: {OPSET})'
    )
    parser.add_argument('--force', action='store_true', help='replace FILE if it exists')
    return parser.parse_args()


def main(args: Namespace) -> None:
    """Export, compare and print the comparison."""
    console = Console(markup=False, highlight=False)
    size = cli.parse_size('--size', args.size, 'x', least=1)
    try:
        with console.status(f'exporting to {args.to}'):
            differences = export(
                cli.read_config(args), args.checkpoint, args.to, args.out, args.part, size, args.opset, args.force
            )
    except ExportDiffersError as error:
        show(error.differences, args.to, console)
        sys.exit(f'error: {error}')
    if differences:
        show(differences, args.to, console)
    console.print(f'{args.out}: {args.out.stat().st_size:,} bytes', soft_wrap=True)


def show(differences: list[Difference], to: str, console: Console) -> None:
    """Print how far the file is from PyTorch, for each batch of images and output."""
    title = f'{to} against PyTorch'
    table = Table('images', 'output', 'shape', 'largest', 'difference', 'relative', title=title)
    for images, rows in groupby(differences, lambda each: each.images):
        for row in rows:
            if row.error:
                console.print(f'{times(images)} fails: {row.error}', style='red')
            relative = Text(f'{row.relative:.1e}', 'green' if row.within_tolerance else 'red')
            numbers = f'{row.largest:.3g}', f'{row.difference:.1e}'
            table.add_row(times(images), row.output, times(row.shape), *numbers, relative)
        table.add_section()
    console.print(table)


def times(shape: Sequence[int]) -> str:
    """A shape such as 1×3×224×224."""
    return '×'.join(map(str, shape))


if __name__ == '__main__':
    sys.exit(cli.run(main, parse_args()))
