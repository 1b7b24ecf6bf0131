"""Export a backbone or a whole model for use without this project, and compare the file with PyTorch.

  python tools/export.py CONFIG CHECKPOINT --to onnx --out swin.onnx
  python tools/export.py CONFIG CHECKPOINT --to torch.export --part model --out segmentor.pt2

Number, height and width of the images stay open, unless --size fixes height and width. The file takes what the config's
data_preprocessor gives: float32, (batch, channels, height, width), normalised. It is run at several sizes and appears
only if it gives what the model gives. docs/export.md tells more.
"""

import logging
import sys
import warnings
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Iterable
from itertools import chain
from math import inf
from pathlib import Path
from unittest import mock

import torch
from mmengine.config import Config
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule
from torch.utils import _pytree as pytree

import swin_mm  # noqa: F401 (registers the backbones)
from swin_mm import cli
from swin_mm.checkpoints import unwrap, write_checkpoint
from swin_mm.models.swin import SwinPyramid
from swin_mm.openmmlab.config import build_model
from swin_mm.openmmlab.loading import read_checkpoint
from swin_mm.utils.errors import InputError
from swin_mm.utils.files import atomic_write

FORMATS = {'torch.export': '.pt2', 'onnx': '.onnx', 'torchscript': '.pt', 'safetensors': '.safetensors'}
# Batch, height and width to compare at: multiples of windows, of patches, of neither, one window, upright and lying.
SIZES = ((1, 224, 224), (2, 256, 192), (1, 97, 131), (3, 28, 28), (2, 333, 250), (1, 800, 1333))
TOLERANCE = 1e-4  # largest difference over largest magnitude of an output
OPSET, OPSETS = 20, range(18, 24)  # default; what both PyTorch's exporter and onnxruntime know
Run = Callable[[Tensor], Iterable[Tensor]]


def parse_args() -> Namespace:
    """Read the command line."""
    parser = cli.parser(__doc__, runner=False, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--to', choices=FORMATS, required=True, help='what to write')
    parser.add_argument(
        '--out', type=Path, required=True, metavar='FILE', help=f'ends in {", ".join(FORMATS.values())}'
    )
    parser.add_argument(
        '--part',
        choices=['backbone', 'model'],
        default='backbone',
        help='model: logits of a segmentor, or the maps of a one-stage detector before boxes are chosen '
        '(default: backbone)',
    )
    parser.add_argument('--size', metavar='WxH', help='fix the images to this width and height; torchscript needs it')
    parser.add_argument(
        '--opset', type=int, metavar='N', help=f'of ONNX, {OPSETS[0]} to {OPSETS[-1]} (default: {OPSET})'
    )
    parser.add_argument('--force', action='store_true', help='replace FILE if it exists')
    return parser.parse_args()


def main(args: Namespace) -> None:
    """Export and compare."""
    size = check(args)
    cfg = cli.read_config(args)
    model = build(cfg, args.checkpoint, args.part)
    if args.to == 'safetensors':
        state = {key: value.contiguous() for key, value in model.state_dict().items()}
        write_checkpoint(state, args.out, args.force)
        print(f'{args.out}: {len(state)} tensors, {args.out.stat().st_size:,} bytes')
        return
    part = Part(model, args.part)
    if size:
        sizes = [(batch, *size) for batch in (1, 2)]
    else:
        least = smallest(model)
        sizes = [(batch, max(height, least), max(width, least)) for batch, height, width in SIZES]
    channels = next(module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))
    images = [torch.randn(batch, channels, *sides) for batch, *sides in sizes]

    console = Console()
    with torch.no_grad(), atomic_write(args.out) as file:
        with console.status(f'exporting to {args.to}'), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # of the exporters, about themselves
            try:
                run = WRITERS[args.to](part, images[1], None if size else least, file, args.opset)
            except Exception as error:
                raise InputError(
                    f'{args.to} cannot take the {args.part} of {args.config}: {reason(error)} '
                    '(--debug shows where)' + ('' if args.part == 'backbone' else '; --part backbone may do')
                ) from error
        with console.status('comparing'):
            worst = compare(part, run, images, f'{args.to} against PyTorch', console)
        if not worst <= TOLERANCE:  # nan, too
            raise SystemExit(f'error: {args.to} differs from PyTorch by {worst:.1e}; {args.out} is not written')
    console.print(f'{args.out}: {args.out.stat().st_size:,} bytes', highlight=False)


