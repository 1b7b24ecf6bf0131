"""``optimize_for_inference``: a frozen copy of a model that computes the same features faster.

:func:`optimize_for_inference` packs the weights of linear layers for oneDNN, computes position biases once, fuses GELU
into the linear layer before it, and runs each block on tiles of rows whose intermediate results stay in the CPU's
cache. On GPUs it keeps weights in autocast's type, adds residual branches in the kernel of the norm that follows, and
computes GELU in 16 bits by its tanh approximation, in the epilogue of the product. All of this would silently give
stale results after a weight changed, or bypass hooks and adapters that a user attached. It is therefore done only in
this frozen copy, which has no parameters and cannot be trained, loaded or converted.

B batch, (H, W) map, C channels.
"""

import copy
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any, NoReturn, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_mm.models.residual import add_norm, norm_dtype, on_gpu
from swin_mm.models.swin import (
    Chained,
    Mlp,
    PatchEmbed,
    SwinBlock,
    SwinBlockV2,
    SwinPyramid,
    SwinStage,
)
from swin_mm.models.window_attention import (
    WindowAttention,
    WindowAttentionV2,
    has_hooks,
    is_plain_linear,
    product_dtype,
)
from swin_mm.ops.windows import Size, recording, tracing

TILE_TOKENS = 8192  # tokens of a map that a block processes at a time on a CPU


def optimize_for_inference(model: nn.Module) -> nn.Module:
    """Return a frozen, faster copy of a Swin backbone, or of a model with Swin backbones.

    The copy is in evaluation mode. Up to rounding, it equals ``model.eval()`` under ``torch.no_grad()``.
    Its backbone has no parameters and no state dict: ``train()``, ``load_state_dict()``, ``state_dict()`` and
    conversions by ``.to()`` raise. To change weights, dtype or device, change the original model and call this function
    again.

    Args:
        model: a :class:`swin_mm.models.swin.SwinPyramid`, or any module that contains one or more. It is not changed.

    Returns:
        The frozen copy; it holds its own copies of all weights.

    Raises:
        TypeError: the model contains no Swin backbone of this package.
        ValueError: a module of the backbone has hooks, which the frozen copy would not call.

    Example:
        >>> from swin_mm.models.swin import SwinPyramid
        >>> frozen = optimize_for_inference(SwinPyramid())
        >>> [tuple(m.shape) for m in frozen(torch.rand(1, 3, 224, 224))]
        [(1, 96, 56, 56), (1, 192, 28, 28), (1, 384, 14, 14), (1, 768, 7, 7)]
    """
    backbones = [(name, module) for name, module in model.named_modules() if isinstance(module, SwinPyramid)]
    if not backbones:
        raise TypeError(
            f'{type(model).__name__} contains no Swin backbone of swin_mm; pass a model whose backbone has the type '
            'swin_mm.SwinTransformer or swin_mm.SwinTransformerV2'
        )
    for prefix, backbone in backbones:
        for name, module in backbone.named_modules(prefix=prefix):
            if has_hooks(module):
                raise ValueError(
                    f'{name or type(module).__name__} has hooks, which a frozen model would not call; remove them '
                    '(handle.remove(), prune.remove, remove_weight_norm) or use the model as it is'
                )
    model = copy.deepcopy(model).eval().requires_grad_(False)
    if isinstance(model, SwinPyramid):
        return FrozenSwin(model)
    for name, _ in backbones:
        parent, _, attribute = name.rpartition('.')
        setattr(model.get_submodule(parent), attribute, FrozenSwin(cast(SwinPyramid, model.get_submodule(name))))
    return model


