"""Export of a backbone or a whole model to a file that runs without this project, compared with PyTorch."""

import copy
import io
import logging
import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from itertools import chain
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram
from torch.fx import GraphModule

from swin_mm.analysis.substitution import replace_modules
from swin_mm.checkpoints import unwrap, write_checkpoint
from swin_mm.engine.runner import load_complete
from swin_mm.models.swin import SwinPyramid
from swin_mm.openmmlab.config import build_model
from swin_mm.openmmlab.loading import read_checkpoint
from swin_mm.utils.errors import InputError, one_line
from swin_mm.utils.files import atomic_write

SUFFIXES = {'torch.export': '.pt2', 'onnx': '.onnx', 'torchscript': '.pt', 'safetensors': '.safetensors'}
PARTS = ('backbone', 'model')
# (batch, height, width) to compare at: multiples of windows, of patches, of neither, one window, both orientations.
SIZES = ((1, 224, 224), (2, 256, 192), (1, 97, 131), (3, 28, 28), (2, 333, 250), (1, 800, 1333))
TOLERANCE = 1e-4  # largest difference over largest magnitude of an output
OPSET, OPSETS = 20, range(18, 24)  # default; those that both PyTorch's exporter and onnxruntime support
RUN_OPTIONS = ('compile', 'attention')  # arguments of the backbone that do not concern a file
Run = Callable[[Tensor], Iterable[Tensor]]


class Difference(NamedTuple):
    """How far one output of the file is from PyTorch's on one batch of images.

    Args:
        images: shape of the batch.
        output: name of the output.
        shape: shape of PyTorch's output.
        largest: largest magnitude in PyTorch's output.
        difference: largest absolute difference; infinite where shapes differ or the file does not run.
        error: why the file does not run, or nothing.
    """

    images: tuple[int, ...]
    output: str
    shape: tuple[int, ...]
    largest: float
    difference: float
    error: str = ''

    @property
    def relative(self) -> float:
        """The difference over the largest magnitude; infinite instead of NaN."""
        relative = self.difference / (self.largest or 1)
        return math.inf if math.isnan(relative) else relative

    @property
    def within_tolerance(self) -> bool:
        """Whether the difference is within ``TOLERANCE``."""
        return self.relative <= TOLERANCE


class ExportDiffersError(RuntimeError):
    """The outputs of the exported file differ from PyTorch's. The file was not written; see ``differences``."""

    def __init__(self, message: str, differences: list[Difference]) -> None:
        super().__init__(message)
        self.differences = differences


class Exportable(nn.Module):
    """The module that is exported: images (B, channels, H, W) to a tuple of tensors.

    Args:
        model: a model, or a backbone.
        part: 'backbone' if ``model`` is one; else 'model'.

    Raises:
        InputError: the model has two stages.
    """

    def __init__(self, model: nn.Module, part: str) -> None:
        super().__init__()
        if part == 'model' and getattr(model, 'with_roi_head', False):
            # torch.export: Could not guard on data-dependent expression Eq(u0, 1); u0 is how many boxes were chosen.
            raise InputError(
                f'--part model: {type(model).__name__} selects boxes between its two stages, and their number depends '
                'on the image, which a graph cannot express; --part backbone works'
            )
        self.model: Any = model  # its methods depend on its kind
        self.is_backbone = part == 'backbone'

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """The backbone's maps, a segmentor's logits, or a detector's maps before boxes are selected."""
        if self.is_backbone:
            outputs = self.model(image)
        elif hasattr(self.model, 'encode_decode'):
            outputs = self.model.encode_decode(image, [{'img_shape': image.shape[2:]}])
        else:
            outputs = self.model(image, mode='tensor')
        return tuple(_flatten(outputs))

    def output_names(self, count: int) -> list[str]:
        """The names of ``count`` outputs."""
        if self.is_backbone:
            return [f'stage{i}' for i in getattr(self.model, 'out_indices', range(count))]
        return ['logits'] if count == 1 else [f'output{i}' for i in range(count)]