def check(args: Namespace) -> tuple[int, int] | None:
    """Object to arguments before anything is built; height and width that are asked for.

    Raises:
        InputError: they do not fit together, or the file cannot be written.
    """
    out, suffix = args.out, FORMATS[args.to]
    if out.suffix != suffix:
        raise InputError(f'--out {out} must end in {suffix}, since --to is {args.to}')
    if not out.parent.is_dir():
        raise InputError(f'--out {out}: the folder {out.parent} does not exist; make it first')
    if out.exists() and not (args.force and out.is_file()):
        raise InputError(f'--out {out} exists; choose another name, or --force to replace a file')
    if args.to == 'onnx':
        try:
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise InputError(f'--to onnx: {error}; pip install onnx onnxscript onnxruntime') from error
    if args.opset is not None and (args.to != 'onnx' or args.opset not in OPSETS):
        raise InputError(f'--opset {args.opset}: of ONNX, {OPSETS[0]} to {OPSETS[-1]}')
    if args.size is not None and args.to == 'safetensors':
        raise InputError('--size: safetensors holds weights alone, which serve every size; leave --size out')
    if args.size is None and args.to == 'torchscript':
        raise InputError('--to torchscript traces one size of image: give it with --size WxH')
    size = cli.parse_size('--size', args.size, 'x', least=1)
    return size and size[::-1]


def build(cfg: Config, checkpoint: str, part: str) -> nn.Module:
    """The model or its backbone, with weights.

    Raises:
        InputError: the config has no such model, or the checkpoint is not one of it.
        CheckpointError: the checkpoint cannot be read.
    """
    state = unwrap(read_checkpoint(checkpoint))
    if part == 'backbone':  # ours finds its weights by itself, others do not
        state = {k.removeprefix('backbone.'): v for k, v in state.items() if k.startswith('backbone.')} or state
    if 'backbone' not in cfg.get('model', ()):
        raise InputError(f'{cfg.filename} has no model with a backbone')
    for how_to_run in ('compile', 'cuda_graphs', 'attention'):
        cfg.model.backbone.pop(how_to_run, None)
    model = build_model(cfg, cfg.model.backbone if part == 'backbone' else cfg.model)
    try:
        absent = model.load_state_dict(state, strict=part == 'backbone').missing_keys
    except RuntimeError as error:
        raise InputError(
            f'{checkpoint} is not a checkpoint of {cfg.filename}: {" ".join(str(error).split())}'
        ) from error
    if absent:
        raise InputError(
            f'{checkpoint} is not a checkpoint of {cfg.filename}: {len(absent)} weights are not there, '
            f'the first is {absent[0]}'
        )
    model.eval()  # returns nothing in some libraries
    return model


class Part(nn.Module):
    """What is exported: images (B, channels, H, W) to tensors, which have names."""

    def __init__(self, model: nn.Module, part: str) -> None:
        """Take a model or its backbone.

        Raises:
            InputError: the model has two stages.
        """
        super().__init__()
        if part == 'model' and getattr(model, 'with_roi_head', False):
            # torch.export: Could not guard on data-dependent expression Eq(u0, 1); u0 is how many boxes were chosen.
            raise InputError(
                f'--part model: {type(model).__name__} chooses boxes between its two stages, and their number depends '
                'on the image, which a graph cannot; --part backbone works'
            )
        self.model = model
        self.backbone_alone = part == 'backbone'

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """The backbone's maps, or what the model gives before it chooses boxes."""
        if self.backbone_alone:
            outputs = self.model(image)
        elif hasattr(self.model, 'encode_decode'):
            outputs = self.model.encode_decode(image, [{'img_shape': image.shape[2:]}])
        else:
            outputs = self.model(image, mode='tensor')
        return tuple(pytree.tree_leaves(outputs))

    def names(self, count: int) -> list[str]:
        """What the outputs are called."""
        if self.backbone_alone:
            return [f'stage{i}' for i in getattr(self.model, 'out_indices', range(count))]
        return ['logits'] if count == 1 else [f'output{i}' for i in range(count)]


def smallest(model: nn.Module) -> int:
    """The smallest side of an image that a graph for all sizes serves.

    Without ``pad_small_map`` windows shrink with a map that is no larger than they are, which a graph cannot.
    """
    backbone, least = getattr(model, 'backbone', model), 1
    if isinstance(backbone, SwinPyramid):
        stride = backbone.patch_embed.patch[0]
        for stage in backbone.layers:
            if not stage.blocks[0].pad_small_map:
                least = max(least, stride * max(stage.blocks[0].attn.window) + 1)
            stride *= stage.downsample.stride if stage.downsample else 1
    return least