class FrozenSwin(nn.Module):
    """A Swin backbone for inference only; created by :func:`optimize_for_inference`.

    Args:
        backbone: a backbone in evaluation mode, without hooks. This module takes it over and modifies it.
    """

    def __init__(self, backbone: SwinPyramid) -> None:
        super().__init__()
        self.num_features = backbone.num_features
        self.out_indices = backbone.out_indices
        self._weight = backbone.patch_embed.proj.weight.detach()
        stages: Any = backbone.layers  # nn.ModuleList does not know the type of its items
        backbone.layers = nn.ModuleList(map(FrozenStage, stages))
        backbone.patch_embed = _freeze_patch_embed(backbone.patch_embed)  # type: ignore[assignment]
        backbone.fused_norm = True
        self._hidden = (backbone,)  # in a tuple: not registered as a child, so that this module has no parameters
        self.training = False

    @property
    def backbone(self) -> SwinPyramid:
        """The optimised modules."""
        return self._hidden[0]

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """Feature maps of an image, see :meth:`swin_mm.models.swin.SwinPyramid.forward`. No gradients are recorded.

        Raises:
            RuntimeError: the image requires a gradient.
        """
        if torch.is_grad_enabled() and image.requires_grad:
            _refuse('give gradients')
        with torch.no_grad():
            return self.backbone(image)

    def train(self, mode: bool = True) -> 'FrozenSwin':
        """Do nothing for ``mode=False``.

        Raises:
            RuntimeError: ``mode`` is true.
        """
        if mode:
            _refuse('be trained')
        return self

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> 'FrozenSwin':
        moved = fn(self._weight)
        if moved.dtype != self._weight.dtype or moved.device != self._weight.device:
            _refuse(f'be converted to {moved.dtype} on {moved.device}')
        return self

    def _load_from_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse('load a state dict')

    def _save_to_state_dict(self, *args: Any, **kwargs: Any) -> NoReturn:
        _refuse('be saved')


def _refuse(what: str) -> NoReturn:
    raise RuntimeError(
        f'a model from optimize_for_inference cannot {what}: it is frozen; do that to the original model, then call '
        'optimize_for_inference again'
    )


class PackedLinear(nn.Module):
    """A linear layer whose weight is stored in oneDNN's layout and cast only once per autocast dtype.

    Args:
        weight: (out_features, in_features); must not be written to afterwards.
        bias: (out_features,) or None.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None) -> None:
        super().__init__()
        self._weight = weight.detach()
        self._bias = None if bias is None else bias.detach()
        self._packed: dict[torch.dtype, tuple[Tensor, Tensor | None]] = {}

    @classmethod
    def of(cls, layer: nn.Linear) -> 'PackedLinear':
        """Pack a linear layer."""
        return cls(layer.weight, layer.bias)

    def forward(self, x: Tensor, gelu: bool = False) -> Tensor:
        """(..., in_features) -> (..., out_features), followed by GELU if ``gelu``."""
        if recording():
            out = F.linear(x, self._weight, self._bias)
            return F.gelu(out) if gelu else out
        dtype = product_dtype(x)
        x = x.to(dtype)
        weight, bias = self._packed.get(dtype) or self._pack(x)
        if weight.is_mkldnn:
            return _mkldnn().linear(x, weight, bias, gelu)
        if gelu and bias is not None and _has_gelu_epilogue(x):
            out = torch._addmm_activation(bias, x.flatten(0, -2), weight.t(), use_gelu=True)
            return out.view(*x.shape[:-1], -1)
        out = F.linear(x, weight, bias)
        return F.gelu(out) if gelu else out

    def bias_like(self, out: Tensor) -> Tensor:
        """The bias in the type of an output, or zeros."""
        if self._bias is None:
            return out.new_zeros(out.shape[-1])
        packed = None if recording() else self._packed.get(out.dtype)
        return self._bias.to(out.dtype) if packed is None or packed[1] is None else packed[1]

    def _pack(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """Weight and bias for inputs like ``x``; kept for the next call unless a CUDA graph is recorded."""
        weight, bias = self._weight.to(x.dtype), None if self._bias is None else self._bias.to(x.dtype)
        packed = _mkldnn().reorder(weight) if _onednn_supports(x, x.dtype) else weight, bias
        if not tracing():
            self._packed[x.dtype] = packed
        return packed

    def __getstate__(self) -> dict[str, Any]:
        return {**vars(self), '_packed': {}}  # tensors in oneDNN's layout can be neither copied nor pickled


class _Mkldnn:
    """PyTorch's oneDNN operators for linear layers. They are private; TorchInductor generates calls of them."""

    def __init__(self) -> None:
        ops = torch.ops.mkldnn
        self._linear, self._reorder = ops._linear_pointwise, ops._reorder_linear_weight
        self.has_bf16 = ops._is_mkldnn_bf16_supported()
        self.linear(torch.zeros(2, 2), self.reorder(torch.zeros(2, 2)), None, True)  # the signatures are as expected

    def reorder(self, weight: Tensor) -> Tensor:
        return self._reorder(weight)

    def linear(self, x: Tensor, weight: Tensor, bias: Tensor | None, gelu: bool) -> Tensor:
        return self._linear(x, weight, bias, 'gelu' if gelu else 'none', [], 'none')


