"""Parameters, multiply-adds and activation memory of a detector or segmentor, counted without weights, data or a GPU.

Models are built on the meta device, where tensors have shapes but no values.

Multiply-adds are those of convolutions, linear layers and matrix products, including attention on padded tokens. Not
counted are norms, activations, interpolation, box selection and RoIAlign, and projections of padded tokens, which this
backbone does not compute and published counts include. The second stage of a detector is counted on ``BOXES`` boxes
and ``MASKS`` masks. Heads used in training only count as zero.

Activation memory is what autograd saves in the backbone for the backward pass of one training step in float32, without
the weights. Gradients, optimizer state, neck, heads and temporary buffers come on top.
"""

from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from mmengine.config import Config
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from swin_mm.analysis.substitution import replace_modules
from swin_mm.models.swin import SwinPyramid
from swin_mm.models.window_attention import WindowAttention
from swin_mm.openmmlab.config import build_model
from swin_mm.ops.attention import reference, triton
from swin_mm.ops.windows import Size, padded_size
from swin_mm.utils.compat import CHECKPOINTS_ON_META
from swin_mm.utils.errors import InputError

BOXES, MASKS = 1000, 100
# Attention kernels whose activation memory is compared; both run on the meta device.
KERNELS: dict[str, Callable[..., Tensor]] = {'reference': reference.attention, 'Triton': triton.attention}
ELSEWHERE = 'elsewhere'


class StageShape(NamedTuple):
    """Sizes in one stage of a backbone; all (height, width) pairs count tokens."""

    blocks: int
    channels: int
    heads: int
    map_size: Size
    window: Size
    shift: Size
    padded_size: Size
    windows: int


def default_size(cfg: Config) -> tuple[int, int]:
    """The image (width, height) that published counts use: 1280 × 800 for detectors, the test size of a segmentor.

    Raises:
        InputError: a segmentor's test pipeline does not resize.
    """
    if cfg.get('default_scope') == 'mmdet':
        return 1280, 800
    for step in cfg.get('test_pipeline', ()):
        if step['type'] == 'Resize' and 'scale' in step:
            return step['scale']
    raise InputError(f'{cfg.filename} has no test_pipeline that resizes; give the size of the image, --size WxH')


def build(cfg: Config, device: str = 'meta') -> Any:
    """Build the model of a config in evaluation mode.

    Args:
        cfg: the config.
        device: on 'meta' the model has shapes but no values, and is built at once.

    Raises:
        InputError: it cannot be built, or is neither detector nor segmentor.
    """
    if cfg.get('default_scope') not in ('mmdet', 'mmseg') or 'backbone' not in cfg.get('model', {}):
        raise InputError(
            f'{cfg.filename} is not a detector or a segmentor: default_scope should be mmdet or mmseg, and '
            'there should be a model.backbone'
        )
    with torch.device(device):
        return build_model(cfg, cfg.model).eval()


def split_into_parts(model: nn.Module) -> dict[str, list[nn.Module]]:
    """The modules of each part: the children of the model, with Swin's stages and RoI heads one level deeper."""
    parts: dict[str, list[nn.Module]] = {}
    for name, child in model.named_children():
        if isinstance(child, SwinPyramid):
            parts[f'{name}.patch_embed'] = [child.patch_embed]
            stages: Any = child.layers  # nn.ModuleList does not know the type of its items
            for i, stage in enumerate(stages):
                # The pyramid calls the merging, not the stage that it is a child of.
                parts[f'{name}.layers.{i}'] = [stage] if stage.downsample is None else [stage, stage.downsample]
            parts[f'{name}.norm*'] = [getattr(child, f'norm{i}') for i in child.out_indices]
        elif name == 'roi_head':
            parts |= {f'{name}.{part}': [module] for part, module in child.named_children()}
        else:
            parts[name] = [child]
    return parts


def count_parameters(model: nn.Module) -> Counter[str]:
    """Parameters of each part; those that belong to no part under ``ELSEWHERE``."""
    counts = Counter(
        {
            name: sum(p.numel() for p in {p for module in modules for p in module.parameters()})
            for name, modules in split_into_parts(model).items()
        }
    )
    counts[ELSEWHERE] = sum(p.numel() for p in model.parameters()) - sum(counts.values())
    return counts


