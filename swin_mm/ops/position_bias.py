"""The relative position bias of each pair of tokens, gathered from a table; its gradient is a gather, too.

(Hw, Ww) window, N = Hw * Ww tokens per window, h heads, T offsets in the table.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function, forward_ad

from swin_mm.ops.windows import Size, cached_by_size, functorch_active, relative_index


def position_bias(table: Tensor, window: Size, table_window: Size) -> Tensor:
    """The bias of each pair of tokens of a window.

    Args:
        table: (T, h), a row for each offset of ``table_window``, see :func:`swin_mm.ops.windows.relative_index`.
        window: (Hw, Ww), no larger than ``table_window``.
        table_window: the window whose offsets the table lists.

    Returns:
        (h, N, N), query by key.
    """
    eager = not torch.compiler.is_compiling()
    if torch.compiler.is_exporting() or (eager and (torch.jit.is_tracing() or _is_transformed(table))):
        index = relative_index(window, table_window, table.device)
        return table[index.flatten()].unflatten(0, index.shape).permute(2, 0, 1).contiguous()
    return _Gather.apply(table, window, table_window)


def _is_transformed(x: Tensor) -> bool:
    return functorch_active() or forward_ad.unpack_dual(x).tangent is not None


class _Gather(Function):
    """Gather in the forward and in the backward pass.

    The backward of indexing adds up by ``index_put``: sorted on GPUs, and in compiled code by atomics, in any order.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, window: Size, table_window: Size) -> Tensor:
        ctx.windows = window, table_window
        index = relative_index(window, table_window, table.device)
        return table.t().index_select(1, index.flatten()).unflatten(1, index.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        pairs = pairs_by_offset(*ctx.windows, grad.device)
        padded = F.pad(grad.flatten(1), (0, 1))  # a zero where an offset has fewer pairs
        return padded.index_select(1, pairs.flatten()).unflatten(1, pairs.shape).sum(2).t(), None, None


@cached_by_size(64)
def pairs_by_offset(window: Size, table_window: Size, device: torch.device) -> Tensor:
    """The pairs of tokens that each row of the table is the bias of: the inverse of ``relative_index``.

    Returns:
        (T, N): for each offset and query the pair's index in the flattened (N, N), or N * N where the key that far from
        the query lies outside of the window. Cached: do not write to it.
    """
    (Hw, Ww), N = window, window[0] * window[1]
    keys, inside = zip(*(_keys(*sides, device) for sides in zip(window, table_window, strict=True)), strict=True)
    # (2 * height - 1, Hw) and (2 * width - 1, Ww) -> (2 * height - 1, 2 * width - 1, Hw, Ww)
    key = keys[0][:, None, :, None] * Ww + keys[1][None, :, None, :]
    query = torch.arange(N, device=device).view(Hw, Ww)
    valid = inside[0][:, None, :, None] & inside[1][None, :, None, :]
    return torch.where(valid, query * N + key, N * N).flatten(2).flatten(0, 1)


def _keys(side: int, table_side: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """Along one axis, the key at each offset from each query, (2 * table_side - 1, side), and whether it is inside."""
    key = torch.arange(side, device=device) - torch.arange(1 - table_side, table_side, device=device)[:, None]
    return key, (key >= 0) & (key < side)
