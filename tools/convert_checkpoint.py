"""Convert Swin weights between the namings of the libraries that publish them, or tell what a file is.

    python tools/convert_checkpoint.py SRC --inspect
    python tools/convert_checkpoint.py SRC DST --to timm

SRC is a path, an http(s) address or hf://owner/name[/file][@revision]; DST ends in .pth, .pt, .bin or .safetensors.
Values are moved, never computed: converting back gives the same numbers bit for bit.
"""

import argparse
import hashlib
import re
import sys
from collections import Counter
from pathlib import Path

from torch import Tensor

import swin_mm  # noqa: F401 (adds mmengine's plain data and backends to what can be read)
from swin_mm.checkpoints import Contents, convert, parse, unwrap, write_checkpoint
from swin_mm.checkpoints.contents import meaning
from swin_mm.checkpoints.files import check_writable, fetch, read_checkpoint
from swin_mm.checkpoints.namings import CLASSIFIER, OUTPUT_NORMS, TARGETS
from swin_mm.cli import run
from swin_mm.utils.errors import InputError


def parse_args() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('src', metavar='SRC', help='the checkpoint to read')
    parser.add_argument('dst', metavar='DST', nargs='?', type=Path, help='the file to write')
    parser.add_argument('--to', choices=TARGETS, help='the naming to write')
    parser.add_argument('--inspect', action='store_true', help='tell what SRC is; nothing is written')
    parser.add_argument(
        '--window',
        type=int,
        nargs='+',
        metavar='W',
        help='window, or one per stage, of V2 weights from timm or transformers, whose files do not tell; needed only '
        'where the target stores tables that depend on it (torchvision, mmpretrain, official)',
    )
    parser.add_argument('--prefix', help='which of several backbones in SRC, by what its keys begin with')
    parser.add_argument('--force', action='store_true', help='replace DST if it exists')
    parser.add_argument('--debug', action='store_true', help='show where an error arose')
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    """Inspect or convert."""
    if args.inspect == bool(args.dst and args.to):
        raise InputError('give either SRC DST --to NAMING, or SRC --inspect')
    if args.dst:
        check_writable(args.dst, args.force)
    checkpoint = read_checkpoint(args.src)
    contents = parse(unwrap(checkpoint, args.prefix or ''))
    if args.inspect:
        wrapped = {'state_dict', 'model'} & set(checkpoint)
        beside = sorted(str(key) for key in checkpoint if key not in wrapped) if wrapped else []
        show(f'{args.src}', {**about_file(args.src), **about_model(contents), 'beside the weights': ', '.join(beside)})
        return
    stages = len(contents.variant.depths)
    windows = args.window and (args.window * stages if len(args.window) == 1 else args.window)
    if windows and len(windows) != stages:
        raise InputError(f'--window takes 1 or {stages} numbers, one per stage')
    result, dropped = convert(contents, args.to, windows)
    if args.dst.suffix == '.safetensors':
        result = {key: value for key, value in unwrap(result).items() if isinstance(value, Tensor)}
    write_checkpoint(result, args.dst, args.force)
    notes = {f'left out: {why}': f'{count} tensors' for why, count in Counter(dropped.values()).items()}
    if None in contents.windows() and not windows:
        notes['left out: tables of positions'] = 'SRC does not tell its window: give --window if DST shall have them'
    names = {'from': contents.naming.name, 'to': args.to, 'model': str(contents.variant)}
    show(f'{args.dst}', names | {'tensors': str(len(unwrap(result)))} | notes | about_file(str(args.dst)))


def about_file(source: str) -> dict[str, str]:
    """Size and hash; OpenMMLab's file names end in the hash's first eight digits."""
    digest = hashlib.sha256()
    with fetch(source) as path, path.open('rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
        promised = re.search(r'-(?!20\d{6})([0-9a-f]{8})\.', path.name)  # and not a date
        agrees = promised is None or digest.hexdigest().startswith(promised[1])
        note = '' if agrees else f' (NOT {promised[1]} as the name says: damaged, or changed since)'
        return {'size': f'{path.stat().st_size:,} bytes', 'SHA-256': digest.hexdigest() + note}


def about_model(contents: Contents) -> dict[str, str]:
    """What the weights are, read off names and shapes."""
    variant, state = contents.variant, contents.state
    windows = contents.windows()
    sizes = [size and size[0] for size in windows]
    window = 'not told by the file' if None in sizes else str(sizes[0] if len({*sizes}) == 1 else tuple(sizes))
    head = state.get('head.weight')
    norms = sorted({key.partition('.')[0] for key in state if re.fullmatch(OUTPUT_NORMS, key)})
    parameters = sum(value.numel() for key, value in state.items() if meaning(key, CLASSIFIER) is None)
    size = f'arch={variant.arch!r}' if variant.arch else 'embed_dims=..., depths=..., num_heads=...'
    arguments = '' if None in sizes else f', window_size={window if len({*sizes}) == 1 else sizes}'
    if None not in sizes and any(w != whole for w, whole in windows):
        arguments += f', pretrained_window_sizes={tuple(whole for _, whole in windows)}'
    return {
        'naming': contents.naming.name + (f', under {contents.prefix!r}' if contents.prefix else ''),
        'model': str(variant),
        'window': window,
        'patch, image channels': f'{variant.patch}, {variant.in_channels}',
        'classes': str(len(head)) if head is not None else 'no classification head',
        'output norms': ', '.join(norms) or 'none',
        'parameters of the backbone': f'{parameters:,}',
        'type of numbers': ', '.join(sorted({str(value.dtype).removeprefix('torch.') for value in state.values()})),
        'other parts': ', '.join(sorted({key.partition('.')[0] for key in contents.others})) or 'none',
        'as backbone': f"dict(type='swin_mm.SwinTransformer{'V2' * (variant.version == 2)}', {size}{arguments})",
    }


def show(title: str, rows: dict[str, str]) -> None:
    """Print names and values in two columns."""
    width = max(map(len, rows))
    print(title, *(f'  {name:{width}}  {value}' for name, value in rows.items() if value), sep='\n')


if __name__ == '__main__':
    args = parse_args()
    sys.exit(run(main, args))