@contextmanager
def attribute(model: nn.Module, meter: Callable[[], int]) -> Iterator[Counter[str]]:
    """Attribute the growth of a meter to the part of the model that is running, or to ``ELSEWHERE``.

    Outside of Swin, hooks are on every module inside a part, since mmseg calls the ``forward`` of its heads directly:
    what such a head computes outside its submodules goes to ``ELSEWHERE``. Inside, they are only on the parts, since
    hooks on the projections of attention would make it pad before it projects.

    Args:
        model: its parts are those of :func:`split_into_parts`.
        meter: returns a counter that never decreases.

    Yields:
        The counts, complete when the block has ended.
    """
    counts: Counter[str] = Counter()
    depth: Counter[str] = Counter()
    entered: dict[str, int] = {}
    hooks = []

    def enter(name: str) -> None:
        if not depth[name]:
            entered[name] = meter()
        depth[name] += 1

    def leave(name: str) -> None:
        depth[name] -= 1
        if not depth[name]:
            counts[name] += meter() - entered[name]

    inside_swin = {m for pyramid in model.modules() if isinstance(pyramid, SwinPyramid) for m in pyramid.modules()}
    for name, modules in split_into_parts(model).items():
        for module in {m for part in modules for m in part.modules() if m in modules or m not in inside_swin}:
            hooks.append(module.register_forward_pre_hook(lambda *_, name=name: enter(name)))
            hooks.append(module.register_forward_hook(lambda *_, name=name: leave(name)))
    start = meter()
    try:
        yield counts
    finally:
        for hook in hooks:
            hook.remove()
    counts[ELSEWHERE] = meter() - start - sum(counts.values())


def multiply_adds(cfg: Config, width: int, height: int) -> Counter[str]:
    """Multiply-adds of each part to predict on one image; see the top of this module for what counts.

    Args:
        cfg: the config of a detector or segmentor.
        width: of the image.
        height: of the image.
    """
    model = build(cfg)
    image = torch.empty(1, model.backbone.patch_embed.proj.in_channels if _is_swin(model) else 3, height, width)
    try:
        return _multiply_adds(model, lambda: run(model, image.to('meta')))
    except (NotImplementedError, RuntimeError):  # the head needs values, which the backbone does not
        maps: list[Tensor] = []
        counts = _multiply_adds(model, lambda: maps.extend(model.backbone(image.to('meta'))))
        rest = build(cfg, 'cpu')
        rest.backbone = _Constant([m.shape for m in maps])
        return counts + _multiply_adds(rest, lambda: run(rest, torch.zeros(image.shape)))


def activation_bytes(cfg: Config, width: int, height: int, batch: int, kernel: Callable[..., Tensor]) -> Counter[str]:
    """Bytes that each part of the backbone saves for the backward pass of one training step, without weights.

    Args:
        cfg: the config of a detector or segmentor.
        width: of the images.
        height: of the images.
        batch: images per step.
        kernel: computes the attention, see :mod:`swin_mm.ops.attention`.
    """
    model = build(cfg)
    set_attention(model, kernel)
    channels = model.backbone.patch_embed.proj.in_channels if _is_swin(model) else 3
    return saved_bytes(model, torch.empty(batch, channels, height, width, device='meta'))


def saved_bytes(model: Any, image: Tensor) -> Counter[str]:
    """Bytes that autograd saves in each part of ``model.backbone``: each storage once, parameters left out.

    Raises:
        InputError: torch 2.4 does not checkpoint (``with_cp=True``) on the meta device.
    """
    if image.is_meta and not CHECKPOINTS_ON_META and any(getattr(m, 'with_cp', False) for m in model.modules()):
        raise InputError('the memory of activations with with_cp=True cannot be counted with torch 2.4; update torch')
    # Storages are compared as Python objects, because on the meta device they have no address.
    known = {p.untyped_storage() for p in model.parameters()}
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage not in known:
            known.add(storage)
            total += storage.nbytes()
        return tensor

    model.backbone.train()
    with (
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
        attribute(model, lambda: total) as counts,
    ):
        model.backbone(image)
    return counts


def set_attention(model: nn.Module, kernel: Callable[..., Tensor]) -> None:
    """Set the attention kernel of every window attention in a model."""
    for module in model.modules():
        if isinstance(module, WindowAttention):
            module.attention_fn = kernel


