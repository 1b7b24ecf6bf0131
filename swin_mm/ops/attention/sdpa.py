"""Window attention by PyTorch's ``scaled_dot_product_attention``, on windows gathered by index.

B batch, (H, W) map, nW windows per map, N tokens per window, C channels, h heads, d = C / h head size.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swin_mm.ops.attention.reference import scores, split_heads, without_autocast
from swin_mm.ops.windows import Size, gather_windows, region_mask, scatter_windows, window_indices
from swin_mm.utils.compat import custom_op, is_exporting, scaled_dot_product_attention

EPS = 1e-12  # that of torch.nn.functional.normalize


def attention(
    qkv: Tensor, pad: Tensor, bias: Tensor, window: Size, shift: Size, scale: float | Tensor, dropout: float = 0.0
) -> Tensor:
    """See :func:`swin_mm.ops.attention.reference.attention`."""
    if torch.compiler.is_compiling() and not is_exporting() and not dropout:
        factor, factors = (1.0, scale) if isinstance(scale, Tensor) else (scale, None)
        return _op(qkv, pad, bias, window, shift, factor, factors)
    size = (qkv.shape[1], qkv.shape[2])
    windows = gather_windows(qkv, window, shift, pad.to(qkv.dtype))
    mask = region_mask(size, window, shift, qkv.device) if any(shift) else None
    q, k, v, factor = split_heads(windows, bias.shape[0], scale)
    if mask is None:
        added = _align_rows(bias.to(q.dtype))[None]  # broadcast, never expanded
        if is_exporting():
            added = added.expand(q.shape[0], -1, -1, -1)  # otherwise exporters assume more than one window
    else:
        added = (bias + mask[:, None]).to(q.dtype).repeat(q.shape[0] // mask.shape[0], 1, 1, 1)
    out = scaled_dot_product_attention(q, k, v, added, dropout, factor)
    out = out.transpose(1, 2)
    if is_exporting():
        out = out.clone(memory_format=torch.contiguous_format)  # the decomposed operator returns other strides
    return scatter_windows(out.flatten(2), size, window, shift)


def unsupported_reason(device: torch.device, dtype: torch.dtype, head_size: int, dropout: bool) -> str | None:
    """Why :func:`attention` does not support such inputs, or None. It supports all."""
    return None


def _align_rows(bias: Tensor) -> Tensor:
    """Align rows to 16 elements in memory; otherwise CUDA's kernels would copy the bias for every window."""
    return F.pad(bias, (0, -bias.shape[-1] % 16))[..., : bias.shape[-1]] if bias.is_cuda else bias


# In compiled code all of attention is one operator. Tracing through it would take the compiler minutes, because the
# symbolic sizes of windows and padding are nested from stage to stage.


@custom_op('swin_mm::sdpa_attention')
def _op(
    qkv: Tensor,
    pad: Tensor,
    bias: Tensor,
    window: Sequence[int],
    shift: Sequence[int],
    scale: float,
    scales: Tensor | None,
) -> Tensor:
    with torch.no_grad():
        window, shift = (window[0], window[1]), (shift[0], shift[1])
        return attention(qkv, pad, bias, window, shift, scale if scales is None else scales)


@_op.register_fake
def _(qkv: Tensor, pad: Tensor, bias: Tensor, *_: Any) -> Tensor:
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)


