"""Quantize a file that tools/export.py wrote to INT8: python tools/quantize.py CONFIG model.onnx --out int8.xml.

NNCF calibrates on images of the config's training set, prepared as in a test. If the metric of the config's test set
then drops by more than --max-drop points, NNCF searches for the layers that cost the most and keeps them in float. The
file is written only if the metric stays within that drop. An .xml (with a .bin beside it) is for OpenVINO, an .onnx for
onnxruntime; both run with tools/predict.py and tools/test.py.
"""

import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from swin_mm import cli
from swin_mm.analysis.quantization import MAX_DROP, AccuracyError, quantize
from swin_mm.utils.errors import InputError


def parse_args() -> Namespace:
    """Read the command line."""
    parser = cli.parser(__doc__, runner=False, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('file', type=Path, help='exported file, .onnx')
    parser.add_argument('--out', type=Path, required=True, metavar='FILE', help='ends in .xml or .onnx')
    parser.add_argument('--images', type=int, default=128, metavar='N', help='to calibrate on (default: %(default)s)')
    parser.add_argument(
        '--max-drop', type=float, default=MAX_DROP, metavar='POINTS', help='of the metric (default: %(default)s)'
    )
    parser.add_argument('--force', action='store_true', help='replace FILE if it exists')
    return parser.parse_args()


def main(args: Namespace) -> None:
    """Quantize, and print what it costs."""
    if args.images < 1:
        raise InputError(f'--images {args.images}: expected at least 1')
    try:
        done = quantize(cli.read_config(args), args.file, args.out, args.images, args.max_drop, args.force)
    except AccuracyError as error:
        sys.exit(f'error: {error}')
    print(f'{done.metric}: {done.before:.2f} before, {done.after:.2f} after')
    print(f'{done.quantized} of {done.total} matrix products and convolutions are INT8')
    parts = [args.out] if args.out.suffix == '.onnx' else [args.out, args.out.with_suffix('.bin')]
    print(f'{args.out}: {sum(part.stat().st_size for part in parts):,} bytes')


if __name__ == '__main__':
    sys.exit(cli.run(main, parse_args()))
