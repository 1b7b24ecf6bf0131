"""Window attention by PyTorch's fused ``scaled_dot_product_attention``, on windows gathered by index."""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from swin_mm.kernels.reference import scores, split_heads
from swin_mm.windows import Size, gather_windows, region_mask, scatter_windows, tracing

CHUNK = 64 * 3 * 49  # rows of scores, counted over heads, that fit the cache of a CPU core


def attention(
    qkv: Tensor, pad: Tensor, bias: Tensor, window: Size, shift: Size, scale: float | Tensor, dropout: float = 0.0
) -> Tensor:
    """See :func:`swin_mm.kernels.reference.attention`."""
    if torch.compiler.is_compiling() and not torch.compiler.is_exporting() and not dropout:
        factor, factors = (1.0, scale) if isinstance(scale, Tensor) else (scale, None)
        return _compiled(qkv, pad, bias, window, shift, factor, factors)
    size = (qkv.shape[1], qkv.shape[2])
    windows = gather_windows(qkv, window, shift, pad)
    mask = region_mask(size, window, shift, qkv.device) if any(shift) else None
    q, k, v, factor = split_heads(windows, bias.shape[0], scale)
    if q.is_cpu and torch.is_grad_enabled() and not dropout and not tracing():
        # (B * nW, N, 3, h, d), which it is already unless q and k were normalised.
        cosine = isinstance(scale, Tensor)
        projected = (
            torch.stack([q, k, v], 1).permute(0, 3, 1, 2, 4) if cosine else windows.unflatten(2, (3, len(bias), -1))
        )
        out = _AttentionOnCpu.apply(projected, bias.to(q.dtype), mask, factor)
    else:
        out = _attend(q, k, v, bias, mask, factor, dropout)
    return scatter_windows(out.transpose(1, 2).flatten(2), size, window, shift)


def _attend(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, scale: float, dropout: float = 0.0
) -> Tensor:
    """(B * nW, h, N, d), of each of the three the same."""
    if q.is_cpu and q.dtype == torch.bfloat16:
        # The CPU's fused kernel is slow in bfloat16: it converts block by block.
        return _attend(q.float(), k.float(), v.float(), bias, mask, scale, dropout).to(v.dtype)
    if mask is None:
        added = _aligned(bias.to(q.dtype))[None]  # broadcast, never expanded
    else:
        added = (bias + mask[:, None]).to(q.dtype).repeat(q.shape[0] // mask.shape[0], 1, 1, 1)
    return F.scaled_dot_product_attention(q, k, v, added, dropout, scale=scale)


def _aligned(bias: Tensor) -> Tensor:
    """Rows of a length that CUDA's kernels take as it is; they would copy others, once for each window."""
    return F.pad(bias, (0, -bias.shape[-1] % 16))[..., : bias.shape[-1]] if bias.is_cuda else bias


class _AttentionOnCpu(Function):
    """Attention that keeps no scores for the backward pass, which computes them again, part by part in the cache."""

    @staticmethod
    def forward(ctx: Any, projected: Tensor, bias: Tensor, mask: Tensor | None, scale: float) -> Tensor:
        ctx.save_for_backward(projected, bias, mask)
        ctx.scale = scale
        return _attend(*projected.permute(2, 0, 3, 1, 4), bias.detach(), mask, scale)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        projected, bias, mask = ctx.saved_tensors
        precise = torch.promote_types(bias.dtype, torch.float32)
        grad_projected, grad_bias = torch.empty_like(projected), torch.zeros_like(bias, dtype=precise)
        count = max(CHUNK // (bias.shape[0] * bias.shape[1]), 1)
        windows = len(projected) if mask is None else len(mask)
        for first in range(0, len(projected), windows):
            for start in range(0, windows, count):
                part = slice(first + start, first + min(start + count, windows))
                part_mask = None if mask is None else mask[start : start + count]
                q, k, v = (t.to(precise) for t in projected[part].permute(2, 0, 3, 1, 4))
                weights = scores(q, k, bias.to(precise), part_mask, ctx.scale).softmax(-1)
                g = grad[part].to(precise)
                grad_q, grad_k, grad_v = grad_projected[part].permute(2, 0, 3, 1, 4)
                grad_v.copy_(weights.transpose(-2, -1) @ g)
                grad_scores = torch.ops.aten._softmax_backward_data(g @ v.transpose(-2, -1), weights, -1, precise)
                grad_bias += grad_scores.sum(0)
                grad_q.copy_((grad_scores @ k).mul_(ctx.scale))
                grad_k.copy_((grad_scores.transpose(-2, -1) @ q).mul_(ctx.scale))
        return grad_projected, grad_bias.to(bias.dtype), None, None


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
