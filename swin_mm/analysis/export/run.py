"""Export of a backbone or a whole model to a file that runs without this project, compared with PyTorch."""

import math
import re
import warnings
from collections.abc import Sequence
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.config import Config
from torch import Tensor, nn

from swin_mm.analysis.export.comparison import LEVELS, TOLERANCES, Difference, compare, root_cause
from swin_mm.analysis.export.formats import LIBRARIES, OPSETS, SUFFIXES, WRITERS, Sides, output_file
from swin_mm.analysis.export.metadata import Metadata, describe_input, names_and_colours, resize_of
from swin_mm.analysis.export.reference import (
    batches,
    find_images,
    noise,
    prepared_images,
    reference_outputs,
    resized,
)
from swin_mm.analysis.export.replacements import class_name
from swin_mm.analysis.export.whole import Exportable, Preprocess, Resize
from swin_mm.checkpoints import unwrap, write_checkpoint
from swin_mm.engine.images import preprocessor_settings, test_pipeline
from swin_mm.engine.runner import load_complete
from swin_mm.models.swin import SwinPyramid
from swin_mm.openmmlab.config import build_model, type_name
from swin_mm.openmmlab.loading import read_checkpoint
from swin_mm.utils.compat import EXPORTS, EXPORTS_ANY_SIZE
from swin_mm.utils.errors import InputError
from swin_mm.utils.files import require_new_file

# (batch, height, width) at which maps are compared on noise: multiples of windows, of patches, of neither, one window,
# both orientations.
SIZES = ((1, 224, 224), (2, 256, 192), (1, 97, 131), (3, 28, 28), (2, 333, 250), (1, 800, 1333))
EXAMPLE = (333, 301)  # height and width of what is traced: every map of a pyramid has several cells
NECKS_OF_MULTIPLES = ('mmdet.CSPNeXtPAFPN',)  # of 32
RUN_OPTIONS = ('compile', 'attention')  # arguments of the backbone that do not concern a file


class ExportDiffersError(RuntimeError):
    """The outputs of the exported file differ from PyTorch's. The file was not written; see ``differences``."""

    def __init__(self, message: str, differences: list[Difference]) -> None:
        super().__init__(message)
        self.differences = differences


def check_arguments(
    to: str, out: Path, size: tuple[int, int] | None, opset: int | None, force: bool, preprocess: bool = False
) -> None:
    """Check the arguments of :func:`export` before anything is built.

    Raises:
        InputError: they do not fit together, or the file cannot be written.
    """
    suffix = SUFFIXES[to]
    if out.suffix != suffix:
        raise InputError(f'--out {out} must end in {suffix}, since --to is {to}')
    for path in (out, out.with_suffix('.bin')) if to == 'openvino' else (out,):
        require_new_file(path, force)
    for library in LIBRARIES.get(to, ()):
        try:
            import_module(library)
        except ImportError as error:
            needed = ' '.join(('onnx', *LIBRARIES[to]))
            raise InputError(f'--to {to}: {error}; pip install {needed}') from error
    if opset is not None and (to not in ('onnx', 'openvino') or opset not in OPSETS):
        raise InputError(f'--opset {opset}: expected {OPSETS[0]} to {OPSETS[-1]}, for --to onnx only')
    if to == 'safetensors' and (size is not None or preprocess):
        option = '--preprocess' if size is None else '--size'
        raise InputError(f'{option}: safetensors holds weights only, for every size; leave {option} out')
    if size is None and to == 'torchscript':
        raise InputError('--to torchscript traces one size of image: give it with --size WxH')
    if to not in ('torchscript', 'safetensors') and not EXPORTS:
        raise InputError(f'--to {to} needs torch 2.8 or later, this is {torch.__version__}; --to torchscript works')


