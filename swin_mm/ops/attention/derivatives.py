"""What is registered with PyTorch for each fused kernel: an error for second derivatives, and a FLOP formula."""

from collections.abc import Sequence
from typing import Any, NoReturn

import torch

from swin_mm.utils.compat import register_flop_formula


def no_second_derivative(ctx: Any, *grads: Any) -> NoReturn:
    """Backward of a kernel's backward.

    Raises:
        RuntimeError: always.
    """
    raise RuntimeError(
        "the fused attention kernels have no second derivative; build the model with attention='reference', or in "
        "float64, where 'auto' chooses it"
    )


def register_flops(name: str) -> None:
    """Have PyTorch's ``FlopCounterMode`` count the matrix products of ``swin_mm::name`` and its backward.

    The operators take ``(qkv, pad, bias, ..., window, shift)``; the backward takes the output's gradient before these.
    """
    namespace = torch.ops.swin_mm

    @register_flop_formula(getattr(namespace, name))
    def forward(qkv: Sequence[int], pad: Any, bias: Sequence[int], *rest: Any, **_: Any) -> int:
        return 2 * _product(qkv, bias, rest[-2])

    @register_flop_formula(getattr(namespace, f'{name}_backward'))
    def backward(grad: Any, qkv: Sequence[int], pad: Any, bias: Sequence[int], *rest: Any, **_: Any) -> int:
        return 5 * _product(qkv, bias, rest[-2])  # recomputed scores, and four products for the gradients


def _product(qkv: Sequence[int], bias: Sequence[int], window: Sequence[int]) -> int:
    """FLOPs of one (N, N) x (N, d) product in all windows and heads; a multiply-add counts as two."""
    batch, height, width, channels = qkv
    windows = batch * -(-height // window[0]) * -(-width // window[1])
    return 2 * windows * bias[1] * bias[2] * channels // 3
