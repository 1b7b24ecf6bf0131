"""Token layout: from a map to windows and back, and which tokens of a window may see each other.

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
from torch.autograd import Function

Size = tuple[int, int]
Result = TypeVar('Result')

# What every published Swin adds to a forbidden score; not -inf, so that equal weights give equal numbers.
MASKED = -100.0
OFFSET_RANGE = 8.0  # V2 scales offsets to [-8, 8] before the logarithm of base 8


def functorch_active() -> bool:
    """Whether a transform of :mod:`torch.func` (jvp, vmap, grad ...) is running."""
    # There is no public way to ask. Without this one, transforms run through the kernels and fail there with an error.
    return getattr(torch._C, '_are_functorch_transforms_active', bool)()


def tracing() -> bool:
    """Whether operators are being recorded or transformed: tensors created now must not be cached."""
    return (
        torch.compiler.is_compiling()
        or torch.jit.is_tracing()
        or functorch_active()
        or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing())
    )


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
    # Written so that symbolic sizes stay simple.
    return (size[0] + window[0] - 1) // window[0] * window[0], (size[1] + window[1] - 1) // window[1] * window[1]


def window_partition(x: Tensor, window: Size, shift: Size = (0, 0), pad: Tensor | None = None) -> Tensor:
    """Cut a map into windows: pad at the bottom and right, shift cyclically to the top left, cut.

    Args:
        x: (B, H, W, C), any H and W.
        window: (Hw, Ww).
        shift: how far the windows lie from the map's corner, (0, 0) to (Hw - 1, Ww - 1).
        pad: (C,), what a padding token is; zeros by default.

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


class WindowMap(NamedTuple):
    """Where tokens stand. A slot is a place for a token in the windows of one image, one of nW * N.

    Args:
        tokens: (nW * N,), the token of each slot, as its place in the flattened map; anything for padding.
        slots: (H * W,), the slot of each token.
        pads: the slots that hold padding.
    """

    tokens: Tensor
    slots: Tensor
    pads: Tensor


def _wrapped(at: Tensor, length: int) -> Tensor:
    """``at % length`` of places below twice the length; ONNX's exporter takes no remainder by a symbolic length."""
    return torch.where(at < length, at, at - length)


