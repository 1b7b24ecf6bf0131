"""Window partition and its inverse, the mask of shifted windows, and offsets for the relative position bias.

B batch, (H, W) map, (Hw, Ww) window, nW windows per padded map, N = Hw * Ww tokens per window, C channels.
Windows of one image are adjacent and in reading order, and so are the tokens of a window: token t of window n of image
b is [b * nW + n, t].

:func:`window_partition` and :func:`window_reverse` define the layout; compilers fuse them into one pass. In eager mode
:func:`gather_windows` and :func:`scatter_windows` do the same in one pass each, by index.
"""

import math
from collections.abc import Callable
from functools import lru_cache, wraps
from typing import Any, NamedTuple, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function, forward_ad

Size = tuple[int, int]
Result = TypeVar('Result')

# Added to masked scores. Not -inf: every published Swin uses this value, and equal weights must give equal outputs.
MASKED = -100.0
OFFSET_RANGE = 8.0  # V2 scales offsets to [-8, 8] before the logarithm of base 8


def functorch_active() -> bool:
    """Whether a transform of :mod:`torch.func` (jvp, vmap, grad ...) is running."""
    # There is no public API. Where this private one is missing, transforms reach the kernels and raise an error there.
    return getattr(torch._C, '_are_functorch_transforms_active', bool)()


def is_transformed(x: Tensor) -> bool:
    """Whether forward-mode differentiation or a transform of :mod:`torch.func` acts on a tensor."""
    return functorch_active() or forward_ad.unpack_dual(x).tangent is not None


def recording() -> bool:
    """Whether a compiler or tracer records operators, or a transform of :mod:`torch.func` changes them."""
    return torch.compiler.is_compiling() or torch.jit.is_tracing() or functorch_active()


def tracing() -> bool:
    """Whether operators are being recorded, also in a CUDA graph: tensors created now must not be cached."""
    return recording() or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())


def _cached(entries: int) -> Callable[[Callable[..., Result]], Callable[..., Result]]:
    """LRU cache of results that depend on sizes alone; callers must not write to them. Bypassed while tracing."""

    def decorate(build: Callable[..., Result]) -> Callable[..., Result]:
        def build_normal_tensor(*args: Any) -> Result:
            with torch.inference_mode(False):  # inference tensors could not be used in training later
                return build(*args)

        cached = lru_cache(entries)(build_normal_tensor)
        return wraps(build)(lambda *args: build(*args) if tracing() else cached(*args))

    return decorate


def padded_size(size: Size, window: Size) -> Size:
    """The smallest multiple of the window that holds the map."""
    # This form keeps symbolic sizes simple.
    return (size[0] + window[0] - 1) // window[0] * window[0], (size[1] + window[1] - 1) // window[1] * window[1]


