"""Geometry of COCO's masks: polygons and run lengths.

pycocotools decodes run lengths in C, trusting what the file says; here they are read in Python, in time and memory
bounded by their own length.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

Extent = tuple[float, float, float, float]  # x1, y1, x2, y2


class MaskError(ValueError):
    """What is wrong with a mask."""


def mask_extent(mask: Any, width: int, height: int) -> Extent:
    """The bounding box of a COCO ``segmentation`` in an image of ``width`` x ``height`` pixels.

    Raises:
        MaskError: the mask is malformed, empty, or does not fit the image.
    """
    try:
        if isinstance(mask, dict):
            return _run_length_extent(mask, width, height)
        if mask and not any(isinstance(polygon, (list, tuple)) for polygon in mask):
            raise MaskError('the mask is a flat list of numbers instead of a list of polygons: [[x, y, ...]]')
        return _polygon_extent([np.asarray(polygon, float) for polygon in mask], width, height)
    except MaskError:
        raise
    except Exception as error:  # JSON can hold anything here
        raise MaskError(f'the mask cannot be read: {type(error).__name__}: {error}') from error


def overlap(first: Extent, second: Extent) -> float:
    """Intersection over union of two boxes."""
    sides = [min(first[i + 2], second[i + 2]) - max(first[i], second[i]) for i in (0, 1)]
    if min(sides) <= 0:
        return 0.0
    area = [(box[2] - box[0]) * (box[3] - box[1]) for box in (first, second)]
    return sides[0] * sides[1] / (sum(area) - sides[0] * sides[1])


def decode_run_lengths(counts: str | bytes) -> list[int]:
    """The run lengths in COCO's compressed text: numbers of 5 bits per character, from the fourth on as differences.

    Raises:
        MaskError: the text is malformed.
    """
    runs: list[int] = []
    value = shift = 0
    for code in counts.encode('ascii', 'replace') if isinstance(counts, str) else counts:
        bits = code - 48
        if not 0 <= bits < 64 or shift > 40:
            raise MaskError('the run lengths are malformed')
        value |= (bits & 31) << shift
        shift += 5
        if bits & 32:
            continue
        if bits & 16:
            value -= 1 << shift
        runs.append(value + runs[-2] if len(runs) > 2 else value)
        value = shift = 0
    if shift:
        raise MaskError('the run lengths end within a number')
    return runs


def _run_length_extent(mask: dict, width: int, height: int) -> Extent:
    if list(mask['size']) != [height, width]:
        raise MaskError(f'mask of {mask["size"]} (height, width) for an image of {[height, width]}')
    counts = mask['counts']
    runs = np.asarray(counts if isinstance(counts, list) else decode_run_lengths(counts))
    if not len(runs) or runs.dtype.kind not in 'iu' or runs.ndim != 1 or runs.min() < 0:
        raise MaskError('the run lengths are not whole numbers from 0 up')
    ends = np.minimum(runs, width * height + 1).cumsum()  # a huge number must not wrap round
    if ends[-1] != width * height:
        raise MaskError(f'run lengths of {ends[-1]} pixels for an image of {width * height}')
    starts, ends = (ends - runs)[1::2], ends[1::2]  # background comes first; pixels run down the columns
    starts, ends = starts[ends > starts], ends[ends > starts]
    if not len(starts):
        raise MaskError('mask without a pixel')
    wraps = (starts // height != (ends - 1) // height).any()
    top, bottom = (0, height) if wraps else ((starts % height).min(), ((ends - 1) % height).max() + 1)
    return float(starts.min() // height), float(top), float((ends.max() - 1) // height + 1), float(bottom)


def _polygon_extent(polygons: Sequence[np.ndarray], width: int, height: int) -> Extent:
    for polygon in polygons:
        if polygon.ndim != 1 or len(polygon) < 6 or len(polygon) % 2 or not np.isfinite(polygon).all():
            raise MaskError(f'polygon of {polygon.size} numbers; expected at least three pairs x, y of finite numbers')
    xs, ys = (np.concatenate([polygon[start::2] for polygon in polygons]) for start in (0, 1))
    if min(xs.min(), ys.min()) < -1 or xs.max() > width + 1 or ys.max() > height + 1:
        raise MaskError(f'polygon reaches outside the image of {width} x {height}')
    doubled = [p[::2] @ np.roll(p[1::2], -1) - p[1::2] @ np.roll(p[::2], -1) for p in polygons]
    if np.abs(doubled).sum() <= 1e-3:
        raise MaskError('polygon without area')
    return float(xs.min()), float(ys.min()), float(xs.max()), float(ys.max())