def _flatten(outputs: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts, in their order."""
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    if not isinstance(outputs, tuple | list):
        yield outputs
        return
    for output in outputs:
        yield from _flatten(output)


class OnnxAdaptivePool(nn.Module):
    """Adaptive average pooling as matrix products: PyTorch's ONNX exporter gets it wrong for dynamic sizes."""

    def __init__(self, pool: nn.AdaptiveAvgPool2d) -> None:
        super().__init__()
        self.output_size = pool.output_size if isinstance(pool.output_size, tuple) else (pool.output_size,) * 2

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, *output_size)."""
        for count in reversed(self.output_size):  # the last axis, then the one before it, transposed to be the last
            size = x.shape[3]
            count = size if count is None else count
            cell, at = torch.arange(count, device=x.device)[:, None], torch.arange(size, device=x.device)
            inside = ((at >= cell * size // count) & (at < ((cell + 1) * size + count - 1) // count)).to(x.dtype)
            rows = x.clone(memory_format=torch.contiguous_format).flatten(0, 2)
            x = (rows @ (inside / inside.sum(1, keepdim=True)).T).view(*x.shape[:3], count).transpose(2, 3)
        return x


def check_arguments(to: str, out: Path, size: tuple[int, int] | None, opset: int | None, force: bool) -> None:
    """Check the arguments of :func:`export` before anything is built.

    Raises:
        InputError: they do not fit together, or the file cannot be written.
    """
    suffix = SUFFIXES[to]
    if out.suffix != suffix:
        raise InputError(f'--out {out} must end in {suffix}, since --to is {to}')
    if not out.parent.is_dir():
        raise InputError(f'--out {out}: the folder {out.parent} does not exist; make it first')
    if out.exists() and not (force and out.is_file()):
        raise InputError(f'--out {out} exists; choose another name, or --force to replace a file')
    if to == 'onnx':
        try:
            import onnxruntime  # noqa: F401
            import onnxscript  # noqa: F401
        except ImportError as error:
            raise InputError(f'--to onnx: {error}; pip install onnx onnxscript onnxruntime') from error
    if opset is not None and (to != 'onnx' or opset not in OPSETS):
        raise InputError(f'--opset {opset}: expected {OPSETS[0]} to {OPSETS[-1]}, for --to onnx only')
    if size is not None and to == 'safetensors':
        raise InputError('--size: safetensors holds weights only, for every size; leave --size out')
    if size is None and to == 'torchscript':
        raise InputError('--to torchscript traces one size of image: give it with --size WxH')


def export(
    cfg: Config,
    checkpoint: str,
    to: str,
    out: Path,
    part: str = 'backbone',
    size: tuple[int, int] | None = None,
    opset: int | None = None,
    force: bool = False,
) -> list[Difference]:
    """Export a model and compare the file with PyTorch; it is written only if the two agree.

    Args:
        cfg: the config.
        checkpoint: its weights, a file or an address.
        to: the format, a key of ``SUFFIXES``.
        out: the file to write.
        part: one of ``PARTS``.
        size: (width, height) to fix; None keeps height and width dynamic.
        opset: of ONNX; None for ``OPSET``.
        force: replace an existing file.

    Returns:
        The comparison, one entry per batch of images and output; empty for safetensors.

    Raises:
        InputError: arguments do not fit together, the format cannot take the model, or the file cannot be written.
        CheckpointError: the checkpoint cannot be read, or does not cover the model.
        ExportDiffersError: the file does not agree with PyTorch.
    """
    check_arguments(to, out, size, opset, force)
    model = build(cfg, checkpoint, part)
    if to == 'safetensors':
        write_checkpoint({key: value.contiguous() for key, value in model.state_dict().items()}, out, force)
        return []
    exportable = Exportable(model, part)
    least: int | None = None
    if size:
        shapes = [(batch, size[1], size[0]) for batch in (1, 2)]
    else:
        least = smallest_side(model)
        shapes = [(batch, max(height, least), max(width, least)) for batch, height, width in SIZES]
    channels = next(module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))
    images = [torch.randn(batch, channels, *sides) for batch, *sides in shapes]
    with torch.no_grad(), atomic_write(out) as file:
        with warnings.catch_warnings():
            warnings.simplefilter('ignore')  # exporters warn about themselves
            try:
                run = WRITERS[to](exportable, images[1], least, file, opset)
            except OSError:
                raise
            except Exception as error:
                hint = '' if part == 'backbone' else '; --part backbone may work'
                raise InputError(
                    f'{to} cannot export the {part} of {cfg.filename}: {root_cause(error)} (--debug shows where){hint}'
                ) from error
        differences = compare(exportable, run, images)
        if not all(each.within_tolerance for each in differences):
            worst = max(each.relative for each in differences)
            raise ExportDiffersError(f'{to} differs from PyTorch by {worst:.1e}; {out} is not written', differences)
    return differences


def build(cfg: Config, checkpoint: str, part: str) -> nn.Module:
    """Build the model or its backbone with weights, in evaluation mode.

    Raises:
        InputError: the config has no such model.
        CheckpointError: the checkpoint cannot be read, or does not cover the model.
    """
    content = read_checkpoint(checkpoint)
    if 'backbone' not in cfg.get('model', ()):
        raise InputError(f'{cfg.filename} has no model with a backbone')
    for option in RUN_OPTIONS:
        cfg.model.backbone.pop(option, None)
    model = build_model(cfg, cfg.model.backbone if part == 'backbone' else cfg.model)
    load_complete(model, _weights_of(content, 'backbone.' if part == 'backbone' else ''), checkpoint)
    model.eval()  # returns None in some libraries
    return model


def _weights_of(content: Any, prefix: str) -> dict[str, Any]:
    """The state dict of a checkpoint: its entries under a prefix if there are any, else all."""
    state = {re.sub(r'^module\.', '', key): value for key, value in unwrap(content).items()}  # saved from DDP
    return {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)} or state


def smallest_side(model: nn.Module) -> int:
    """The smallest image side, in pixels, that a graph with dynamic sizes supports.

    Without ``pad_small_map``, windows shrink to maps that are no larger than the window, which a graph cannot express.
    """
    backbone, least = getattr(model, 'backbone', model), 1
    if isinstance(backbone, SwinPyramid):
        stride = backbone.patch_embed.proj.stride[0]
        stages: Any = backbone.layers  # nn.ModuleList does not know the type of its items
        for stage in stages:
            if not stage.blocks[0].pad_small_map:
                least = max(least, stride * max(stage.blocks[0].attn.window) + 1)
            stride *= stage.downsample.stride if stage.downsample else 1
    return least


def without_special_sizes() -> AbstractContextManager:
    """Keep torch.export from treating batches and sizes of 1 as special cases.

    The setting is private. Where it is missing, the export continues without it, and the comparison shows whether
    the file supports such sizes.
    """
    settings: Any = getattr(torch.fx.experimental, '_config', None)
    return settings.patch(backed_size_oblivious=True) if hasattr(settings, 'backed_size_oblivious') else nullcontext()


def to_graph(exportable: Exportable, image: Tensor, least: int | None) -> ExportedProgram:
    """Trace the graph of operators, without paths of source files.

    Args:
        exportable: what to trace.
        image: an example.
        least: smallest side of an image; None fixes height and width.
    """
    sides = {} if least is None else {2: Dim('height', min=least), 3: Dim('width', min=least)}
    with without_special_sizes():
        program = torch.export.export(exportable, (image,), dynamic_shapes=({0: Dim('batch', min=1), **sides},))
    graphs = (module.graph for module in program.graph_module.modules() if isinstance(module, GraphModule))
    for node in chain.from_iterable(graph.nodes for graph in graphs):
        node.meta.pop('stack_trace', None)
        node.meta.pop('nn_module_stack', None)
    return program


def write_graph(exportable: Exportable, image: Tensor, least: int | None, file: Path, opset: int | None) -> Run:
    """Write a torch.export file and load it again."""
    program = to_graph(exportable, image, least)
    program.example_inputs = None
    buffer = io.BytesIO()  # PyTorch's own writer reports a full disk as a RuntimeError
    torch.export.save(program, buffer)
    file.write_bytes(buffer.getvalue())
    return torch.export.load(file).module()


def write_onnx(exportable: Exportable, image: Tensor, least: int | None, file: Path, opset: int | None) -> Run:
    """Write an ONNX file and load it into onnxruntime."""
    import onnxruntime

    exportable = copy.deepcopy(exportable)
    replace_modules(exportable, nn.AdaptiveAvgPool2d, OnnxAdaptivePool)
    program = to_graph(exportable, image, least)
    sides = {} if least is None else {2: 'height', 3: 'width'}
    with _quiet('torch.onnx'):
        onnx_program = torch.onnx.export(
            program,
            input_names=['image'],
            output_names=exportable.output_names(len(program.graph_signature.user_outputs)),
            opset_version=opset or OPSET,
            dynamic_shapes=({0: 'batch', **sides},),
            dynamo=True,
            verbose=False,
        )
    assert onnx_program is not None  # with dynamo=True
    for node in onnx_program.model.graph:
        node.metadata_props.clear()  # paths of source files
    onnx_program.save(file, external_data=False)
    session = onnxruntime.InferenceSession(file, providers=['CPUExecutionProvider'])
    return lambda image: map(torch.from_numpy, session.run(None, {'image': image.numpy()}))


def write_torchscript(exportable: Exportable, image: Tensor, least: int | None, file: Path, opset: int | None) -> Run:
    """Write a TorchScript file of one size and load it again."""
    buffer = io.BytesIO()
    torch.jit.save(torch.jit.trace(exportable, image, check_trace=False), buffer)
    file.write_bytes(buffer.getvalue())
    return torch.jit.load(str(file))


WRITERS: dict[str, Callable[..., Run]] = {
    'torch.export': write_graph,
    'onnx': write_onnx,
    'torchscript': write_torchscript,
}


def compare(exportable: Exportable, run: Run, images: list[Tensor]) -> list[Difference]:
    """Run the file and the model on each batch of images."""
    differences = []
    for image in images:
        expected, error = exportable(image), ''
        try:
            actual: list[Any] = list(run(image))
            if len(actual) != len(expected):
                error = f'{len(actual)} outputs instead of {len(expected)}'
        except Exception as failure:  # runtimes raise many kinds
            error = root_cause(failure)
        for i, (name, e) in enumerate(zip(exportable.output_names(len(expected)), expected, strict=True)):
            same_shape = not error and actual[i].shape == e.shape
            difference = (actual[i] - e).abs().max().item() if same_shape else math.inf
            differences.append(
                Difference(tuple(image.shape), name, tuple(e.shape), e.abs().max().item(), difference, error)
            )
    return differences


def root_cause(error: BaseException) -> str:
    """The first error in the chain, in one line of at most 300 characters."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error)[:300]


@contextmanager
def _quiet(logger: str) -> Iterator[None]:
    """Suppress log records below ERROR."""
    level = logging.getLogger(logger).level
    logging.getLogger(logger).setLevel(logging.ERROR)
    try:
        yield
    finally:
        logging.getLogger(logger).setLevel(level)