@custom_op('swin_mm::sdpa_attention_backward')
def _backward_op(
    grad: Tensor,
    qkv: Tensor,
    pad: Tensor,
    bias: Tensor,
    window: Sequence[int],
    shift: Sequence[int],
    scale: float,
    scales: Tensor | None,
) -> list[Tensor]:
    """Gradients of qkv, pad, bias and, if given, scales; one image at a time, to limit the memory for scores."""
    grad_qkv = torch.empty_like(qkv)
    sums = [torch.zeros_like(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in (pad, bias, bias[:, 0, 0])]
    problem = (window[0], window[1]), (shift[0], shift[1]), scale if scales is None else scales
    for i in range(len(qkv)):
        grad_qkv[i], *parts = _image_gradients(grad[i : i + 1], qkv[i : i + 1], pad, bias, *problem)
        for total, part in zip(sums, parts, strict=True):
            total += part
    grad_pad, grad_bias, grad_scales = sums
    result = [grad_qkv, grad_pad.to(pad.dtype), grad_bias.to(bias.dtype)]
    return result if scales is None else [*result, grad_scales.to(scales.dtype).view_as(scales)]


def _image_gradients(
    grad: Tensor, qkv: Tensor, pad: Tensor, bias: Tensor, window: Size, shift: Size, scale: float | Tensor
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Gradients of qkv (H, W, 3C), pad (3C,), bias (h, N, N) and the scale (h,) for one image."""
    size, heads = (qkv.shape[1], qkv.shape[2]), bias.shape[0]
    precise = torch.promote_types(qkv.dtype, torch.float32)
    with torch.no_grad(), without_autocast(qkv.device.type):
        windows = gather_windows(qkv, window, shift, pad.to(qkv.dtype)).to(precise)  # (nW, N, 3C)
        g = gather_windows(
            grad.contiguous(), window, shift, torch.zeros_like(pad[: pad.shape[0] // 3], dtype=qkv.dtype)
        )
        g = g.to(precise).unflatten(2, (heads, -1)).transpose(1, 2)  # (nW, h, N, d)
        q, k, v = windows.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
        factor = scale.to(precise).view(-1, 1, 1) if isinstance(scale, Tensor) else scale
        lengths = None
        if isinstance(scale, Tensor):  # cosine attention
            lengths = [t.norm(dim=-1, keepdim=True).clamp(min=EPS) for t in (q, k)]
            q, k = q / lengths[0], k / lengths[1]
        mask = region_mask(size, window, shift, qkv.device) if any(shift) else None
        p = scores(q * factor, k, bias.to(precise), mask, 1.0).softmax(-1)  # (nW, h, N, N)
        grad_v = p.transpose(-2, -1) @ g
        grad_s = g @ v.transpose(-2, -1)
        grad_s = p * (grad_s - (p * grad_s).sum(-1, keepdim=True))
        grad_q = grad_s @ k
        grad_scale = (grad_q * q).sum((0, 2, 3))
        grad_k = grad_s.transpose(-2, -1) @ (q * factor)
        grad_q = grad_q * factor
        if lengths is not None:
            grad_q, grad_k = (
                (gradient - unit * (unit * gradient).sum(-1, keepdim=True)) / length
                for gradient, unit, length in zip((grad_q, grad_k), (q, k), lengths, strict=True)
            )
        slots = torch.stack([grad_q, grad_k, grad_v]).permute(1, 3, 0, 2, 4).flatten(2).flatten(0, 1)  # (nW * N, 3C)
        indices = window_indices(size, window, shift, qkv.device)
        grad_qkv = slots.index_select(0, indices.slots).view(*size, -1)
        return grad_qkv.to(qkv.dtype), slots.index_select(0, indices.pads).sum(0), grad_s.sum(0), grad_scale


@_backward_op.register_fake
def _(grad: Tensor, qkv: Tensor, pad: Tensor, bias: Tensor, *rest: Any) -> list[Tensor]:
    return [torch.empty_like(t) for t in (qkv, pad, bias, rest[-1]) if t is not None]


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.window, ctx.shift, ctx.scale, scales = inputs
    ctx.save_for_backward(*tensors, scales)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    *tensors, scales = ctx.saved_tensors
    grads = _backward_op(grad, *tensors, ctx.window, ctx.shift, ctx.scale, scales)
    return *grads[:3], None, None, None, grads[3] if scales is not None else None


_op.register_autograd(_backward, setup_context=_setup_context)