def _tokens(size: Size, window: Size, shift: Size, device: torch.device) -> Tensor:
    """The token of each slot, (nW * N,), -1 for padding. Arithmetic alone, so that exporters can leave sizes open."""
    axes = zip(padded_size(size, window), window, shift, strict=True)
    rows, columns = (_wrapped(torch.arange(s, p + s, device=device), p).view(p // w, w) for p, w, s in axes)
    rows, columns = rows[:, None, :, None], columns[None, :, None, :]  # (nH, 1, Hw, 1) and (1, nW, 1, Ww)
    return torch.where((rows < size[0]) & (columns < size[1]), rows * size[1] + columns, -1).flatten()


def _slots(size: Size, window: Size, shift: Size, device: torch.device) -> Tensor:
    """The slot of each token, (H * W,). Arithmetic as well."""
    (Hp, Wp), (Hw, Ww) = padded_size(size, window), window
    axes = zip(size, (Hp, Wp), shift, strict=True)
    rows, columns = (_wrapped(torch.arange(p - s, n + p - s, device=device), p) for n, p, s in axes)
    rows = rows // Hw * (Wp // Ww * Hw * Ww) + rows % Hw * Ww
    return (rows[:, None] + columns // Ww * (Hw * Ww) + columns % Ww).flatten()


@_cached(64)
def window_map(size: Size, window: Size, shift: Size, device: torch.device) -> WindowMap:
    """The places of the tokens of a map of ``size`` (H, W)."""
    # On the CPU: the number of pads is needed.
    tokens, slots = (of(size, window, shift, torch.device('cpu')) for of in (_tokens, _slots))
    parts = (tokens.clamp(min=0), slots, (tokens < 0).nonzero().flatten())
    return WindowMap(*(part.to(device) for part in parts))


class _Gather(Function):
    """Gather windows from a map. The backward is a gather too, instead of the scattered sum of ``index_select``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, pad: Tensor, places: WindowMap) -> Tensor:
        ctx.places = places
        windows = x.index_select(1, places.tokens)
        if len(places.pads):
            windows[:, places.pads] = pad
        return windows

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, None]:
        places = ctx.places
        return grad.index_select(1, places.slots), grad[:, places.pads].sum((0, 1)), None


class _Scatter(Function):
    """Put windows back into a map."""

    @staticmethod
    def forward(ctx: Any, windows: Tensor, places: WindowMap) -> Tensor:
        ctx.places = places
        return windows.index_select(1, places.slots)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        places = ctx.places
        grad = grad.index_select(1, places.tokens)
        if len(places.pads):
            grad = grad.index_fill(1, places.pads, 0)
        return grad, None


def gather_windows(x: Tensor, window: Size, shift: Size, pad: Tensor) -> Tensor:
    """:func:`window_partition` by index, in one pass, and so its gradient."""
    if tracing():
        tokens = _tokens((x.shape[1], x.shape[2]), window, shift, x.device)
        windows = x.flatten(1, 2).index_select(1, tokens.clamp(min=0))
        windows = torch.where((tokens < 0)[:, None], pad, windows)
        Hp, Wp = padded_size((x.shape[1], x.shape[2]), window)
        return windows.view(x.shape[0] * (Hp // window[0]) * (Wp // window[1]), window[0] * window[1], x.shape[3])
    places = window_map((x.shape[1], x.shape[2]), window, shift, x.device)
    return _Gather.apply(x.flatten(1, 2), pad, places).view(-1, window[0] * window[1], x.shape[3])


def scatter_windows(windows: Tensor, size: Size, window: Size, shift: Size) -> Tensor:
    """:func:`window_reverse` by index, in one pass, and so its gradient."""
    if tracing():
        Hp, Wp = padded_size(size, window)
        images = windows.shape[0] // ((Hp // window[0]) * (Wp // window[1]))
        slots = _slots(size, window, shift, windows.device)
        return windows.reshape(images, Hp * Wp, -1).index_select(1, slots).unflatten(1, size)
    places = window_map(size, window, shift, windows.device)
    C = windows.shape[2]
    return _Scatter.apply(windows.reshape(-1, len(places.tokens), C), places).view(-1, *size, C)


def region_mask(size: Size, window: Size, shift: Size, device: torch.device) -> Tensor:
    """What to add to the scores of shifted windows so that tokens see only their own region.

    The cyclic shift brings tokens from opposite edges of the map into one window; those are kept apart. Padding is a
    region like any other: pad tokens are not masked, as in every published Swin.

    Returns:
        (nW, N, N), 0 where two tokens may see each other and ``MASKED`` where not. Cached: do not write to it.
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
    """Row of the bias table for each pair of tokens: the offset from the second token to the first.

    Args:
        window: (Hw, Ww) of the tokens.
        table_window: the window whose offsets the table lists, (2 * height - 1) * (2 * width - 1) rows in reading
            order. A smaller window reads the central part.
        device: where the index shall be.

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
    """Offsets between tokens of a window as V2's position bias takes them (Swin V2, equation 4).

    Args:
        window: (Hw, Ww) of the tokens.
        whole: the window whose largest offset is normalised to 1.
        dtype: of the result.
        device: where the result shall be.

    Returns:
        (2 * Hw - 1, 2 * Ww - 1, 2); the largest offset of ``whole`` becomes log2(9) / log2(8).
    """
    axes = [
        torch.arange(1 - side, side, device=device, dtype=torch.promote_types(dtype, torch.float32)) / max(most - 1, 1)
        for side, most in zip(window, whole, strict=True)
    ]
    offsets = torch.stack(torch.meshgrid(*axes, indexing='ij'), -1) * OFFSET_RANGE
    return (offsets.sign() * (offsets.abs() + 1).log2() / math.log2(OFFSET_RANGE)).to(dtype)