@cache
def find_mkldnn() -> _Mkldnn | None:
    """PyTorch's oneDNN operators, or None if they are missing or have changed; ``F.linear`` is used then."""
    try:
        return _Mkldnn() if torch.backends.mkldnn.is_available() else None
    except Exception:  # another version or build of PyTorch
        return None


def _mkldnn() -> _Mkldnn:
    found = find_mkldnn()
    assert found is not None
    return found


def _onednn_supports(x: Tensor, dtype: torch.dtype) -> bool:
    found = find_mkldnn() if x.is_cpu and x.numel() else None
    return found is not None and (dtype == torch.float32 or (dtype == torch.bfloat16 and found.has_bf16))


def _has_gelu_epilogue(x: Tensor) -> bool:
    """Whether ``torch._addmm_activation``, which is private, fuses GELU into the product on this device.

    It is GELU's tanh approximation there. In 16 bits its error is far below that of rounding; in float32 it is not.
    """
    return on_gpu(x) and x.dtype in (torch.float16, torch.bfloat16) and hasattr(torch, '_addmm_activation')


class FrozenAttention(nn.Module):
    """Window attention with packed projections and precomputed position biases.

    Args:
        attn: an attention module with plain linear layers.
    """

    def __init__(self, attn: WindowAttention) -> None:
        super().__init__()
        self.window = attn.window
        self.attention_fn = attn.attention_fn
        self.qkv = PackedLinear(attn.qkv.weight, attn.qkv_bias())
        self.proj = PackedLinear.of(attn.proj)
        self._scale = attn.score_scale()
        self._position_bias = attn.position_bias
        self._biases: dict[Size, Tensor] = {}

    def forward(self, x: Tensor, window: Size, shift: Size = (0, 0)) -> Tensor:
        """See :meth:`swin_mm.models.window_attention.WindowAttention.forward`."""
        bias = None if recording() else self._biases.get(window)
        if bias is None:
            bias = self._position_bias(window)
            if not tracing():
                self._biases[window] = bias
        qkv = self.qkv(x)
        pad = self.qkv.bias_like(qkv)
        return self.proj(self.attention_fn(qkv, pad, bias, window, shift, self._scale))


