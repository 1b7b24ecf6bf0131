"""Visualise a Swin on one image: feature maps, windows, attention, position bias.

  python tools/look.py CONFIG photo.jpg weights.pth --out looks --point 320,200

writes into looks/
  features.png           each stage's map: its principal components as colours, and the norm of its vectors
  windows.png            windows and shifted windows; which tokens of a shifted window attend to each other
  attention_stage*.png   what the token at --point attends to, head by head
  bias_stage*.png        the learned position bias, head by head

The image is scaled to fit the config's test scale or --size, keeping its ratio, and normalised as the config says. The
weights come from the checkpoint, of the whole model or of a backbone, in any naming; without one, from what the
backbone's init_cfg names.
"""

import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from pathlib import Path

from swin_mm import cli
from swin_mm.analysis.attention_maps import save_figures
from swin_mm.analysis.figures import FORMATS


def parse_args() -> Namespace:
    """Read the command line."""
    parser = cli.parser(__doc__, runner=False, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('image', help='image file')
    parser.add_argument('checkpoint', nargs='?', help='checkpoint file (default: what the init_cfg names)')
    parser.add_argument('--out', type=Path, required=True, metavar='DIR', help='folder to write to')
    parser.add_argument('--point', metavar='X,Y', help="pixel of the image (default: the image's centre)")
    parser.add_argument('--block', type=int, default=-1, help='block of each stage to look at (default: -1, the last)')
    parser.add_argument('--size', metavar='WxH', help="scale the image to fit this (default: the config's test scale)")
    parser.add_argument('--format', choices=FORMATS, default='png', help='default: png')
    return parser.parse_args()


def main(args: Namespace) -> None:
    """Draw the figures."""
    save_figures(
        cli.read_config(args),
        args.image,
        args.checkpoint,
        args.out,
        point=cli.parse_size('--point', args.point, ','),
        block=args.block,
        size=cli.parse_size('--size', args.size, 'x', least=1),
        suffix=args.format,
    )
    print(f'written: {args.out}')


if __name__ == '__main__':
    sys.exit(cli.run(main, parse_args()))
