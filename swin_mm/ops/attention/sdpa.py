"""Window attention by PyTorch's fused ``scaled_dot_product_attention``, on windows gathered by index."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swin_mm.ops.attention.reference import split_heads
from swin_mm.ops.windows import Size, gather_windows, region_mask, scatter_windows


def attention(
    qkv: Tensor, pad: Tensor, bias: Tensor, window: Size, shift: Size, scale: float | Tensor, dropout: float = 0.0
) -> Tensor:
    """See :func:`swin_mm.ops.attention.reference.attention`."""
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting() and not dropout:
        factor, factors = (1.0, scale) if isinstance(scale, Tensor) else (scale, None)
        return _compiled(qkv, pad, bias, window, shift, factor, factors)
    size = (qkv.shape[1], qkv.shape[2])
    windows = gather_windows(qkv, window, shift, pad)
    mask = region_mask(size, window, shift, qkv.device) if any(shift) else None
    q, k, v, factor = split_heads(windows, bias.shape[0], scale)
    if mask is None:
        added = _aligned(bias.to(q.dtype))[None]  # broadcast, never expanded
        if torch.compiler.is_exporting():
            added = added.expand(q.shape[0], -1, -1, -1)  # else exporters would guard on there being several windows
    else:
        added = (bias + mask[:, None]).to(q.dtype).repeat(q.shape[0] // mask.shape[0], 1, 1, 1)
    out = F.scaled_dot_product_attention(q, k, v, added, dropout, scale=factor)
    out = out.transpose(1, 2)
    if torch.compiler.is_exporting():
        out = out.clone(memory_format=torch.contiguous_format)  # what SDPA is replaced by lays out its result otherwise
    return scatter_windows(out.flatten(2), size, window, shift)


def _aligned(bias: Tensor) -> Tensor:
    """Rows of a length that CUDA's kernels take as it is; they would copy others, once for each window."""
    return F.pad(bias, (0, -bias.shape[-1] % 16))[..., : bias.shape[-1]] if bias.is_cuda else bias


# What compiled code calls. It sees neither windows nor padding: their symbolic sizes, nested from stage to stage, would
# take it minutes to work out.


@torch.library.custom_op('swin_mm::sdpa_attention', mutates_args=())
def _compiled(
    qkv: Tensor,
    pad: Tensor,
    bias: Tensor,
    window: Sequence[int],
    shift: Sequence[int],
    scale: float,
    scales: Tensor | None,
) -> Tensor:
    with torch.no_grad():
        return attention(qkv, pad, bias, tuple(window), tuple(shift), scale if scales is None else scales)


@_compiled.register_fake
def _(qkv: Tensor, pad: Tensor, bias: Tensor, *_: Any) -> Tensor:
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)


@torch.library.custom_op('swin_mm::sdpa_attention_backward', mutates_args=())
def _compiled_backward(
    grad: Tensor,
    qkv: Tensor,
    pad: Tensor,
    bias: Tensor,
    window: Sequence[int],
    shift: Sequence[int],
    scale: float,
    scales: Tensor | None,
) -> list[Tensor]:
    inputs = [t.detach().requires_grad_() for t in (qkv, pad, bias, scales) if t is not None]
    # PyTorch turns recording off within an operator, beyond what enable_grad turns on.
    keys = torch._C._dispatch_tls_local_include_set(), torch._C._dispatch_tls_local_exclude_set()
    recording = keys[1].remove(torch._C.DispatchKey.AutogradFunctionality)
    with torch._C._ForceDispatchKeyGuard(keys[0], recording), torch.enable_grad():
        out = attention(*inputs[:3], tuple(window), tuple(shift), scale if scales is None else inputs[3])
        return list(torch.autograd.grad(out, inputs, grad))


@_compiled_backward.register_fake
def _(grad: Tensor, qkv: Tensor, pad: Tensor, bias: Tensor, *rest: Any) -> list[Tensor]:
    return [torch.empty_like(t) for t in (qkv, pad, bias, rest[-1]) if t is not None]


def _remember(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.window, ctx.shift, ctx.scale, scales = inputs
    ctx.save_for_backward(*tensors, scales)


def _gradients(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, scales = ctx.saved_tensors
    grads = _compiled_backward(grad, *tensors, ctx.window, ctx.shift, ctx.scale, scales)
    return *grads[:3], None, None, None, grads[3] if scales is not None else None


_compiled.register_autograd(_gradients, setup_context=_remember)
