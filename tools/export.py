"""Export a model for use without this project, and compare the file with PyTorch.

  python tools/export.py CONFIG CHECKPOINT --to onnx
  python tools/export.py CONFIG CHECKPOINT --to openvino --preprocess --out detector.xml
  python tools/export.py CONFIG CHECKPOINT --to pt2 --part backbone --out swin.pt2

The file takes images and returns final labels, or boxes, scores, labels and masks. Batch, height and width of the
images stay dynamic, unless --size fixes height and width. Without --preprocess the file takes what the config's
data_preprocessor gives: float32, (batch, channels, height, width), normalised and padded; with it, RGB images of uint8.
With --resize the file also resizes.
The file is run on images of the config's test set, or those of --images, at several sizes, and written only if it
predicts what the model predicts. See docs/export.md for more.
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
from swin_mm.analysis.export import (
    OPSET,
    OPSETS,
    PARTS,
    SUFFIXES,
    TOLERANCES,
    Difference,
    ExportDiffersError,
    export,
)
from swin_mm.analysis.prediction import find_inputs


def parse_args() -> Namespace:
    """Read the command line."""
    parser = cli.parser(__doc__, runner=False, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--to', choices=SUFFIXES, required=True, help='format of the file')
    parser.add_argument(
        '--out',
        type=Path,
        metavar='FILE',
        help=f'ends in {", ".join(dict.fromkeys(SUFFIXES.values()))} (default: named after the config, in this folder)',
    )
    parser.add_argument(
        '--part',
        choices=PARTS,
        default='predictions',
        help='predictions: labels of a segmentor, or boxes and masks of a detector; model: logits of a segmentor, or '
        'the maps of a one-stage detector before boxes are selected (default: predictions)',
    )
    parser.add_argument(
        '--preprocess', action='store_true', help='let the file normalise and pad: it then takes RGB images of uint8'
    )
    parser.add_argument(
        '--resize',
        action='store_true',
        help="let the file also resize, to the scale of the config's test pipeline: it then takes RGB images of any "
        'size, and its predictions are in pixels of them',
    )
    parser.add_argument('--size', metavar='WxH', help='fix width and height of the images; torchscript needs it')
    parser.add_argument(
        '--opset', type=int, metavar='N', help=f'of ONNX, {OPSETS[0]} to {OPSETS[-1]} (default: {OPSET})'
    )
    parser.add_argument(
        '--images', nargs='+', default=[], metavar='IMAGE', help="compare on these (default: of the config's test set)"
    )
    parser.add_argument(
        '--metrics', action='store_true', help="also compare the metrics on the config's test set, all of it"
    )
    parser.add_argument('--force', action='store_true', help='replace FILE if it exists')
    return parser.parse_args()


def main(args: Namespace) -> None:
    """Export, compare and print the comparison."""
    console = Console(markup=False, highlight=False)
    size = cli.parse_size('--size', args.size, 'x', least=1)
    out = args.out or Path(Path(args.config).stem + SUFFIXES[args.to])
    images = find_inputs(args.images) if args.images else []
    cfg = cli.read_config(args)
    if args.part != 'backbone' and (cfg.get('model', {}).get('test_cfg') or {}).get('mode') == 'slide':
        console.print('warning: the config tests by sliding windows; the file takes, and is compared on, whole images')
    try:
        with console.status(f'exporting to {args.to}'):
            differences = export(
                cfg,
                args.checkpoint,
                args.to,
                out,
                part=args.part,
                size=size,
                opset=args.opset,
                force=args.force,
                preprocess=args.preprocess,
                resize=args.resize,
                images=images,
                metrics=args.metrics,
            )
    except ExportDiffersError as error:
        show(error.differences, args.to, console)
        sys.exit(f'error: {error}')
    if differences:
        show(differences, args.to, console)
    console.print(f'{out}: {out.stat().st_size:,} bytes', soft_wrap=True)


def show(differences: list[Difference], to: str, console: Console) -> None:
    """Print how far the file is from PyTorch, for each batch of images and output."""
    table = Table('images', 'output', 'shape', 'measure', 'value', 'accepted', title=f'{to} against PyTorch')
    for images, rows in groupby(differences, lambda each: each.images):
        for row in rows:
            if row.error:
                console.print(f'{times(images)} fails: {row.error}', style='red')
            value = Text(f'{row.value:.1e}', 'green' if row.within_tolerance else 'red')
            accepted = f'{TOLERANCES[row.measure]:.0e}'
            table.add_row(times(images), row.output, times(row.shape), row.measure, value, accepted)
        table.add_section()
    console.print(table)
    objects = [each for each in differences if each.output == 'scores']
    if objects and not any(sum(each.shape) for each in objects):
        console.print('warning: no object in these images, so nothing was compared; give --images with objects')


def times(shape: Sequence[int]) -> str:
    """A shape such as 1×3×224×224."""
    return '×'.join(map(str, shape))


if __name__ == '__main__':
    sys.exit(cli.run(main, parse_args()))
