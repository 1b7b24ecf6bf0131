"""Window attention as it is defined. Every other kernel is tested against this one.

B batch, nW windows per map, h heads, N tokens per window, d head size.
"""

import torch
import torch.nn.functional as F
from torch import Tensor


def scores(q: Tensor, k: Tensor, bias: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Scores before the softmax, (B * nW, h, N, N)."""
    scores = (q * scale) @ k.transpose(-2, -1) + bias
    if mask is not None:
        scores = (scores.unflatten(0, (-1, mask.shape[0])) + mask[:, None]).flatten(0, 1)
    return scores


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, scale: float, dropout: float = 0.0
) -> Tensor:
    """Softmax attention inside windows (Swin V1, section 3.2, equation 4).

    Args:
        q: (B * nW, h, N, d), and so ``k`` and ``v``.
        k: see ``q``.
        v: see ``q``.
        bias: (h, N, N), the position bias.
        mask: (nW, N, N), added to the scores of each image's windows, or None.
        scale: factor on the product of q and k.
        dropout: probability of dropping an attention weight; 0 outside training.

    Returns:
        (B * nW, h, N, d) in the type of ``v``.
    """
    # fp16 holds numbers up to 65504, which scores exceed long before attention itself is in trouble.
    precise = torch.promote_types(v.dtype, torch.float32)
    with torch.autocast(v.device.type, enabled=False):
        weights = scores(q.to(precise), k.to(precise), bias.to(precise), mask, scale).softmax(-1)
        return (F.dropout(weights, dropout) @ v.to(precise)).to(v.dtype)
