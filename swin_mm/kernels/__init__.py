"""Attention kernels by name, all with the signature of :func:`swin_mm.kernels.reference.attention`."""

import logging
from collections.abc import Callable
from functools import lru_cache

import torch
from torch import Tensor

from swin_mm.kernels import reference, sdpa, triton
from swin_mm.windows import Size


def auto(
    qkv: Tensor, pad: Tensor, bias: Tensor, window: Size, shift: Size, scale: float | Tensor, dropout: float = 0.0
) -> Tensor:
    """The fastest kernel that serves: Triton's on a GPU, else PyTorch's own."""
    kernel = sdpa if not qkv.is_cuda or _refusal(qkv, bias, dropout) else triton
    return kernel.attention(qkv, pad, bias, window, shift, scale, dropout)


def fused(
    qkv: Tensor, pad: Tensor, bias: Tensor, window: Size, shift: Size, scale: float | Tensor, dropout: float = 0.0
) -> Tensor:
    """Triton's kernel and no other.

    Raises:
        RuntimeError: it does not serve here; the message says why.
    """
    if reason := _refusal(qkv, bias, dropout):
        raise RuntimeError(f"attention='triton' cannot be used here: {reason}; leave attention at 'auto'")
    return triton.attention(qkv, pad, bias, window, shift, scale, dropout)


def _refusal(qkv: Tensor, bias: Tensor, dropout: float) -> str:
    head_size = int(qkv.shape[3] // 3 // bias.shape[0])  # never symbolic
    return _known_refusal(qkv.device, qkv.dtype, head_size, dropout > 0)


@torch.compiler.assume_constant_result  # compilers cannot look into what it asks
def _known_refusal(device: torch.device, dtype: torch.dtype, head_size: int, dropout: bool) -> str:
    return _find_refusal(device, dtype, head_size, dropout)


@lru_cache
def _find_refusal(device: torch.device, dtype: torch.dtype, head_size: int, dropout: bool) -> str:
    """Why Triton's kernel does not serve, or nothing; said once."""
    reason = triton.refuses(device, dtype, head_size, dropout) or ''
    if reason:
        logging.getLogger('swin_mm').warning('attention without the Triton kernel: %s', reason)
    return reason


KERNELS: dict[str, Callable[..., Tensor]] = {
    'reference': reference.attention,
    'sdpa': sdpa.attention,
    'triton': fused,
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
