"""The relative position bias of each pair of tokens, gathered from a table, with a deterministic gradient.

(Hw, Ww) window, N = Hw * Ww tokens per window, h heads, T offsets in the table.
"""

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from swin_mm.ops.windows import Size, is_transformed, relative_index
from swin_mm.utils.compat import custom_op, is_exporting


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
    if is_exporting() or (eager and (torch.jit.is_tracing() or is_transformed(table))):
        index = relative_index(window, table_window, table.device)
        return table[index.flatten()].unflatten(0, index.shape).permute(2, 0, 1).contiguous()
    return _Gather.apply(table, window, table_window)


def table_gradient(grad: Tensor, window: Sequence[int], table_window: Sequence[int]) -> Tensor:
    """Gradient of the table, (T, h), given that of the bias, (h, N, N): for each offset the sum over its pairs.

    A query and a key, counted from the other end, are a patch and a place in it whose coordinates add up to the offset,
    so that folding overlapping patches into an image is this sum.
    """
    (Hw, Ww), (height, width), h = window, table_window, grad.shape[0]
    patches = grad.to(torch.promote_types(grad.dtype, torch.float32)).flip(2).flatten(0, 1)  # (h * N, N)
    image = F.fold(patches, (2 * Hw - 1, 2 * Ww - 1), (Hw, Ww))  # (h, 2 * Hw - 1, 2 * Ww - 1)
    if (Hw, Ww) != (height, width):
        image = F.pad(image, (width - Ww, width - Ww, height - Hw, height - Hw))  # larger offsets do not occur
    return image.view(h, -1).t().to(grad.dtype)


@custom_op('swin_mm::bias_table_gradient')
def _table_gradient_op(grad: Tensor, window: Sequence[int], table_window: Sequence[int]) -> Tensor:
    return table_gradient(grad, window, table_window).contiguous()


@_table_gradient_op.register_fake
def _(grad: Tensor, window: Sequence[int], table_window: Sequence[int]) -> Tensor:
    return grad.new_empty((2 * table_window[0] - 1) * (2 * table_window[1] - 1), grad.shape[0])


class _Gather(Function):
    """The backward of indexing adds up by ``index_put``: sorted on GPUs, and in compiled code by atomics, in any order.

    So does what compilers make of ``fold``; for them the gradient is an operator.
    """

    @staticmethod
    def forward(ctx: Any, table: Tensor, window: Size, table_window: Size) -> Tensor:
        ctx.windows = window, table_window
        index = relative_index(window, table_window, table.device)
        return table.t().index_select(1, index.flatten()).unflatten(1, index.shape)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        add_up = _table_gradient_op if torch.compiler.is_compiling() else table_gradient
        return add_up(grad, *ctx.windows), None, None