def stage_shapes(backbone: SwinPyramid, width: int, height: int) -> list[StageShape]:
    """Maps, windows and heads of the backbone's stages on an image.

    Args:
        backbone: on the meta device.
        width: of the image.
        height: of the image.
    """
    sizes: list[Size] = []
    hooks = [
        stage.register_forward_pre_hook(lambda _, args: sizes.append((args[0].shape[1], args[0].shape[2])))
        for stage in backbone.layers
    ]
    try:
        with torch.no_grad():
            backbone(torch.empty(1, backbone.patch_embed.proj.in_channels, height, width, device='meta'))
    finally:
        for hook in hooks:
            hook.remove()
    shapes = []
    stages: Any = backbone.layers  # nn.ModuleList does not know the type of its items
    for i, (stage, size) in enumerate(zip(stages, sizes, strict=True)):
        block = stage.blocks[-1]
        window, shift = block.effective_window(size)
        padded = padded_size(size, window)
        count = padded[0] // window[0] * (padded[1] // window[1])
        channels, heads = backbone.num_features[i], block.attn.num_heads
        shapes.append(StageShape(len(stage.blocks), channels, heads, size, window, shift, padded, count))
    return shapes


def run(model: Any, image: Tensor) -> None:
    """Run a detector or segmentor on an image (1, channels, H, W), without box selection and RoIAlign."""
    shape = tuple(image.shape[2:])
    meta = dict(batch_input_shape=shape, img_shape=shape, ori_shape=shape, pad_shape=shape, scale_factor=(1.0, 1.0))
    if hasattr(model, 'encode_decode'):
        model.encode_decode(image, [meta])
    elif not hasattr(model, 'roi_head'):
        from mmdet.structures import DetDataSample

        samples = [DetDataSample(metainfo=meta)]
        if hasattr(model, 'panoptic_head'):  # the detector calls its forward directly, without hooks
            model.panoptic_head(model.extract_feat(image), samples)
        else:
            model(image, samples, mode='tensor')
    else:
        _run_two_stages(model, image)


def _run_two_stages(model: Any, image: Tensor) -> None:
    """Run the parts of a two-stage detector one by one, the second stage on a fixed number of boxes."""
    maps, roi_head = model.extract_feat(image), model.roi_head
    channels = maps[0].shape[1]
    proposals: tuple[Tensor, ...] = ()
    if type(model).__name__ == 'SparseRCNN':
        boxes = model.rpn_head.num_proposals
        proposals = (image.new_empty(1, boxes, channels),)
    else:
        boxes = BOXES
        model.rpn_head(maps)
    if getattr(roi_head, 'semantic_head', None) is not None:
        roi_head.semantic_head(maps)
    for head in _as_list(roi_head.bbox_head):
        head(image.new_empty(boxes, channels, 7, 7), *proposals)
    previous: tuple[Tensor, ...] = ()  # HTC passes features from one mask head to the next
    for head in _as_list(getattr(roi_head, 'mask_head', None)):
        result = head(image.new_empty(MASKS, channels, 14, 14), *previous)
        previous = tuple(result[1:]) if isinstance(result, list | tuple) else ()


def _multiply_adds(model: nn.Module, work: Callable[[], Any]) -> Counter[str]:
    set_attention(model, reference.attention)
    _use_countable_convolutions(model)
    with _without_fused_encoder(), torch.no_grad(), FlopCounterMode(display=False) as counter:  # noqa: SIM117
        with attribute(model, lambda: counter.get_total_flops() // 2) as counts:
            work()
    return counts


def _use_countable_convolutions(model: nn.Module) -> None:
    """Replace mmcv's deformable convolutions, an operator that the counter does not know."""
    try:
        from mmcv.ops import DeformConv2d
    except ImportError:  # mmcv without compiled operators has none
        return
    replace_modules(model, DeformConv2d, _PlainConvolution)


class _PlainConvolution(nn.Module):
    """A convolution with the cost of a deformable one."""

    def __init__(self, deformable: Any) -> None:
        super().__init__()
        self.weight = deformable.weight
        self.settings = deformable.stride, deformable.padding, deformable.dilation, deformable.groups

    def forward(self, x: Tensor, offset: Tensor) -> Tensor:
        return F.conv2d(x, self.weight, None, *self.settings)


class _Constant(nn.Module):
    """A backbone whose feature maps are zeros of these shapes."""

    def __init__(self, shapes: list[torch.Size]) -> None:
        super().__init__()
        self.shapes = shapes

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.zeros(shape) for shape in self.shapes)


@contextmanager
def _without_fused_encoder() -> Iterator[None]:
    """Turn off PyTorch's fused transformer encoder, an operator that the counter does not know."""
    enabled = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        yield
    finally:
        torch.backends.mha.set_fastpath_enabled(enabled)


def _is_swin(model: nn.Module) -> bool:
    return isinstance(model.backbone, SwinPyramid)


def _as_list(heads: nn.Module | None) -> list[nn.Module]:
    return [] if heads is None else list(heads) if isinstance(heads, nn.ModuleList) else [heads]
