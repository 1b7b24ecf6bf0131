"""Put our Swin into an OpenMMLab config and show what changes: python tools/plug.py CONFIG --out FILE."""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from swin_mm import cli
from swin_mm.models.swin import ARCHS
from swin_mm.openmmlab.config import load_config
from swin_mm.openmmlab.plug import plug, show, write


def parse_args() -> Namespace:
    """Read the command line."""
    parser = ArgumentParser(description='Put our Swin into an OpenMMLab config')
    parser.add_argument('config', help='path, or name in a library such as mmdet::atss/atss_r50_fpn_1x_coco.py')
    parser.add_argument('--arch', choices=sorted(ARCHS), help='size (default: that of a Swin that is there, or t)')
    parser.add_argument('--v2', action='store_true', help='Swin V2')
    parser.add_argument('--checkpoint', metavar='F', help='weights of the backbone (default: the official ones)')
    parser.add_argument('--out', type=Path, metavar='FILE', help='write a config that inherits from CONFIG')
    parser.add_argument('--force', action='store_true', help='let --out replace a file')
    parser.add_argument('--debug', action='store_true', help='show where an error arose')
    return parser.parse_args()


def main(args: Namespace) -> None:
    """Show the changes and write them."""
    before = load_config(args.config)
    after = plug(before, args.arch, args.v2, args.checkpoint)
    if args.out:
        write(before, after, args.out, args.force)
    console = Console(highlight=False, soft_wrap=True)
    for line in show(before, after).splitlines():
        console.print(Text(line, 'red' if line.startswith('-') else 'green'))
    if args.out:
        console.print(f'written: {args.out}')


if __name__ == '__main__':
    sys.exit(cli.run(main, parse_args()))
