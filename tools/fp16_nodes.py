"""List the nodes of an ONNX file that have to stay in fp32 when the rest runs in fp16, and show by simulation why.

  python tools/fp16_nodes.py CONFIG model.onnx --out fp16.json
  python tools/fp16_nodes.py CONFIG model.onnx --out fp16.json --onnx model-fp16.onnx

The JSON file holds `node_block_list` for onnxconverter-common, and `trtexec`, the arguments of TensorRT's command line
that keep these layers in fp32. --onnx writes the file that onnxconverter-common makes with the list. The ranges of
activations come from images of the config's training set; the simulation rounds what nodes hand to each other, on the
CPU.
"""

import json
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections import Counter
from pathlib import Path

from rich.console import Console
from rich.table import Table

from swin_mm import cli
from swin_mm.analysis.half_precision import MARGIN, convert_to_fp16, examine
from swin_mm.utils.errors import InputError
from swin_mm.utils.files import atomic_write


def parse_args() -> Namespace:
    """Read the command line."""
    parser = cli.parser(__doc__, runner=False, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('file', type=Path, help='exported file, .onnx')
    parser.add_argument('--out', type=Path, required=True, metavar='FILE', help='JSON file to write')
    parser.add_argument('--onnx', type=Path, metavar='FILE', help='also write the file in fp16')
    parser.add_argument('--images', type=int, default=8, metavar='N', help='to run on (default: %(default)s)')
    parser.add_argument(
        '--margin',
        type=float,
        default=MARGIN,
        metavar='X',
        help='keep what is within this factor of the largest number of fp16 (default: %(default)s)',
    )
    return parser.parse_args()


def main(args: Namespace) -> None:
    """Find, simulate, write and print."""
    if args.images < 1 or args.margin < 1:
        raise InputError(f'--images {args.images}, --margin {args.margin}: expected at least 1')
    report, model = examine(cli.read_config(args), args.file, args.images, args.margin)
    with atomic_write(args.out) as file:
        file.write_text(json.dumps(report.as_dict(), indent=1))
    if args.onnx:
        with atomic_write(args.onnx) as file:
            file.write_bytes(convert_to_fp16(model, report.keep).SerializeToString())
    table = Table('largest difference from fp32', 'every node in fp16', 'these nodes in fp32')
    for measure, value in report.everything_half.items():
        table.add_row(measure, f'{value:.2g}', f'{report.kept[measure]:.2g}')
    console = Console(markup=False, highlight=False)
    console.print(table)
    reasons = ', '.join(f'{count} {reason}' for reason, count in Counter(report.keep.values()).items())
    console.print(f'{len(report.keep)} of {report.nodes} nodes stay in fp32: {reasons or "none"}', soft_wrap=True)


if __name__ == '__main__':
    sys.exit(cli.run(main, parse_args()))
