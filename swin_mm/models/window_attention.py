"""Window attention of V1 and V2: projections and position bias. The attention itself is a kernel, chosen by name.

B batch, (H, W) map, (Hw, Ww) window, N = Hw * Ww tokens per window, C channels, h heads, d = C / h head size.
"""

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from swin_mm.ops.attention import get_kernel
from swin_mm.ops.position_bias import position_bias
from swin_mm.ops.windows import Size, log_spaced_offsets, padded_size


def is_plain_linear(layer: nn.Module) -> bool:
    """Whether calling a layer is ``F.linear(x, layer.weight, layer.bias)`` and nothing else.

    False for adapters, quantized and parametrized layers, layers with hooks, and layers whose ``forward`` was
    replaced.
    """
    return type(layer) is nn.Linear and not has_hooks(layer)


def has_hooks(module: nn.Module) -> bool:
    """Whether a module has forward or backward hooks, or a ``forward`` set on the instance."""
    # In this form, because torch.compile cannot trace `vars` (at least until torch 2.8) or a generator (torch 2.4).
    return (
        'forward' in module.__dict__
        or len(module._forward_hooks) > 0
        or len(module._forward_pre_hooks) > 0
        or len(module._backward_hooks) > 0
        or len(module._backward_pre_hooks) > 0
    )


def product_dtype(x: Tensor) -> torch.dtype:
    """The dtype in which a linear layer computes: autocast's where that is on, otherwise that of its input."""
    kind = 'cuda' if x.is_meta else x.device.type  # on meta tensors, work for a GPU is counted
    mixed = torch.amp.is_autocast_available(kind) and torch.is_autocast_enabled(kind)
    return torch.get_autocast_dtype(kind) if mixed else x.dtype


class WindowAttention(nn.Module):
    """Multi-head self-attention inside windows with a learned relative position bias (Swin V1, section 3.2).

    Args:
        dim: C.
        window: (Hw, Ww), the window of the bias table; smaller windows read its central part.
        num_heads: h.
        qkv_bias: learn a bias for q, k and v.
        qk_scale: factor on the product of q and k; None for d ** -0.5.
        attn_drop: dropout rate of attention weights. The kernel applies it: hooks on ``attn_drop`` are not called.
        proj_drop: dropout rate of the output.
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
        self.attn_drop = nn.Dropout(attn_drop)
        self.attention_fn = get_kernel(kernel)
        self.qkv = nn.Linear(dim, 3 * dim, bias=qkv_bias)
        self.proj = nn.Linear(dim, dim)
        self.proj_drop = nn.Dropout(proj_drop)
        self.add_position_parameters()

    def add_position_parameters(self) -> None:
        """Create the parameters of the position bias."""
        Hw, Ww = self.window
        self.relative_position_bias_table = nn.Parameter(torch.empty((2 * Hw - 1) * (2 * Ww - 1), self.num_heads))
        nn.init.trunc_normal_(self.relative_position_bias_table, std=0.02)

    def bias_table(self, window: Size) -> tuple[Tensor, Size]:
        """The bias table (offsets, h) for windows of this size, and the window whose offsets it lists."""
        return self.relative_position_bias_table, self.window

    def position_bias(self, window: Size) -> Tensor:
        """The bias of each pair of tokens of a window of this size, (h, N, N)."""
        table, table_window = self.bias_table(window)
        return position_bias(table, window, table_window)

    def qkv_bias(self) -> Tensor | None:
        """The bias of the projection to q, k and v, (3C,), or None."""
        return self.qkv.bias

    def score_scale(self) -> float | Tensor:
        """Factor on the scores: a number, or a tensor (h,) for cosine attention."""
        return self.scale

    def project(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Queries, keys and values, (B, H, W, C) -> (B, H, W, 3C); ``bias`` is :meth:`qkv_bias`, if known."""
        return self.qkv(x)

    def forward(self, x: Tensor, window: Size, shift: Size = (0, 0)) -> Tensor:
        """Apply attention inside each window of a map.

        Args:
            x: (B, H, W, C).
            window: (Hw, Ww), no larger than ``self.window``.
            shift: shift of the windows, see :func:`swin_mm.ops.windows.window_partition`.

        Returns:
            A map of the shape of ``x``.
        """
        H, W = x.shape[1:3]
        if is_plain_linear(self.qkv):
            # Padded tokens project to the qkv bias, which kernels insert.
            bias = self.qkv_bias()
            qkv = self.project(x, bias)
            pad = qkv.new_zeros(qkv.shape[-1]) if bias is None else bias
        else:
            # Hooks, adapters and quantized layers may map zeros to any value: pad first, as the official code does.
            Hp, Wp = padded_size((H, W), window)
            qkv = self.project(F.pad(x, (0, 0, 0, Wp - W, 0, Hp - H)))
            pad = qkv.new_zeros(qkv.shape[-1])  # unused
        dropout = self.attn_drop.p if self.attn_drop.training else 0.0
        out = self.attention_fn(qkv, pad, self.position_bias(window), window, shift, self.score_scale(), dropout)
        return self.proj_drop(self.proj(out[:, :H, :W]))