def window_partition(x: Tensor, window: Size, shift: Size = (0, 0), pad: Tensor | None = None) -> Tensor:
    """Pad a map at the bottom and right, shift it cyclically to the top left, and partition it into windows.

    Args:
        x: (B, H, W, C), any H and W.
        window: (Hw, Ww).
        shift: cyclic shift in rows and columns, from (0, 0) to (Hw - 1, Ww - 1).
        pad: (C,), the value of padding tokens; zeros by default.

    Returns:
        (B * nW, N, C).
    """
    H, W = x.shape[1:3]
    Hp, Wp = padded_size((H, W), window)
    if tracing() or (Hp, Wp) != (H, W):
        x = F.pad(x, (0, 0, 0, Wp - W, 0, Hp - H))
        if pad is not None:
            rows, columns = (torch.arange(n, device=x.device) for n in (Hp, Wp))
            x = torch.where(((rows < H)[:, None] & (columns < W))[..., None], x, pad)
    if any(shift):
        x = x.roll((-shift[0], -shift[1]), (1, 2))
    x = x.unflatten(2, (Wp // window[1], window[1])).unflatten(1, (Hp // window[0], window[0]))
    return x.transpose(2, 3).flatten(3, 4).flatten(0, 2)  # (B, Hp / Hw, Wp / Ww, Hw, Ww, C) -> (B * nW, N, C)


def window_reverse(windows: Tensor, size: Size, window: Size, shift: Size = (0, 0)) -> Tensor:
    """Undo :func:`window_partition` for a map of ``size`` (H, W): (B * nW, N, C) -> (B, H, W, C)."""
    Hp, Wp = padded_size(size, window)
    x = windows.unflatten(1, window).unflatten(0, (-1, Hp // window[0], Wp // window[1])).transpose(2, 3)
    x = x.flatten(3, 4).flatten(1, 2)  # (B, Hp / Hw, Hw, Wp / Ww, Ww, C) -> (B, Hp, Wp, C)
    if any(shift):
        x = x.roll(shift, (1, 2))
    return x[:, : size[0], : size[1]]


class WindowIndices(NamedTuple):
    """Indices that gather windows from a map and scatter them back. A slot is one of the nW * N tokens of all windows.

    Args:
        tokens: (nW * N,), for each slot the index of its token in the flattened map; arbitrary for padding.
        slots: (H * W,), for each token of the map the index of its slot.
        pads: (number of padding tokens,), the indices of slots that hold padding.
    """

    tokens: Tensor
    slots: Tensor
    pads: Tensor


def _wrapped(at: Tensor, length: int) -> Tensor:
    """``at % length`` for ``at < 2 * length``; the ONNX exporter does not support a remainder by a symbolic length."""
    return torch.where(at < length, at, at - length)


def _tokens(size: Size, window: Size, shift: Size, device: torch.device) -> Tensor:
    """For each slot the index of its token, -1 for padding, (nW * N,). Only arithmetic: exported sizes stay dynamic."""
    axes = zip(padded_size(size, window), window, shift, strict=True)
    rows, columns = (_wrapped(torch.arange(s, p + s, device=device), p).view(p // w, w) for p, w, s in axes)
    rows, columns = rows[:, None, :, None], columns[None, :, None, :]  # (nH, 1, Hw, 1) and (1, nW, 1, Ww)
    return torch.where((rows < size[0]) & (columns < size[1]), rows * size[1] + columns, -1).flatten()


def _slots(size: Size, window: Size, shift: Size, device: torch.device) -> Tensor:
    """For each token of the map the index of its slot, (H * W,). Only arithmetic, like :func:`_tokens`."""
    (Hp, Wp), (Hw, Ww) = padded_size(size, window), window
    axes = zip(size, (Hp, Wp), shift, strict=True)
    rows, columns = (_wrapped(torch.arange(p - s, n + p - s, device=device), p) for n, p, s in axes)
    rows = rows // Hw * (Wp // Ww * Hw * Ww) + rows % Hw * Ww
    return (rows[:, None] + columns // Ww * (Hw * Ww) + columns % Ww).flatten()


@_cached(64)
def window_indices(size: Size, window: Size, shift: Size, device: torch.device) -> WindowIndices:
    """The indices for a map of ``size`` (H, W). Cached: do not write to them."""
    # On the CPU, because nonzero() on a GPU would synchronise.
    tokens, slots = (of(size, window, shift, torch.device('cpu')) for of in (_tokens, _slots))
    parts = (tokens.clamp(min=0), slots, (tokens < 0).nonzero().flatten())
    return WindowIndices(*(part.to(device) for part in parts))


class _Gather(Function):
    """Gather windows from a map. The backward is a gather too, not the slower scatter-add of ``index_select``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pad: Tensor, indices: WindowIndices) -> Tensor:
        ctx.indices = indices
        windows = x.index_select(1, indices.tokens)
        if len(indices.pads):
            windows[:, indices.pads] = pad
        return windows

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        indices = ctx.indices
        return grad.index_select(1, indices.slots), grad[:, indices.pads].sum((0, 1)), None


class _Scatter(Function):
    """Put windows back into a map."""

    @staticmethod
    def forward(ctx: Any, windows: Tensor, indices: WindowIndices) -> Tensor:
        ctx.indices = indices
        return windows.index_select(1, indices.slots)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        indices = ctx.indices
        grad = grad.index_select(1, indices.tokens)
        if len(indices.pads):
            grad = grad.index_fill(1, indices.pads, 0)
        return grad, None


def gather_windows(x: Tensor, window: Size, shift: Size, pad: Tensor) -> Tensor:
    """:func:`window_partition` by index; forward and backward take one pass each."""
    if tracing():
        tokens = _tokens((x.shape[1], x.shape[2]), window, shift, x.device)
        windows = x.flatten(1, 2).index_select(1, tokens.clamp(min=0))
        windows = torch.where((tokens < 0)[:, None], pad, windows)
        Hp, Wp = padded_size((x.shape[1], x.shape[2]), window)
        return windows.view(x.shape[0] * (Hp // window[0]) * (Wp // window[1]), window[0] * window[1], x.shape[3])
    indices = window_indices((x.shape[1], x.shape[2]), window, shift, x.device)
    return _Gather.apply(x.flatten(1, 2), pad, indices).view(-1, window[0] * window[1], x.shape[3])


def scatter_windows(windows: Tensor, size: Size, window: Size, shift: Size) -> Tensor:
    """:func:`window_reverse` by index; forward and backward take one pass each."""
    if tracing():
        Hp, Wp = padded_size(size, window)
        images = windows.shape[0] // ((Hp // window[0]) * (Wp // window[1]))
        slots = _slots(size, window, shift, windows.device)
        return windows.reshape(images, Hp * Wp, -1).index_select(1, slots).unflatten(1, size)
    indices = window_indices(size, window, shift, windows.device)
    C = windows.shape[2]
    return _Scatter.apply(windows.reshape(-1, len(indices.tokens), C), indices).view(-1, *size, C)


def region_mask(size: Size, window: Size, shift: Size, device: torch.device) -> Tensor:
    """Attention mask of shifted windows: added to the scores, it restricts every token to its own region.

    The cyclic shift brings tokens from opposite edges of the map into one window; the mask separates
    them. Padding is a region like any other: padding tokens are not masked, as in every published Swin.

    Returns:
        (nW, N, N), 0 where two tokens attend to each other, else ``MASKED``. Cached: do not write to it.
    """
    return _region_mask(padded_size(size, window), window, shift, device)


@_cached(16)  # four stages at four sizes
def _region_mask(size: Size, window: Size, shift: Size, device: torch.device) -> Tensor:
    rows, columns = (
        ((torch.arange(n, device=device) >= n - w).int() + (torch.arange(n, device=device) >= n - s).int()).view(
            n // w, w
        )
        for n, w, s in zip(size, window, shift, strict=True)
    )
    regions = (3 * rows[:, None, :, None] + columns[None, :, None, :]).flatten(2).flatten(0, 1)  # (nW, N)
    return (regions[:, None, :] != regions[:, :, None]) * MASKED


@_cached(64)
def relative_index(window: Size, table_window: Size, device: torch.device) -> Tensor:
    """Row of the bias table for each pair of tokens (query, key): that of the offset query - key.

    Args:
        window: (Hw, Ww) of the tokens.
        table_window: the window whose offsets the table lists, (2 * height - 1) * (2 * width - 1) rows in reading
            order. A smaller window reads the central part.
        device: of the result.

    Returns:
        (N, N), int64. Cached: do not write to it.
    """
    rows, columns = (torch.arange(n, device=device) for n in window)
    rows = rows[:, None] - rows + table_window[0] - 1
    columns = columns[:, None] - columns + table_window[1] - 1
    # (Hw, 1, Hw, 1) and (1, Ww, 1, Ww) -> (Hw, Ww, Hw, Ww)
    index = rows[:, None, :, None] * (2 * table_window[1] - 1) + columns[None, :, None, :]
    return index.flatten(2).flatten(0, 1)


def log_spaced_offsets(
    window: Size, whole: Size, dtype: torch.dtype = torch.float32, device: torch.device | None = None
) -> Tensor:
    """Log-spaced offsets between the tokens of a window, the input of V2's position bias MLP (Swin V2, equation 4).

    Args:
        window: (Hw, Ww) of the tokens.
        whole: the window whose largest offset is normalised to 1.
        dtype: of the result.
        device: of the result.

    Returns:
        (2 * Hw - 1, 2 * Ww - 1, 2); the largest offset of ``whole`` becomes log2(9) / log2(8).
    """
    axes = [
        torch.arange(1 - side, side, device=device, dtype=torch.promote_types(dtype, torch.float32)) / max(most - 1, 1)
        for side, most in zip(window, whole, strict=True)
    ]
    offsets = torch.stack(torch.meshgrid(*axes, indexing='ij'), -1) * OFFSET_RANGE
    return (offsets.sign() * (offsets.abs() + 1).log2() / math.log2(OFFSET_RANGE)).to(dtype)
