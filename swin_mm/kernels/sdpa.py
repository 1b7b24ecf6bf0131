"""Window attention by PyTorch's fused ``scaled_dot_product_attention``."""

import torch.nn.functional as F
from torch import Tensor


def attention(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor, mask: Tensor | None, scale: float, dropout: float = 0.0
) -> Tensor:
    """See :func:`swin_mm.kernels.reference.attention`."""
    if mask is None:
        added = bias[None]  # broadcast, never expanded
    else:
        added = (bias + mask[:, None]).repeat(q.shape[0] // mask.shape[0], 1, 1, 1)  # (B * nW, h, N, N)
    return F.scaled_dot_product_attention(q, k, v, added.to(q.dtype), dropout, scale=scale)
