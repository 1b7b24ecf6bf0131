"""Test a detector or a segmentor: python tools/test.py CONFIG CHECKPOINT, or CONFIG and an exported file."""

import sys
from argparse import Namespace

from swin_mm import cli
from swin_mm.analysis.runtime import is_exported, use_exported
from swin_mm.engine import testing
from swin_mm.engine.inference import DTYPES
from swin_mm.utils.errors import InputError

EXAMPLES = """
examples:
  python tools/test.py CONFIG work_dirs/NAME/epoch_12.pth
  predictions of a detector to a file, and pictures beside the ground truth:
    python tools/test.py CONFIG CHECKPOINT --out predictions.pkl --show-dir pictures
  predictions of a segmentor, one PNG of class numbers (from 0) per image:
    python tools/test.py CONFIG CHECKPOINT --out masks
  large images by overlapping tiles, merged before they are compared with the ground truth:
    python tools/test.py CONFIG CHECKPOINT --tile 1024 --overlap 0.2
  a file that tools/export.py wrote, with its own weights and preprocessing:
    python tools/test.py CONFIG model.onnx --runtime openvino
  8 GPUs: tools/dist_test.sh CONFIG CHECKPOINT 8
"""


def parse_args() -> Namespace:
    """Read the command line."""
    parser = cli.parser('Test a detector or a segmentor', epilog=EXAMPLES)
    parser.add_argument(
        'checkpoint', help='checkpoint file or address; it must give the whole model of the config. Or an exported file'
    )
    parser.add_argument(
        '--out', help='save predictions: of a detector to a .pkl file, of a segmentor as PNGs to a folder'
    )
    parser.add_argument('--show-dir', help='draw predictions beside the ground truth into this folder')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation: a flip, or what the config says')
    parser.add_argument(
        '--dtype', choices=DTYPES, default='fp32', help='what the network computes in; fp32 is the default'
    )
    parser.add_argument('--tile', type=int, metavar='N', help='predict on larger images by tiles of N x N pixels')
    parser.add_argument(
        '--overlap', type=float, default=0.2, metavar='SHARE', help='of a tile with the next (default: 0.2)'
    )
    cli.add_runtime(parser)
    return parser.parse_args()


def main(args: Namespace) -> None:
    """Test."""
    cfg, checkpoint, dtype = cli.read_config(args), args.checkpoint, args.dtype
    if is_exported(checkpoint):
        if args.tta:
            raise InputError(f'--tta: {checkpoint} is an exported file; test-time augmentation needs the checkpoint')
        use_exported(cfg, checkpoint, args.runtime, dtype)
        checkpoint, dtype = None, 'fp32'
    elif args.runtime:
        raise InputError(f'--runtime {args.runtime}: {checkpoint} is not an exported file')
    testing.test(
        cfg,
        checkpoint,
        out=args.out,
        show_dir=args.show_dir,
        tta=args.tta,
        dtype=dtype,
        allow_pickle=args.allow_pickle,
        tile=args.tile,
        overlap=args.overlap,
    )


if __name__ == '__main__':
    sys.exit(cli.run(main, parse_args()))
