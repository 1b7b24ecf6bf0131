"""Window attention of V1 and V2: projections and position bias. The softmax is a kernel by name.

B batch, (H, W) map, (Hw, Ww) window, N = Hw * Ww tokens per window, C channels, h heads, d = C / h head size.
"""

import math

import torch
from torch import Tensor, nn

from swin_mm.models.dense import Linear
from swin_mm.models.derived import derived, evaluating
from swin_mm.ops.attention import get_kernel
from swin_mm.ops.windows import Size, log_spaced_offsets, relative_index


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
        kernel: name of the attention kernel, see :mod:`swin_mm.ops.attention`.
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
        self.attention_fn = get_kernel(kernel)
        self.qkv = Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = Linear(dim, dim)
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
        """The bias of each pair of tokens of a window of this size, (h, N, N). Do not write to it."""
        if evaluating(self):
            return derived(('bias', window), self.position_weights(), lambda: self._position_bias(window))
        return self._position_bias(window)

    def position_weights(self) -> tuple[Tensor, ...]:
        """What the position bias is computed from."""
        return (self.relative_position_bias_table,)

    def _position_bias(self, window: Size) -> Tensor:
        table, table_window = self.bias_table(window)
        index = relative_index(window, table_window, table.device)
        return table[index.flatten()].unflatten(0, index.shape).permute(2, 0, 1).contiguous()

    def qkv_bias(self) -> Tensor | None:
        """The bias of the projection to q, k and v, (3C,), or None."""
        return self.qkv.bias

    def score_scale(self) -> float | Tensor:
        """Factor on the scores as kernels take it."""
        return self.scale

    def forward(self, x: Tensor, window: Size, shift: Size = (0, 0)) -> Tensor:
        """Attend inside each window of a map.

        Args:
            x: (B, H, W, C).
            window: (Hw, Ww), no larger than ``self.window``.
            shift: how far the windows are shifted, see :func:`swin_mm.ops.windows.window_partition`.

        Returns:
            The shape of ``x``.
        """
        bias = self.qkv_bias()
        qkv = self.qkv(x, bias)
        # Padding comes before the projection: of a zero token, the bias remains.
        pad = qkv.new_zeros(qkv.shape[-1]) if bias is None else bias.to(qkv.dtype)
        dropout = self.attn_drop if self.training else 0.0
        out = self.attention_fn(qkv, pad, self.position_bias(window), window, shift, self.score_scale(), dropout)
        return self.proj_drop(self.proj(out))


class WindowAttentionV2(WindowAttention):
    """Scaled cosine attention with a log-spaced continuous position bias (Swin V2, sections 3.3 and 3.4).

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

    def position_weights(self) -> tuple[Tensor, ...]:
        """What the position bias is computed from."""
        return tuple(self.cpb_mlp.parameters())

    def qkv_bias(self) -> Tensor | None:
        """The bias of the projection to q, k and v, (3C,), or None."""
        if self.q_bias is None:
            return None
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def score_scale(self) -> Tensor:
        """Cosine attention's factor for each head, (h,)."""
        return self.logit_scale.clamp(max=self.MAX_LOGIT_SCALE).exp().flatten()
