"""Token layout: from a map to windows and back, and which tokens of a window may see each other.

B batch, (H, W) map, (Hw, Ww) window, nW windows per padded map, N = Hw * Ww tokens per window, C channels.
Windows of one image are adjacent and in reading order: window n of image b is row b * nW + n.
"""

import math
from functools import lru_cache

import torch
import torch.nn.functional as F
from torch import Tensor

Size = tuple[int, int]

MASKED = (
    -100.0
)  # what every published Swin adds to a forbidden score; not -inf, so that equal weights give equal numbers


OFFSET_RANGE = 8.0  # V2 scales offsets to [-8, 8] before the logarithm of base 8


def padded(size: Size, window: Size) -> Size:
    """The smallest multiple of the window that holds the map."""
    return size[0] + -size[0] % window[0], size[1] + -size[1] % window[1]


def to_windows(x: Tensor, window: Size, shift: Size = (0, 0)) -> Tensor:
    """Cut a map into windows: zero-pad at the bottom and right, shift cyclically to the top left, cut.

    Args:
        x: (B, H, W, C), any H and W.
        window: (Hw, Ww).
        shift: how far the windows lie from the map's corner, (0, 0) to (Hw - 1, Ww - 1).

    Returns:
        (B * nW, Hw, Ww, C).
    """
    H, W = x.shape[1:3]
    Hp, Wp = padded((H, W), window)
    if (Hp, Wp) != (H, W):
        x = F.pad(x, (0, 0, 0, Wp - W, 0, Hp - H))
    if any(shift):
        x = x.roll((-shift[0], -shift[1]), (1, 2))
    x = x.unflatten(2, (-1, window[1])).unflatten(1, (-1, window[0]))  # (B, Hp / Hw, Hw, Wp / Ww, Ww, C)
    return x.transpose(2, 3).flatten(0, 2)


def from_windows(windows: Tensor, size: Size, shift: Size = (0, 0)) -> Tensor:
    """Undo :func:`to_windows` for a map of ``size`` (H, W): (B * nW, Hw, Ww, C) -> (B, H, W, C)."""
    Hw, Ww = windows.shape[1:3]
    Hp, Wp = padded(size, (Hw, Ww))
    x = windows.unflatten(0, (-1, Hp // Hw, Wp // Ww)).transpose(2, 3)  # (B, Hp / Hw, Hw, Wp / Ww, Ww, C)
    x = x.flatten(3, 4).flatten(1, 2)
    if any(shift):
        x = x.roll(shift, (1, 2))
    return x[:, : size[0], : size[1]]


def region_mask(size: Size, window: Size, shift: Size, device: torch.device) -> Tensor:
    """What to add to the scores of shifted windows so that tokens see only their own region.

    The cyclic shift brings tokens from opposite edges of the map into one window; those are kept apart. Padding is a
    region like any other: pad tokens are not masked, as in every published Swin.

    Returns:
        (nW, N, N), 0 where two tokens may see each other and ``MASKED`` where not. Cached: do not write to it.
    """
    # Tensors made while a graph is traced belong to that trace and must not reach the cache.
    build = _region_mask.__wrapped__ if torch.compiler.is_compiling() else _region_mask
    return build(padded(size, window), window, shift, device)


@lru_cache(maxsize=16)  # four stages at four sizes
def _region_mask(size: Size, window: Size, shift: Size, device: torch.device) -> Tensor:
    with torch.inference_mode(False):  # else a mask first built for inference could not serve training
        rows, columns = (
            (torch.arange(n, device=device) >= n - w).int() + (torch.arange(n, device=device) >= n - s).int()
            for n, w, s in zip(size, window, shift, strict=True)
        )
        regions = 3 * rows[:, None] + columns
        regions = to_windows(regions[None, :, :, None], window).flatten(1)  # (nW, N)
        return (regions[:, None, :] != regions[:, :, None]) * MASKED


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
    build = _relative_index.__wrapped__ if torch.compiler.is_compiling() else _relative_index
    return build(window, table_window, device)


@lru_cache(maxsize=64)
def _relative_index(window: Size, table_window: Size, device: torch.device) -> Tensor:
    with torch.inference_mode(False):
        rows, columns = (torch.arange(n, device=device) for n in window)
        rows = rows[:, None] - rows + table_window[0] - 1
        columns = columns[:, None] - columns + table_window[1] - 1
        # (Hw, 1, Hw, 1) and (1, Ww, 1, Ww) -> (Hw, Ww, Hw, Ww)
        index = rows[:, None, :, None] * (2 * table_window[1] - 1) + columns[None, :, None, :]
        return index.flatten(2).flatten(0, 1)


def log_spaced_offsets(window: Size, whole: Size, dtype: torch.dtype = torch.float32, device=None) -> Tensor:
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
