"""Replace the backbone of an OpenMMLab config by our Swin: python tools/plug.py CONFIG --out FILE."""

import sys
from argparse import ArgumentParser, Namespace
from pathlib import Path

from rich.console import Console
from rich.text import Text

from swin_mm import cli
from swin_mm.models.swin import ARCHS
from swin_mm.openmmlab.config import load_config
from swin_mm.openmmlab.plug import plug_with_report, show, write
from swin_mm.utils.errors import InputError


def parse_args() -> Namespace:
    """Read the command line."""
    parser = ArgumentParser(description='Replace the backbone of an OpenMMLab config by our Swin')
    parser.add_argument('config', help='path, or name in a library, such as mmdet::atss/atss_r50_fpn_1x_coco.py')
    parser.add_argument('--arch', choices=sorted(ARCHS), help='size (default: that of the old Swin, or t)')
    parser.add_argument('--v2', action='store_true', help='use Swin V2')
    parser.add_argument('--checkpoint', metavar='F', help='weights of the backbone (default: the official ones)')
    parser.add_argument('--out', type=Path, metavar='FILE', help='write a config that inherits from CONFIG')
    parser.add_argument('--flat', action='store_true', help='let --out write all settings, inheriting from nothing')
    parser.add_argument('--force', action='store_true', help='let --out replace an existing file')
    parser.add_argument('--debug', action='store_true', help='show the traceback of errors')
    return parser.parse_args()


def main(args: Namespace) -> None:
    """Show the changes and write them."""
    if args.flat and not args.out:
        raise InputError('--flat writes a file; name it with --out')
    before = load_config(args.config)
    after, report = plug_with_report(before, args.arch, args.v2, args.checkpoint)
    if args.out:
        write(before, after, args.out, args.force, args.flat)
    console = Console(highlight=False, soft_wrap=True)
    for line in show(before, after).splitlines():
        console.print(Text(line, 'red' if line.startswith('-') else 'green'))
    for note in report.notes:
        console.print(f'check: {note}', markup=False)
    if args.out:
        console.print(f'written: {args.out}', markup=False)


if __name__ == '__main__':
    sys.exit(cli.run(main, parse_args()))