class FrozenPatchEmbed(nn.Module):
    """The patch embedding; on GPUs, one copy that lines up the pixels of each patch, and a matrix product.

    A convolution would cast its weight in every call under autocast, and its result would have to be transposed.

    Args:
        embed: a patch embedding with a plain convolution.
    """

    def __init__(self, embed: PatchEmbed) -> None:
        super().__init__()
        self.embed = embed
        self.linear = PackedLinear(embed.proj.weight.flatten(1), embed.proj.bias)

    def forward(self, image: Tensor) -> Tensor:
        """See :meth:`swin_mm.models.swin.PatchEmbed.forward`."""
        if not on_gpu(image) or recording():
            return self.embed(image)
        image = self.embed.pad(image)
        B, channels, Hp, Wp = image.shape
        h, w = self.embed.patch
        # (B, c, H, h, W, w) -> (B, H, W, c, h, w)
        patches = image.view(B, channels, Hp // h, h, Wp // w, w).permute(0, 2, 4, 1, 3, 5)
        rows = patches.new_empty(patches.shape, dtype=product_dtype(image)).copy_(patches)
        x = self.linear(rows.flatten(3))
        return add_norm(x, None, self.embed.norm, dtype=norm_dtype(x))[1]


class FrozenMlp(nn.Module):
    """An MLP with packed weights and GELU fused into the first linear layer.

    Args:
        mlp: an MLP with plain linear layers and exact GELU.
    """

    def __init__(self, mlp: Mlp) -> None:
        super().__init__()
        self.fc1 = PackedLinear.of(mlp.fc1)
        self.fc2 = PackedLinear.of(mlp.fc2)

    def forward(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., C)."""
        return self.fc2(self.fc1(x, gelu=True))


class FrozenStage(SwinStage):
    """A stage of optimised blocks.

    Args:
        stage: a stage without hooks.
    """

    def __init__(self, stage: SwinStage) -> None:
        downsample: Any = stage.downsample
        if downsample is not None:
            downsample.fused_norm = True
            if is_plain_linear(downsample.reduction):
                downsample.reduction = PackedLinear.of(downsample.reduction)
        super().__init__([*map(_freeze_block, stage.blocks)], downsample, with_cp=False)

    def chain(self, x: Tensor) -> Chained:
        """See :meth:`swin_mm.models.swin.SwinStage.chain`."""
        blocks = [block.block for block in self.blocks if isinstance(block, TiledBlock)]
        if not blocks or len(blocks) < len(self.blocks):
            return self(x), None, None
        return blocks[0].chain(blocks, x)


class TiledBlock(nn.Module):
    """A Swin block that runs on tiles of rows, so that intermediate results stay in the CPU's cache.

    Args:
        block: a block in which only attention mixes tokens.
    """

    def __init__(self, block: SwinBlock) -> None:
        super().__init__()
        self.block = block

    def forward(self, x: Tensor) -> Tensor:
        """Apply the block to a map, (B, H, W, C) -> (B, H, W, C)."""
        if not x.is_cpu or tracing() or x.shape[0] * x.shape[1] * x.shape[2] <= TILE_TOKENS:
            return self.block(x)
        B, H, W, _ = x.shape
        window, shift = self.block.effective_window((H, W))
        images, windows = max(TILE_TOKENS // (H * W), 1), max(TILE_TOKENS // (window[0] * W), 1)
        out = torch.empty_like(x)
        for first in range(0, B, images):
            batch, result = x[first : first + images], out[first : first + images]
            for rows, row_shift in tiles(H, window[0], shift[0], windows):
                tile = torch.cat([batch[:, r] for r in rows], 1) if len(rows) > 1 else batch[:, rows[0]]
                tile = self.block.forward_windows(tile, window, (row_shift, shift[1]))
                for r, part in zip(rows, tile.split([r.stop - r.start for r in rows], 1), strict=True):
                    result[:, r] = part
        return out


def tiles(height: int, window: int, shift: int, count: int) -> Iterator[tuple[list[slice], int]]:
    """Split the rows of a map into tiles that a block can process independently.

    Args:
        height: H.
        window: Hw.
        shift: shift of the windows, in rows.
        count: rows of windows per tile.

    Yields:
        The rows of a tile, as one slice, or as two where shifted windows join the top and the bottom of the map; and
        the shift to use on them.
    """
    if height <= count * window:
        yield [slice(0, height)], shift
        return
    end = shift + (height - shift) // window * window  # end of the last whole window
    for start in range(shift, end, count * window):
        yield [slice(start, min(start + count * window, end))], 0
    if shift:
        yield [slice(0, shift), slice(end, height)], shift
    elif end < height:
        yield [slice(end, height)], 0


def _freeze_patch_embed(embed: PatchEmbed) -> nn.Module:
    """Optimise a patch embedding if its convolution is the usual one; otherwise return it unchanged."""
    proj = embed.proj
    usual = type(embed) is PatchEmbed and type(proj) is nn.Conv2d and proj.kernel_size == proj.stride == embed.patch
    usual = usual and (proj.padding, proj.dilation, proj.groups) == ((0, 0), (1, 1), 1)
    return FrozenPatchEmbed(embed) if usual else embed


def _freeze_block(block: nn.Module) -> nn.Module:
    """Optimise a block if all of its parts are known; otherwise return it unchanged."""
    if type(block) not in (SwinBlock, SwinBlockV2):
        return block
    block = cast(SwinBlock, block)
    attn, mlp = block.attn, block.mlp
    if type(attn) not in (WindowAttention, WindowAttentionV2) or type(mlp) is not Mlp:
        return block
    if not all(map(is_plain_linear, (attn.qkv, attn.proj, mlp.fc1, mlp.fc2))):
        return block
    if not type(block.norm1) is type(block.norm2) is nn.LayerNorm or type(mlp.act) is not nn.GELU:
        return block
    block.attn = FrozenAttention(attn)  # type: ignore[assignment]  # another class with the same forward
    block.mlp = FrozenMlp(mlp) if mlp.act.approximate == 'none' else mlp
    return TiledBlock(block)
