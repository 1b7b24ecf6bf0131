"""Window attention of V1 and V2: projections and position bias. The softmax is a kernel by name.

B batch, nW windows per map, (Hw, Ww) window, N = Hw * Ww tokens, C channels, h heads, d = C / h head size.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_mm.kernels import get_kernel
from swin_mm.windows import Size, log_spaced_offsets, relative_index


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows with a learned relative position bias (Swin V1, section 3.2).

    Args:
        dim: C.
        window: (Hw, Ww) the bias table is made for; smaller windows read the table's central part.
        num_heads: h.
        qkv_bias: learn a bias for q, k and v.
        qk_scale: factor on the product of q and k; None for d ** -0.5.
        attn_drop: dropout of attention weights.
        proj_drop: dropout of the output.
        kernel: name of the attention kernel, see :mod:`swin_mm.kernels`.
    """

    def __init__(
        self,
        dim: int,
        window: Size,
        num_heads: int,
        qkv_bias: bool = True,
        qk_scale: float | None = None,
        attn_drop: float = 0.0,
        proj_drop: float = 0.0,
        kernel: str = 'auto',
    ) -> None:
        super().__init__()
        self.window = window
        self.num_heads = num_heads
        self.scale = qk_scale or (dim // num_heads) ** -0.5
        self.attn_drop = attn_drop
        self.attend = get_kernel(kernel)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.add_position_parameters()

    def add_position_parameters(self) -> None:
        """Make the parameters that the position bias comes from."""
        Hw, Ww = self.window
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * Hw - 1) * (2 * Ww - 1), self.num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def bias_table(self, window: Size) -> tuple[Tensor, Size]:
        """The table (offsets, h) to read for windows of this size, and the window whose offsets it lists."""
        return self.relative_position_bias_table, self.window

    def position_bias(self, window: Size) -> Tensor:
        """The bias of each pair of tokens of a window of this size, (h, N, N)."""
        table, table_window = self.bias_table(window)
        index = relative_index(window, table_window, table.device)
        return table[index.flatten()].unflatten(0, index.shape).permute(2, 0, 1)

    def project_qkv(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., 3C)."""
        return self.qkv(x)

    def project(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values: (B * nW, Hw, Ww, C) -> (3, B * nW, h, N, d)."""
        qkv = self.project_qkv(x).flatten(1, 2)  # (B * nW, N, 3C)
        return qkv.unflatten(2, (3, self.num_heads, -1)).permute(2, 0, 3, 1, 4)

    def forward(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend inside each window.

        Args:
            x: (B * nW, Hw, Ww, C), windows no larger than ``window``.
            mask: (nW, N, N), added to the scores, or None.

        Returns:
            The shape of ``x``.
        """
        q, k, v = self.project(x)
        dropout = self.attn_drop if self.training else 0.0
        out = self.attend(q, k, v, self.position_bias(tuple(x.shape[1:3])), mask, self.scale, dropout)
        out = out.transpose(1, 2).reshape(x.shape)  # (B * nW, h, N, d) -> (B * nW, Hw, Ww, C)
        return self.proj_drop(self.proj(out))


class WindowAttentionV2(WindowAttention):
    """Scaled cosine attention with a log-spaced continuous position bias (Swin V2, sections 3.3 and 3.4).

    Cosine attention is ordinary attention on normalised q and k with q carrying the learned scale, so every kernel
    serves it.

    Args:
        dim: C.
        window: (Hw, Ww).
        num_heads: h.
        pretrained_window: the window the model was pre-trained with, whose offsets normalise the coordinates;
            (0, 0) for the window in use.
        **options: the rest of :class:`WindowAttention`'s arguments.
    """

    MAX_LOGIT_SCALE = math.log(100.0)
    BIAS_RANGE = 16.0

    def __init__(
        self, dim: int, window: Size, num_heads: int, pretrained_window: Size = (0, 0), qkv_bias: bool = True, **options
    ) -> None:
        super().__init__(dim, window, num_heads, qkv_bias=False, **options)
        self.scale = 1.0
        self.pretrained_window = pretrained_window
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10.0)))
        # Keys have no bias: under cosine attention it would change their direction, not shift their scores.
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None

    def add_position_parameters(self) -> None:
        """Make the small network that computes the bias from the offset."""
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, self.num_heads, bias=False))

    def bias_table(self, window: Size) -> tuple[Tensor, Size]:
        """The table that the network gives for windows of this size, and that size."""
        weight = self.cpb_mlp[0].weight
        whole = (self.pretrained_window[0] or window[0], self.pretrained_window[1] or window[1])
        table = self.cpb_mlp(log_spaced_offsets(window, whole, weight.dtype, weight.device)).flatten(0, 1)
        return self.BIAS_RANGE * table.sigmoid(), window

    def project_qkv(self, x: Tensor) -> Tensor:
        """(..., C) -> (..., 3C)."""
        if self.q_bias is None:
            return self.qkv(x)
        return F.linear(x, self.qkv.weight, torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias]))

    def project(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries of length logit_scale, keys of length 1, and values, each (B * nW, h, N, d)."""
        q, k, v = super().project(x)
        precise = torch.promote_types(v.dtype, torch.float32)  # squares of fp16 overflow
        q, k = (F.normalize(t.to(precise), dim=-1) for t in (q, k))
        return (q * self.logit_scale.clamp(max=self.MAX_LOGIT_SCALE).exp()).to(v.dtype), k.to(v.dtype), v
