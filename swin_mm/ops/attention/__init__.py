"""Attention kernels by name, all with the signature of :func:`swin_mm.ops.attention.reference.attention`.

========= ==============================================================================================
reference the definition, in elementary operators; differentiable any number of times, in any mode
sdpa      windows gathered by index, then PyTorch's ``scaled_dot_product_attention``
cpu       one pass in C++ (float32 and bfloat16)
triton    one pass in Triton, for NVIDIA GPUs from Ampere on (float16, bfloat16 and float32)
auto      the fastest of these that supports the input; ``triton`` only where it has been found to be right, see
          :mod:`swin_mm.ops.attention.self_check`
========= ==============================================================================================
"""

import logging
import operator
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor
from torch.autograd import forward_ad

from swin_mm.ops.attention import cpu, reference, sdpa, self_check, triton
from swin_mm.ops.windows import Size, is_transformed
from swin_mm.utils.compat import is_exporting

_FUSED = {'sdpa': sdpa, 'cpu': cpu, 'triton': triton}
PREFERRED = {'cpu': 'cpu', 'cuda': 'triton'}  # the fastest kernel on each device; sdpa on others


def auto(
    qkv: Tensor, pad: Tensor, bias: Tensor, window: Size, shift: Size, scale: float | Tensor, dropout: float = 0.0
) -> Tensor:
    """Attention by the fastest supported kernel.

    In eager mode, float64 and forward-mode differentiation use ``reference``. Exported graphs use ``sdpa``,
    because they must run without this package.
    """
    name = PREFERRED.get(qkv.device.type, 'sdpa')
    if is_exporting() or torch.jit.is_tracing():
        name = 'sdpa'
    elif not torch.compiler.is_compiling() and (qkv.dtype == torch.float64 or is_transformed(qkv)):
        return reference.attention(qkv, pad, bias, window, shift, scale, dropout)
    elif reason_against(name, qkv, bias, dropout) or (
        name == 'triton' and not self_check.is_trusted(triton.attention, qkv, bias, window, scale)
    ):
        name = 'sdpa'
    return _FUSED[name].attention(qkv, pad, bias, window, shift, scale, dropout)


def require_kernel(
    name: str,
    qkv: Tensor,
    pad: Tensor,
    bias: Tensor,
    window: Size,
    shift: Size,
    scale: float | Tensor,
    dropout: float = 0.0,
) -> Tensor:
    """Attention by the fused kernel ``name``, without falling back to another one.

    Raises:
        RuntimeError: it does not support the input; the message says why.
    """
    reason = reason_against(name, qkv, bias, dropout)
    if not torch.compiler.is_compiling() and forward_ad.unpack_dual(qkv).tangent is not None:
        reason = 'it has no forward-mode derivative'
    if reason:
        raise RuntimeError(f"attention={name!r} cannot be used here: {reason}; use attention='auto' or 'reference'")
    return _FUSED[name].attention(qkv, pad, bias, window, shift, scale, dropout)


def reason_against(name: str, qkv: Tensor, bias: Tensor, dropout: float) -> str:
    """Why a kernel does not support these tensors, or '' if it does. A constant in compiled code."""
    head_size = operator.index(qkv.shape[3] // 3 // bias.shape[0])  # never symbolic; torch 2.8 cannot trace int() here
    return _as_constant(name, qkv.device, qkv.dtype, head_size, dropout > 0)


@torch.compiler.assume_constant_result  # compilers cannot trace the checks
def _as_constant(name: str, device: torch.device, dtype: torch.dtype, head_size: int, dropout: bool) -> str:
    return unsupported_reason(name, device, dtype, head_size, dropout)


@lru_cache
def unsupported_reason(name: str, device: torch.device, dtype: torch.dtype, head_size: int, dropout: bool) -> str:
    """Why a kernel does not support such inputs, or '' if it does. Each reason is logged once."""
    reason = _FUSED[name].unsupported_reason(device, dtype, head_size, dropout) or ''
    if reason:
        logging.getLogger('swin_mm').warning('the %s attention kernel is not used: %s', name, reason)
    return reason


KERNELS: dict[str, Callable[..., Tensor]] = {
    'reference': reference.attention,
    'sdpa': partial(require_kernel, 'sdpa'),
    'cpu': partial(require_kernel, 'cpu'),
    'triton': partial(require_kernel, 'triton'),
}


def get_kernel(name: str) -> Callable[..., Tensor]:
    """The kernel of that name; ``'auto'`` is the fastest supported one.

    Raises:
        ValueError: no kernel has that name.
    """
    if name == 'auto':
        return auto
    if name not in KERNELS:
        raise ValueError(f'attention={name!r} is not a kernel; choose from: auto, {", ".join(KERNELS)}')
    return KERNELS[name]
