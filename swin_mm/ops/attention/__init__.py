"""Attention kernels by name, all with the signature of :func:`swin_mm.ops.attention.reference.attention`."""

import logging
from collections.abc import Callable
from functools import lru_cache, partial

import torch
from torch import Tensor

from swin_mm.ops.attention import cpu, reference, sdpa, triton
from swin_mm.ops.windows import Size

_FUSED = {'cpu': cpu, 'triton': triton}
_BY_DEVICE = {'cpu': 'cpu', 'cuda': 'triton'}


def auto(
    qkv: Tensor, pad: Tensor, bias: Tensor, window: Size, shift: Size, scale: float | Tensor, dropout: float = 0.0
) -> Tensor:
    """The fastest kernel that serves: one of this package's, else PyTorch's own."""
    name = _BY_DEVICE.get(qkv.device.type)
    # What is exported shall run where this package is not.
    leaves = torch.compiler.is_exporting() or torch.jit.is_tracing() or torch._C._are_functorch_transforms_active()
    kernel = sdpa if name is None or leaves or _reason_against(name, qkv, bias, dropout) else _FUSED[name]
    return kernel.attention(qkv, pad, bias, window, shift, scale, dropout)


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
    """This kernel and no other.

    Raises:
        RuntimeError: it does not serve here; the message says why.
    """
    if reason := _reason_against(name, qkv, bias, dropout):
        raise RuntimeError(f"attention={name!r} cannot be used here: {reason}; leave attention at 'auto'")
    return _FUSED[name].attention(qkv, pad, bias, window, shift, scale, dropout)


def _reason_against(name: str, qkv: Tensor, bias: Tensor, dropout: float) -> str:
    head_size = int(qkv.shape[3] // 3 // bias.shape[0])  # never symbolic
    return _unsupported_reason(name, qkv.device, qkv.dtype, head_size, dropout > 0)


@torch.compiler.assume_constant_result  # compilers cannot look into what it asks
def _unsupported_reason(name: str, device: torch.device, dtype: torch.dtype, head_size: int, dropout: bool) -> str:
    return _find_unsupported_reason(name, device, dtype, head_size, dropout)


@lru_cache
def _find_unsupported_reason(name: str, device: torch.device, dtype: torch.dtype, head_size: int, dropout: bool) -> str:
    """Why a kernel does not serve, or nothing; said once."""
    reason = _FUSED[name].unsupported_reason(device, dtype, head_size, dropout) or ''
    if reason:
        logging.getLogger('swin_mm').warning('attention without the %s kernel: %s', name, reason)
    return reason


KERNELS: dict[str, Callable[..., Tensor]] = {
    'reference': reference.attention,
    'sdpa': sdpa.attention,
    'cpu': partial(require_kernel, 'cpu'),
    'triton': partial(require_kernel, 'triton'),
}


def get_kernel(name: str) -> Callable[..., Tensor]:
    """The kernel of that name; ``'auto'`` is the fastest that serves.

    Raises:
        ValueError: no kernel has that name.
    """
    if name == 'auto':
        return auto
    if name not in KERNELS:
        raise ValueError(f'attention={name!r} is not a kernel; choose from: auto, {", ".join(KERNELS)}')
    return KERNELS[name]
