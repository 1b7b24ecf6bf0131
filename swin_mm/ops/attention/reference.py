"""Window attention in elementary operators: the definition that every other kernel is tested against.

B batch, (H, W) map, (Hw, Ww) window, nW windows per map, N = Hw * Ww tokens per window, C channels, h heads, d = C / h.
"""

from contextlib import AbstractContextManager, nullcontext

import torch
import torch.nn.functional as F
from torch import Tensor

from swin_mm.ops.windows import Size, region_mask, window_partition, window_reverse


def without_autocast(device_type: str) -> AbstractContextManager:
    """Disable autocast on devices that have it."""
    if torch.amp.is_autocast_available(device_type):
        return torch.autocast(device_type, enabled=False)
    return nullcontext()


def split_heads(windows: Tensor, heads: int, scale: float | Tensor) -> tuple[Tensor, Tensor, Tensor, float]:
    """Split projected windows (B * nW, N, 3C) into queries, keys and values, each (B * nW, h, N, d).

    Cosine attention (``scale`` is a tensor) becomes ordinary attention on keys of length 1 and queries of length
    ``scale``.

    Returns:
        Queries, keys, values, and the factor still to be applied to the scores.
    """
    q, k, v = windows.unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4)
    if not isinstance(scale, Tensor):
        return q, k, v, scale
    precise = torch.promote_types(v.dtype, torch.float32)  # squares of fp16 overflow
    with without_autocast(v.device.type):
        q, k = (F.normalize(t.to(precise), dim=-1) for t in (q, k))
        return (q * scale.to(precise).view(-1, 1, 1)).to(v.dtype), k.to(v.dtype), v, 1.0


def scores(q: Tensor, k: Tensor, bias: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attention scores before the softmax, (B * nW, h, N, N)."""
    scores = (q * scale) @ k.transpose(-2, -1) + bias
    if mask is not None:
        scores = (scores.unflatten(0, (-1, mask.shape[0])) + mask[:, None]).flatten(0, 1)
    return scores


def weights(
    qkv: Tensor, pad: Tensor, bias: Tensor, window: Size, shift: Size, scale: float | Tensor
) -> tuple[Tensor, Tensor]:
    """Attention weights and values; the arguments are those of :func:`attention`.

    Returns:
        Weights (B * nW, h, N, N), each row of which sums to 1, and values (B * nW, h, N, d), in float32 or float64.
    """
    mask = region_mask((qkv.shape[1], qkv.shape[2]), window, shift, qkv.device) if any(shift) else None
    q, k, v, factor = split_heads(window_partition(qkv, window, shift, pad.to(qkv.dtype)), bias.shape[0], scale)
    # Scores may exceed 65504, the largest number of fp16, although the softmax is well defined.
    precise = torch.promote_types(v.dtype, torch.float32)
    with without_autocast(v.device.type):
        q, k, v, bias = (t.to(precise) for t in (q, k, v, bias))
        return scores(q, k, bias, mask, factor).softmax(-1), v


def attention(
    qkv: Tensor, pad: Tensor, bias: Tensor, window: Size, shift: Size, scale: float | Tensor, dropout: float = 0.0
) -> Tensor:
    """Softmax attention inside windows (Swin V1, section 3.2, equation 4; V2, equation 2).

    The map is padded at the bottom and right to whole windows, shifted cyclically to the top left and partitioned.
    Tokens of different regions of a shifted window do not attend to each other. Padding tokens are not masked.

    Args:
        qkv: queries, keys and values of a map's tokens, (B, H, W, 3C), each as h heads of d channels.
        pad: queries, keys and values of a padding token, (3C,).
        bias: position bias, (h, N, N).
        window: (Hw, Ww).
        shift: shift of the windows, (rows, columns).
        scale: factor on the product of q and k; for cosine attention a tensor (h,), one factor per head.
        dropout: probability of dropping an attention weight.

    Returns:
        (B, H, W, C), in the dtype of ``qkv``.
    """
    attended, v = weights(qkv, pad, bias, window, shift, scale)
    with without_autocast(v.device.type):
        out = F.dropout(attended, dropout) @ v
    size = (qkv.shape[1], qkv.shape[2])
    return window_reverse(out.transpose(1, 2).flatten(2).to(qkv.dtype), size, window, shift)
