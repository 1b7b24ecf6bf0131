"""Size of a model: parameters and multiply-adds of its parts, shapes of its stages, memory for training.

  python tools/model_info.py configs/mask_rcnn/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py --size 1333x800 --batch 2
  python tools/model_info.py configs/mask_rcnn/*.py --markdown

needs neither weights nor data nor a GPU: the model has shapes but no values.

GMAC: 10^9 multiply-adds to predict on one image, of convolutions, linear layers and matrix products, including
attention on padded tokens. Not counted: norms, activations, interpolation, box selection, RoIAlign, and projections of
padded tokens, which this backbone does not compute and published counts include. The second stage of a detector is
counted on 1000 boxes and 100 masks. Heads used in training only count as zero.

MiB kept: tensors of the backbone, without its weights, that autograd saves for the backward pass of a training step of
one batch in float32. The reference kernel saves the attention scores, the Triton kernel for GPUs does not. Weights,
gradients, optimizer state, neck, heads and temporary buffers come on top.
"""

import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections import Counter
from pathlib import Path

from rich import box
from rich.console import Console
from rich.markup import escape
from rich.table import Table

from swin_mm import cli
from swin_mm.analysis import complexity
from swin_mm.analysis.complexity import StageShape
from swin_mm.models.swin import SwinPyramid
from swin_mm.utils.errors import InputError


def parse_args() -> Namespace:
    """Read the command line."""
    parser = cli.parser(__doc__, runner=False, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('more', nargs='*', help='more config files')
    parser.add_argument(
        '--size', metavar='WxH', help='size of the image (default: 1280x800; the test size of a segmentor)'
    )
    parser.add_argument('--batch', type=int, default=1, metavar='N', help='images in a training step (default: 1)')
    parser.add_argument('--markdown', action='store_true', help='one row per config of a table in Markdown')
    return parser.parse_args()


def main(args: Namespace) -> None:
    """Print the tables."""
    if args.batch < 1:
        raise InputError(f'--batch {args.batch}: expected at least 1')
    size, console = cli.parse_size('--size', args.size, 'x', least=1), Console(markup=False, highlight=False)
    if args.markdown:
        print('| config | parameters | GMAC | image |\n| --- | --- | --- | --- |')
    for path in (args.config, *args.more):
        cfg, name = cli.read_config(Namespace(**vars(args) | {'config': path})), Path(path).stem
        width, height = size or complexity.default_size(cfg)
        with console.status(escape(f'counting {path}')):
            model, macs = complexity.build(cfg), complexity.multiply_adds(cfg, width, height)
        parameters = complexity.count_parameters(model)
        if args.markdown:
            total = sum(parameters.values())
            print(f'| {name} | {total:,} | {sum(macs.values()) / 1e9:.2f} | {width} × {height} |')
            continue
        swin = isinstance(model.backbone, SwinPyramid)
        kernels = complexity.KERNELS if swin else {}
        kept = {k: complexity.activation_bytes(cfg, width, height, args.batch, fn) for k, fn in kernels.items()}
        batch = f'; kept with a batch of {args.batch}' if swin else ''
        console.print(f'\n{name}, image of {width} × {height}{batch}')
        console.print(table_of_parts(parameters, macs, kept))
        if swin:
            console.print('Stages, sizes as height×width')
            console.print(table_of_stages(complexity.stage_shapes(model.backbone, width, height)))


def table_of_parts(parameters: Counter[str], macs: Counter[str], kept: dict[str, Counter[str]]) -> Table:
    """Parameters, multiply-adds and saved bytes by part; parts without any of these are left out."""
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True)
    table.add_column('part', no_wrap=True)
    for title in ('parameters', 'GMAC', *(f'MiB kept,\n{kernel}' for kernel in kept)):
        table.add_column(title, justify='right')

    def add(name: str, numbers: list[int]) -> None:
        count, work, *memory = numbers
        cells = [f'{count:,}', f'{work / 1e9:.2f}', *(f'{size / 2**20:,.1f}' for size in memory)]
        table.add_row(name, *(cell if number else '' for cell, number in zip(cells, numbers, strict=True)))

    columns = [parameters, macs, *kept.values()]
    for name in parameters:
        if any(numbers := [column[name] for column in columns]):
            add(name, numbers)
    table.add_section()
    add('total', [sum(column.values()) for column in columns])
    return table


def table_of_stages(stages: list[StageShape]) -> Table:
    """One row per stage."""
    titles = ('stage', 'blocks', 'channels', 'heads', 'map', 'window', 'shift', 'padded', 'windows')
    table = Table(*titles, box=box.SIMPLE_HEAD, collapse_padding=True)
    for number, stage in enumerate(stages):
        table.add_row(*(f'{c[0]}×{c[1]}' if isinstance(c, tuple) else str(c) for c in (number, *stage)))
    return table


if __name__ == '__main__':
    sys.exit(cli.run(main, parse_args()))