class WindowAttentionV2(WindowAttention):
    """Scaled cosine attention with a log-spaced continuous position bias (Swin V2, sections 3.3 and 3.4).

    Args:
        dim: C.
        window: (Hw, Ww).
        num_heads: h.
        pretrained_window: window used in pre-training, whose largest offset normalises the coordinates; (0, 0) for the
            window in use.
        **options: the other arguments of :class:`WindowAttention`.
    """

    MAX_LOGIT_SCALE = math.log(100.0)
    BIAS_RANGE = 16.0

    def __init__(
        self,
        dim: int,
        window: Size,
        num_heads: int,
        pretrained_window: Size = (0, 0),
        qkv_bias: bool = True,
        **options: Any,
    ) -> None:
        super().__init__(dim, window, num_heads, qkv_bias=False, **options)
        self.pretrained_window = pretrained_window
        self.logit_scale = nn.Parameter(torch.full((num_heads, 1, 1), math.log(10.0)))
        # Keys have no bias: in cosine attention it would change their direction instead of shifting their scores.
        self.q_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None
        self.v_bias = nn.Parameter(torch.zeros(dim)) if qkv_bias else None

    def add_position_parameters(self) -> None:
        """Create the network that computes the bias from the offset."""
        self.cpb_mlp = nn.Sequential(nn.Linear(2, 512), nn.ReLU(), nn.Linear(512, self.num_heads, bias=False))

    def bias_table(self, window: Size) -> tuple[Tensor, Size]:
        """The network's output for windows of this size, (offsets, h), and that size."""
        whole = (self.pretrained_window[0] or window[0], self.pretrained_window[1] or window[1])
        table = self.cpb_mlp(
            log_spaced_offsets(window, whole, self.logit_scale.dtype, self.logit_scale.device)
        ).flatten(0, 1)
        return self.BIAS_RANGE * table.sigmoid(), window

    def qkv_bias(self) -> Tensor | None:
        """The bias of the projection to q, k and v, (3C,), or None."""
        if self.q_bias is None or self.v_bias is None:
            return None
        return torch.cat([self.q_bias, torch.zeros_like(self.q_bias), self.v_bias])

    def project(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Queries, keys and values, (B, H, W, C) -> (B, H, W, 3C); ``bias`` is :meth:`qkv_bias`, if known."""
        bias = self.qkv_bias() if bias is None else bias
        if is_plain_linear(self.qkv):
            return F.linear(x, self.qkv.weight, bias)
        qkv = self.qkv(x)
        return qkv if bias is None else qkv + bias.to(qkv.dtype)

    def score_scale(self) -> Tensor:
        """Factor of the cosine similarities for each head, (h,)."""
        return self.logit_scale.clamp(max=self.MAX_LOGIT_SCALE).exp().flatten()