def to_graph(part: Part, image: Tensor, least: int | None) -> ExportedProgram:
    """The operators of a part. ``least`` is the smallest side of an image, or None to fix height and width."""
    sides = {} if least is None else {2: Dim('height', min=least), 3: Dim('width', min=least)}
    # Or else sizes of 1 and batches of 1 would be cases of their own.
    with torch.fx.experimental._config.patch(backed_size_oblivious=True):
        program = torch.export.export(part, (image,), dynamic_shapes=({0: Dim('batch', min=1), **sides},))
    graphs = (module.graph for module in program.graph_module.modules() if isinstance(module, GraphModule))
    for node in chain.from_iterable(graph.nodes for graph in graphs):
        node.meta.pop('stack_trace', None)  # paths on this machine
        node.meta.pop('nn_module_stack', None)
    return program


def write_graph(part: Part, image: Tensor, least: int | None, file: Path, opset: int | None) -> Run:
    """torch.export."""
    program = to_graph(part, image, least)
    program.example_inputs = None
    torch.export.save(program, file)
    return torch.export.load(file).module()


def write_onnx(part: Part, image: Tensor, least: int | None, file: Path, opset: int | None) -> Run:
    """ONNX."""
    import onnxruntime

    logging.getLogger('torch.onnx').setLevel(logging.ERROR)  # warns of torchvision's absence
    with mock.patch.object(nn.AdaptiveAvgPool2d, 'forward', pool):
        program = to_graph(part, image, least)
    sides = {} if least is None else {2: 'height', 3: 'width'}
    onnx_program = torch.onnx.export(
        program,
        input_names=['image'],
        output_names=part.names(len(program.graph_signature.user_outputs)),
        opset_version=opset or OPSET,
        dynamic_shapes=({0: 'batch', **sides},),
        dynamo=True,
        verbose=False,
    )
    for node in onnx_program.model.graph:
        node.metadata_props.clear()
    onnx_program.save(file, external_data=False)
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    return lambda image: map(torch.from_numpy, session.run(None, {'image': image.numpy()}))


def write_torchscript(part: Part, image: Tensor, least: int | None, file: Path, opset: int | None) -> Run:
    """TorchScript, of one size."""
    torch.jit.trace(part, image, check_trace=False).save(str(file))
    return torch.jit.load(str(file))


WRITERS = {'torch.export': write_graph, 'onnx': write_onnx, 'torchscript': write_torchscript}


def pool(self: nn.AdaptiveAvgPool2d, x: Tensor) -> Tensor:
    """Adaptive pooling as products: PyTorch's exporter to ONNX gets it wrong where sizes are open."""
    height, width = self.output_size if isinstance(self.output_size, tuple) else (self.output_size,) * 2
    for count in (width, height):  # the last axis, and the one before it as the last
        size = x.shape[3]
        cell, at = torch.arange(count, device=x.device)[:, None], torch.arange(size, device=x.device)
        inside = ((at >= cell * size // count) & (at < ((cell + 1) * size + count - 1) // count)).to(x.dtype)
        rows = x.clone(memory_format=torch.contiguous_format).flatten(0, 2)
        x = (rows @ (inside / inside.sum(1, keepdim=True)).T).view(*x.shape[:3], count).transpose(2, 3)
    return x


def compare(part: Part, run: Run, images: list[Tensor], title: str, console: Console) -> float:
    """Print how far the file is from PyTorch, for each size and output; the largest relative difference."""
    table = Table('images', 'output', 'shape', 'largest', 'difference', 'relative', title=title)
    worst = 0.0
    for image in images:
        expected = part(image)
        try:
            actual = list(run(image))
        except Exception as error:
            actual = [torch.empty(0)] * len(expected)
            console.print(f'{shape(image)} fails: {reason(error)}', style='red', markup=False, highlight=False)
        for name, a, e in zip(part.names(len(expected)), actual, expected, strict=True):
            largest = e.abs().max().item()
            difference = (a - e).abs().max().item() if a.shape == e.shape else inf
            relative = difference / (largest or 1)
            colour = 'green' if relative <= TOLERANCE else 'red'
            numbers = f'{largest:.3g}', f'{difference:.1e}', f'[{colour}]{relative:.1e}'
            table.add_row(shape(image), name, shape(e), *numbers)
            worst = max(worst, relative if relative == relative else inf)
        table.add_section()
    console.print(table)
    return worst


def shape(tensor: Tensor) -> str:
    """As people write it."""
    return '×'.join(map(str, tensor.shape))


def reason(error: BaseException) -> str:
    """What first went wrong, in one line."""
    while error.__cause__ is not None:
        error = error.__cause__
    return ' '.join(str(error).split())[:300] or type(error).__name__


if __name__ == '__main__':
    sys.exit(cli.run(main, parse_args()))