def export(
    cfg: Config,
    checkpoint: str,
    to: str,
    out: Path,
    part: str = 'predictions',
    size: tuple[int, int] | None = None,
    opset: int | None = None,
    force: bool = False,
    preprocess: bool = False,
    resize: bool = False,
    images: Sequence[str | Path] = (),
    metrics: bool = False,
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
        preprocess: let the file normalise and pad; it then takes RGB images of type uint8.
        resize: also let it resize, to the scale of the config's test pipeline; it then takes images of any size, and
            its predictions are in pixels of them. Implies ``preprocess``.
        images: files to compare on; without any, images of the config's test set, or noise if there are none.
        metrics: also compare the config's metrics, on its whole test set.

    Returns:
        The comparison, some entries per batch of images; empty for safetensors.

    Raises:
        InputError: arguments do not fit together, the format cannot take the model, or the file cannot be written.
        CheckpointError: the checkpoint cannot be read, or does not cover the model.
        ExportDiffersError: the file does not agree with PyTorch.
    """
    preprocess = preprocess or resize
    check_arguments(to, out, size, opset, force, preprocess)
    if metrics and (part == 'backbone' or to == 'safetensors' or not cfg.get('test_dataloader')):
        raise InputError('--metrics needs a whole model, whose config has a test set')
    model, meta = build(cfg, checkpoint, part)
    if to == 'safetensors':
        write_checkpoint({key: value.contiguous() for key, value in model.state_dict().items()}, out, force)
        return []
    before = preprocess_module(cfg) if preprocess else None
    first = resize_module(cfg, model) if resize else None
    exportable = Exportable(model, part, before, to in ('onnx', 'openvino'), first).eval()
    part = exportable.part
    channels = next(module.in_channels for module in model.modules() if isinstance(module, nn.Conv2d))
    if preprocess and channels != 3:
        raise InputError(f'--preprocess: the file would take RGB images, but the model takes {channels} channels')
    inputs = Inputs(cfg, model, channels, preprocess, first)
    sides = Sides(1) if resize else Sides(smallest_side(model), side_multiple(model))
    differences: list[Difference] = []
    with torch.no_grad(), output_file(out, to) as file, warnings.catch_warnings():
        warnings.simplefilter('ignore')  # exporters warn about themselves, and mmdet about PyTorch
        pairs = inputs.make(part, size, sides, images)
        try:
            example = pairs[1].image
            names = exportable.output_names(len(exportable(example)))
            if not size:  # torch.export may treat maps of one cell as a special case: have none
                example = example.new_zeros((2, channels, *map(sides.fit, EXAMPLE)))
            metadata = describe(cfg, meta, exportable, names, preprocess)
            run = WRITERS[to](exportable, example, None if size else sides, file, opset, metadata)
        except (OSError, InputError):
            raise
        except Exception as error:
            hint = '' if part == 'backbone' else '; --part backbone may work'
            if not (size or EXPORTS_ANY_SIZE):
                hint = '; before torch 2.13, give the size of the images with --size WxH'
            raise InputError(
                f'{to} cannot export the {part} of {cfg.filename}: {root_cause(error)} (--debug shows where){hint}'
            ) from error
        for pair in pairs:
            raw = after = None
            if first is not None:
                raw = (pair.image.shape[2], pair.image.shape[3])
                after = first.size(*raw)
            expected = reference_outputs(model, part, pair.x, pair.size, raw, after)
            differences += compare(names, pair.image, expected, run, metadata.mask_threshold)
            if pair.levels is not None:
                shape = tuple(pair.image.shape)
                differences.append(Difference(shape, 'resized image', pair.size, LEVELS, pair.levels))
        if metrics and all(each.within_tolerance for each in differences):
            from swin_mm.analysis.export.metrics import compare_metrics  # it imports modules that import this package

            differences += compare_metrics(cfg, model, run, metadata)
        wrong = [each for each in differences if not each.within_tolerance]
        if wrong:
            worst = max(wrong, key=lambda each: each.value / TOLERANCES[each.measure])
            raise ExportDiffersError(
                f'{to} differs from PyTorch: {worst.measure} {worst.value:.1e} (at most '
                f'{TOLERANCES[worst.measure]:.0e}); {out} is not written',
                differences,
            )
    return differences


class Pair(NamedTuple):
    """A batch of images to compare on.

    Args:
        image: what the file takes.
        x: what the model takes.
        size: (height, width) of ``x`` without padding.
        levels: how far the resized image is from that of OpenCV, of 255; None without resizing.
    """

    image: Tensor
    x: Tensor
    size: tuple[int, int]
    levels: float | None = None


class Inputs:
    """Images to compare on, as the file takes them and as the model does.

    Args:
        cfg: the config.
        model: the model or its backbone.
        channels: of an image.
        preprocess: whether the file normalises and pads.
        resize: how it resizes; None if it does not.
    """

    def __init__(
        self, cfg: Config, model: nn.Module, channels: int, preprocess: bool, resize: Resize | None = None
    ) -> None:
        self.cfg, self.channels, self.preprocess, self.resize = cfg, channels, preprocess, resize
        settings = preprocessor_settings(cfg)
        self.preprocessor = getattr(model, 'data_preprocessor', None)
        if self.preprocessor is None and settings.get('type'):
            self.preprocessor = build_model(cfg, settings).eval()

    def make(self, part: str, size: tuple[int, int] | None, sides: Sides, files: Sequence[str | Path]) -> list[Pair]:
        """Pairs of what the file takes and what the model takes, at several sizes.

        Args:
            part: one of ``PARTS``; maps are also compared on noise, of any size.
            size: (width, height) if it is fixed.
            sides: what the file takes.
            files: images to use.

        Raises:
            InputError: a file cannot be read.
        """
        found = find_images(self.cfg, files)
        images = prepared_images(self.cfg, found, resize=self.resize is None)
        if any(image.shape[2] != self.channels for image in images) or not images:
            images = noise(self.channels)
        pairs = [self.pair(torch.from_numpy(batch)) for batch in batches(images, size, sides.fit)]
        if part != 'predictions' and size is None and self.resize is None:
            for count, height, width in SIZES:
                shape = (count, self.channels, sides.fit(height), sides.fit(width))
                if self.preprocess:
                    pairs.append(self.pair(torch.randint(0, 256, shape, dtype=torch.uint8).permute(0, 2, 3, 1)))
                else:
                    pairs.append(Pair(image := torch.randn(shape), image, shape[2:]))
        return pairs

    def pair(self, batch: Tensor) -> Pair:
        """From images (B, H, W, channels) as OpenCV reads them."""
        image = raw = batch.permute(0, 3, 1, 2).contiguous()
        levels = None
        if self.resize is not None:
            image = self.resize(raw)
            height, width = self.resize.size(raw.shape[2], raw.shape[3])
            native = torch.from_numpy(np.stack([resized(each, (width, height)) for each in batch.numpy()]))
            levels = (image[..., :height, :width] - native.permute(0, 3, 1, 2)).abs().max().item()
        x, size = self.normalised(image), (image.shape[2], image.shape[3])
        if not self.preprocess:
            return Pair(x, x, (x.shape[2], x.shape[3]))
        return Pair(raw.flip(1) if self.channels == 3 else raw, x, size, levels)

    def normalised(self, images: Tensor) -> Tensor:
        """The images (B, channels, H, W) after the config's data preprocessor."""
        if self.preprocessor is None:
            return images.float()
        samples: Any = None
        if self.cfg.get('default_scope') == 'mmseg':
            from mmseg.structures import SegDataSample

            samples = [SegDataSample() for _ in images]
        return self.preprocessor({'inputs': list(images), 'data_samples': samples}, False)['inputs']


def preprocess_module(cfg: Config) -> Preprocess:
    """What the config's data preprocessor does in evaluation, for RGB images."""
    settings = preprocessor_settings(cfg)
    return Preprocess(
        describe_input(cfg, preprocess=True),
        flip=not settings.get('bgr_to_rgb'),
        divisor=describe_input(cfg, preprocess=False).size_divisor,
        value=settings.get('pad_value', settings.get('pad_val', 0)),
    )


def resize_module(cfg: Config, model: nn.Module) -> Resize:
    """What the config's test pipeline does to the size of an image.

    Raises:
        InputError: a file cannot do it.
    """
    scale, pipeline = resize_of(cfg), test_pipeline(cfg)
    others = [type_name(step) for step in pipeline if not type_name(step).startswith(('Load', 'Resize', 'Pad', 'Pack'))]
    if scale is None or others:
        raise InputError(
            f'--resize: expected a test pipeline that changes the image by a Resize step with scale=..., got '
            f'{", ".join(others) or "none"}'
        )
    step = next(step for step in pipeline if type_name(step) == 'Resize')
    if step.get('interpolation', 'bilinear') != 'bilinear':
        raise InputError(f'--resize: interpolation={step["interpolation"]!r} is not supported; expected bilinear')
    pad = next((step for step in pipeline if type_name(step) == 'Pad'), {})
    value = pad.get('pad_val', 0)
    values = value.get('img', 0) if isinstance(value, dict) else value
    values = {float(each) for each in (values if isinstance(values, Sequence) else [values])}
    if pad and (not pad.get('size') or len(values) > 1):
        raise InputError(
            '--resize: expected a Pad step with a size, and one value for all colours, in the test pipeline'
        )
    if scale['keep_ratio'] and pad and min(pad['size']) < max(scale['scale']):
        raise InputError(
            f'--resize: images of the other orientation do not fit into {tuple(pad["size"])}, that of the Pad step; '
            'expected a square'
        )
    if scale['keep_ratio'] and not pad and (smallest_side(model) > 1 or side_multiple(model) > 1):
        raise InputError(
            '--resize: the model does not take every size that resizing gives; a Pad step with size=... in the test '
            'pipeline makes them one'
        )
    return Resize(tuple(scale['scale']), scale['keep_ratio'], tuple(pad['size']) if pad else None, values.pop())


def describe(cfg: Config, meta: dict, exportable: Exportable, names: list[str], preprocess: bool) -> Metadata:
    """The metadata of a file.

    Args:
        cfg: the config.
        meta: of the checkpoint.
        exportable: what is exported.
        names: of its outputs.
        preprocess: whether it normalises and pads.
    """
    described, inside = describe_input(cfg, preprocess), exportable.resize is not None
    multiple = 1 if inside else side_multiple(exportable.model)
    classes, palette = ((), ()) if exportable.task == 'backbone' else names_and_colours(cfg, meta)
    return Metadata(
        task=exportable.task,
        classes=classes,
        palette=palette,
        input=replace(
            described,
            size_divisor=math.lcm(described.size_divisor, multiple),
            resize_inside=resize_of(cfg) if inside else None,
        ),
        resize=None if inside else resize_of(cfg),
        outputs=tuple(names),
        mask_format=exportable.mask_format,
        mask_threshold=exportable.mask_threshold,
    )


def build(cfg: Config, checkpoint: str, part: str) -> tuple[nn.Module, dict]:
    """Build the model or its backbone with weights, in evaluation mode; and return the checkpoint's ``meta``.

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
    return model, (content.get('meta') if isinstance(content, dict) else None) or {}


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


def side_multiple(model: nn.Module) -> int:
    """What height and width must be multiples of: some necks join maps of the same size only."""
    neck = getattr(model, 'neck', None)
    return 32 if neck is not None and class_name(neck) in NECKS_OF_MULTIPLES else 1
