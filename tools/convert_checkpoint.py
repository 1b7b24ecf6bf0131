"""Convert Swin weights between the key namings of libraries, or inspect a file.

    python tools/convert_checkpoint.py SRC --inspect
    python tools/convert_checkpoint.py SRC DST --to timm

SRC is a path, an http(s) address or hf://owner/name[/file][@revision]; DST ends in .pth, .pt, .bin or .safetensors.
Values are moved, never computed: converting back gives the same numbers bit for bit. With --to transformers a
config.json is written beside DST, so that from_pretrained reads the folder.
"""

import argparse
import hashlib
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path

from torch import Tensor

from swin_mm.checkpoints import Contents, convert, parse, transformers_config, unwrap, write_checkpoint
from swin_mm.checkpoints.contents import meaning
from swin_mm.checkpoints.files import check_writable, promised_hash
from swin_mm.checkpoints.namings import CLASSIFIER, OUTPUT_NORMS, TARGETS
from swin_mm.cli import run
from swin_mm.openmmlab.loading import fetch, read_checkpoint
from swin_mm.utils.errors import InputError
from swin_mm.utils.files import atomic_write


def parse_args() -> argparse.Namespace:
    """Read the command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('src', metavar='SRC', help='the checkpoint to read')
    parser.add_argument('dst', metavar='DST', nargs='?', type=Path, help='the file to write')
    parser.add_argument('--to', choices=TARGETS, help='the naming to write')
    parser.add_argument('--inspect', action='store_true', help='show what SRC is; nothing is written')
    parser.add_argument(
        '--window',
        type=int,
        nargs='+',
        metavar='W',
        help='window, or one per stage, of V2 weights from timm or transformers, whose files do not store it; needed '
        'for targets that store tables or a config that depend on it (torchvision, mmpretrain, official, transformers)',
    )
    parser.add_argument('--prefix', help='which of several backbones in SRC to convert: the prefix of its keys')
    parser.add_argument('--force', action='store_true', help='replace DST (and config.json) if it exists')
    parser.add_argument('--debug', action='store_true', help='show where an error arose')
    return parser.parse_args()


def main(args: argparse.Namespace) -> None:
    """Inspect or convert."""
    if args.inspect == bool(args.dst and args.to):
        raise InputError('give either SRC DST --to NAMING, or SRC --inspect')
    config_file = args.dst.with_name('config.json') if args.dst and args.to == 'transformers' else None
    if args.dst:
        check_writable(args.dst, args.force)
        if config_file and config_file.exists() and not args.force:
            raise InputError(f'{config_file} exists already; choose a folder for each model, or --force to replace it')
    checkpoint = read_checkpoint(args.src)
    contents = parse(unwrap(checkpoint, args.prefix or ''))
    if args.inspect:
        wrapped = {'state_dict', 'model'} & set(checkpoint)
        beside = sorted(str(key) for key in checkpoint if key not in wrapped) if wrapped else []
        show(args.src, {**about_file(args.src), **about_model(contents), 'beside the weights': ', '.join(beside)})
        return
    stages = len(contents.variant.depths)
    windows = args.window and (args.window * stages if len(args.window) == 1 else args.window)
    if windows and len(windows) != stages:
        raise InputError(f'--window takes 1 or {stages} numbers, one per stage')
    result, dropped = convert(contents, args.to, windows)
    if args.dst.suffix == '.safetensors':
        result = {key: value for key, value in unwrap(result).items() if isinstance(value, Tensor)}
    config = transformers_config(contents, windows) if config_file else {}
    write_checkpoint(result, args.dst, args.force)
    if config_file:
        with atomic_write(config_file) as part:
            part.write_text(json.dumps(config, indent=2) + '\n')
    notes = {f'left out: {why}': f'{count} tensors' for why, count in Counter(dropped.values()).items()}
    if None in contents.windows() and not windows:
        notes['left out: position tables'] = 'SRC does not store its window; give --window to write them'
    names = {'from': contents.naming.name, 'to': args.to, 'model': str(contents.variant)}
    notes |= {'config': str(config_file)} if config_file else {}
    show(str(args.dst), names | {'tensors': str(len(unwrap(result)))} | notes | about_file(str(args.dst)))


def about_file(source: str) -> dict[str, str]:
    """Size and SHA-256, compared with the hash that the file's name carries, if any."""
    digest = hashlib.sha256()
    with fetch(source) as path, path.open('rb') as file:
        while block := file.read(1 << 20):
            digest.update(block)
        promised = promised_hash(path.name)
        agrees = promised is None or digest.hexdigest().startswith(promised)
        note = '' if agrees else f' (NOT {promised} as the name says: damaged, or changed since)'
        return {'size': f'{path.stat().st_size:,} bytes', 'SHA-256': digest.hexdigest() + note}


def about_model(contents: Contents) -> dict[str, str]:
    """What the weights are, judging by names and shapes."""
    variant, state = contents.variant, contents.state
    windows = contents.windows()
    sizes = [size and size[0] for size in windows]
    window = 'not in the file' if None in sizes else str(sizes[0] if len({*sizes}) == 1 else tuple(sizes))
    head = state.get('head.weight')
    norms = sorted({key.partition('.')[0] for key in state if re.fullmatch(OUTPUT_NORMS, key)})
    parameters = sum(value.numel() for key, value in state.items() if meaning(key, CLASSIFIER) is None)
    sizes_given = {name: getattr(variant, name) for name in ('embed_dims', 'depths', 'num_heads')}
    size = f'arch={variant.arch!r}' if variant.arch else ', '.join(f'{k}={v!r}' for k, v in sizes_given.items())
    size += '' if variant.in_channels == 3 else f', in_channels={variant.in_channels}'
    if variant.patch != 4:
        size += f', patch_size={variant.patch}, strides={(variant.patch, *[2] * (len(variant.depths) - 1))}'
    arguments = '' if None in sizes else f', window_size={window}'
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


def printable(text: str) -> str:
    """Text that can be printed, whatever the name of a file or the terminal's encoding."""
    encoding = sys.stdout.encoding or 'utf-8'
    return os.fsencode(text).decode('utf-8', 'backslashreplace').encode(encoding, 'backslashreplace').decode(encoding)


def show(title: str, rows: dict[str, str]) -> None:
    """Print names and values in two columns; bytes of file names that are not text are escaped."""
    width = max(map(len, rows))
    title, rows = printable(title), {name: printable(value) for name, value in rows.items()}
    print(title, *(f'  {name:{width}}  {value}' for name, value in rows.items() if value), sep='\n')


if __name__ == '__main__':
    args = parse_args()
    sys.exit(run(main, args))
