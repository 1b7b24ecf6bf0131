"""Fused window attention on CPUs, by ``window_attention.cpp``, which is compiled at installation.

There is one build for each of the instruction sets that PyTorch distinguishes. The kernel runs on PyTorch's threads,
since both load the same OpenMP library.
"""

import ctypes
from collections.abc import Sequence
from contextlib import suppress
from functools import lru_cache
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from swin_mm.ops.attention.derivatives import no_second_derivative, register_flops
from swin_mm.ops.windows import MASKED, Size
from swin_mm.utils.compat import custom_op

DTYPES = (torch.float32, torch.bfloat16)


@lru_cache
def find_library(capability: str) -> ctypes.CDLL | None:
    """The best build for a value of ``torch.backends.cpu.get_cpu_capability``, or None."""
    builds = ('avx512', 'avx2', 'default')
    for name in builds[{'AVX512': 0, 'AVX2': 1}.get(capability, 2) :]:
        spec = find_spec(f'swin_mm.ops.attention._cpu_{name}')
        if spec and spec.origin:
            with suppress(OSError):  # built for another kind of machine
                return ctypes.CDLL(spec.origin)
    return None


def _call(name: str, qkv: Tensor, *tensors: Tensor | None, problem: tuple[float, list[int]]) -> None:
    """Call a function of the build for this processor.

    Raises:
        MemoryError: its scratch memory could not be allocated.
    """
    scale, sizes = problem
    pointers = [ctypes.c_void_p(None if t is None else t.data_ptr()) for t in (qkv, *tensors)]
    out_of_memory = getattr(find_library(torch.backends.cpu.get_cpu_capability()), name)(
        DTYPES.index(qkv.dtype),
        *pointers[:4],
        ctypes.c_float(scale),
        ctypes.c_float(MASKED),
        (ctypes.c_int64 * len(sizes))(*sizes),
        *pointers[4:],
    )
    if out_of_memory:
        raise MemoryError(
            f'the cpu attention kernel could not allocate its scratch memory for a map of {tuple(qkv.shape)}; use '
            'smaller images, a smaller batch or fewer threads'
        )


def _sizes(qkv: Tensor, heads: int, window: Sequence[int], shift: Sequence[int]) -> list[int]:
    """The fields of ``Shape`` in ``window_attention.cpp``."""
    return [*qkv.shape[:3], qkv.shape[3] // 3, heads, *window, *shift]


@custom_op('swin_mm::window_attention_cpu', device_types='cpu')
def _op(
    qkv: Tensor,
    pad: Tensor,
    bias: Tensor,
    scales: Tensor | None,
    factor: float,
    window: Sequence[int],
    shift: Sequence[int],
) -> Tensor:
    out = _allocate(qkv)
    problem = factor, _sizes(qkv, len(bias), window, shift)
    _call('swin_mm_attention', qkv, pad, bias, scales, out, problem=problem)
    return out


@_op.register_fake
def _allocate(qkv: Tensor, *_: Any) -> Tensor:
    return qkv.new_empty(*qkv.shape[:3], qkv.shape[3] // 3)


@custom_op('swin_mm::window_attention_cpu_backward', device_types='cpu')
def _backward_op(
    grad: Tensor,
    qkv: Tensor,
    pad: Tensor,
    bias: Tensor,
    scales: Tensor | None,
    factor: float,
    window: Sequence[int],
    shift: Sequence[int],
) -> list[Tensor]:
    grads = [torch.empty_like(qkv), *(torch.zeros_like(t, dtype=torch.float32) for t in (pad, bias, bias[:, 0, 0]))]
    problem = factor, _sizes(qkv, len(bias), window, shift)
    _call('swin_mm_attention_backward', qkv, pad, bias, scales, grad.contiguous(), *grads, problem=problem)
    return grads


@_backward_op.register_fake
def _(grad: Tensor, qkv: Tensor, pad: Tensor, bias: Tensor, *_: Any) -> list[Tensor]:
    return [torch.empty_like(qkv), *(torch.empty_like(t, dtype=torch.float32) for t in (pad, bias, bias[:, 0, 0]))]


def _setup_context(ctx: Any, inputs: tuple, output: Tensor) -> None:
    *tensors, ctx.factor, ctx.window, ctx.shift = inputs
    ctx.save_for_backward(*tensors)


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    tensors = ctx.saved_tensors
    grads = _backward_op(grad, *tensors, ctx.factor, ctx.window, ctx.shift)
    return *(None if t is None else g.to(t.dtype) for g, t in zip(grads, tensors, strict=True)), None, None, None


_op.register_autograd(_backward, setup_context=_setup_context)
_backward_op.register_autograd(no_second_derivative)
register_flops('window_attention_cpu')


def attention(
    qkv: Tensor, pad: Tensor, bias: Tensor, window: Size, shift: Size, scale: float | Tensor, dropout: float = 0.0
) -> Tensor:
    """See :func:`swin_mm.ops.attention.reference.attention`; for inputs that :func:`unsupported_reason` accepts."""
    scales, factor = (scale.float().flatten(), 1.0) if isinstance(scale, Tensor) else (None, scale)
    pad, bias = pad.to(qkv.dtype), bias.float().contiguous()
    return _op(qkv.contiguous(), pad.contiguous(), bias, scales, factor, list(window), list(shift))


def unsupported_reason(device: torch.device, dtype: torch.dtype, head_size: int, dropout: bool) -> str | None:
    """Why :func:`attention` does not support such inputs, or None if it does."""
    if device.type != 'cpu':
        return f'it does not run on {device.type}'
    if find_library(torch.backends.cpu.get_cpu_capability()) is None:
        return 'it is not compiled; install swin_mm where there is a C++ compiler with OpenMP'
    if dropout:
        return 'it has no dropout'
    if dtype not in DTYPES:
        return f'it does not compute in {dtype}'
    return None
