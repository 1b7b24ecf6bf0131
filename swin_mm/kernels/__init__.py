"""Attention kernels by name, all with the signature of :func:`swin_mm.kernels.reference.attention`."""

from collections.abc import Callable

from torch import Tensor

from swin_mm.kernels import reference, sdpa

KERNELS: dict[str, Callable[..., Tensor]] = {'reference': reference.attention, 'sdpa': sdpa.attention}


def get_kernel(name: str) -> Callable[..., Tensor]:
    """The kernel of that name; ``'auto'`` is the fastest that serves everywhere.

    Raises:
        ValueError: no kernel has that name.
    """
    if name == 'auto':
        name = 'sdpa'
    if name not in KERNELS:
        raise ValueError(f'attention={name!r} is not a kernel; choose from: auto, {", ".join(KERNELS)}')
    return KERNELS[name]
