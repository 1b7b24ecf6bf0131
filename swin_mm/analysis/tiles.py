"""Tiles of large images, and merging of the predictions on them.

The prediction of the whole image is assembled tile by tile, so that only the result grows with the image: class ids of
pixels, and boxes with masks that are no larger than their boxes.
"""

from collections.abc import Iterator, Sequence
from itertools import pairwise
from typing import Any, NamedTuple

import numpy as np
import torch

IOU_THRESHOLD = 0.5  # boxes of one class with a larger overlap are one object, found in two tiles


class Tile(NamedTuple):
    """A part of an image: where it starts and ends, and how much of it overlaps its neighbours.

    Args:
        top: first row.
        left: first column.
        bottom: row after the last.
        right: column after the last.
        overlaps: pixels in common with the neighbours above, to the left, below, to the right; 0 at the image's edges.
    """

    top: int
    left: int
    bottom: int
    right: int
    overlaps: tuple[int, int, int, int]

    @property
    def pixels(self) -> tuple[slice, slice]:
        """Rows and columns of the image."""
        return slice(self.top, self.bottom), slice(self.left, self.right)


class PlacedMask(NamedTuple):
    """A mask cropped to its object.

    Args:
        pixels: (h, w) bool.
        top: row of the image where it starts.
        left: column of the image where it starts.
    """

    pixels: np.ndarray
    top: int
    left: int

    @classmethod
    def crop(cls, mask: np.ndarray, top: int = 0, left: int = 0) -> 'PlacedMask':
        """Crop a mask (H, W), which starts at this row and column of the image."""
        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if not len(rows):
            return cls(np.zeros((0, 0), bool), top, left)
        pixels = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
        return cls(pixels.copy(), top + int(rows[0]), left + int(columns[0]))


def split_into_tiles(size: tuple[int, int], side: int, overlap: float) -> Iterator[Tile]:
    """Cover an image with tiles of one size, row by row.

    Args:
        size: (height, width) of the image.
        side: of the tiles, in pixels; smaller along an axis where the image is smaller.
        overlap: least share of a tile that it has in common with the next.
    """
    rows, columns = (_spans(length, side, overlap) for length in size)
    for top, bottom, above, below in rows:
        for left, right, before, after in columns:
            yield Tile(top, left, bottom, right, (above, before, below, after))


def _spans(length: int, side: int, overlap: float) -> list[tuple[int, int, int, int]]:
    """Start, end, and overlap with the previous and the next span, evenly spread over an axis."""
    side = min(side, length)
    step = max(int(side * (1 - overlap)), 1)
    count = -(-(length - side) // step) + 1
    starts = [round(i * (length - side) / max(count - 1, 1)) for i in range(count)]
    shared = [0, *(a + side - b for a, b in pairwise(starts)), 0]
    return [(start, start + side, shared[i], shared[i + 1]) for i, start in enumerate(starts)]


def paste_labels(target: np.ndarray, labels: np.ndarray, tile: Tile) -> None:
    """Copy the class ids of a tile into those of the image; neighbours meet in the middle of their overlap.

    Args:
        target: (H, W) of the image, changed in place.
        labels: (h, w) of the tile.
        tile: the tile.
    """
    above, before, below, after = tile.overlaps
    rows = slice(above // 2, labels.shape[0] - (below - below // 2))
    columns = slice(before // 2, labels.shape[1] - (after - after // 2))
    target[tile.pixels][rows, columns] = labels[rows, columns]


def merge_instances(parts: Sequence[tuple[Tile, Any]]) -> Any:
    """Merge the objects of all tiles, as mmdet's ``merge_results_by_nms`` does, by suppression within each class.

    An object that is cut by the edge of a tile, but small enough to lie completely in the neighbouring tile, is taken
    from the neighbour.

    Args:
        parts: tiles and their mmdet ``InstanceData``, at least one.

    Returns:
        InstanceData with bboxes, scores, labels, and masks as a list of :class:`PlacedMask` if the tiles have masks.
    """
    from mmcv.ops import batched_nms
    from mmengine.structures import InstanceData

    boxes, scores, labels, masks = [], [], [], []
    has_masks = False
    for tile, objects in parts:
        keep = ~_left_to_neighbours(objects.bboxes, tile)
        boxes.append(objects.bboxes[keep] + objects.bboxes.new_tensor([tile.left, tile.top] * 2))
        scores.append(objects.scores[keep])
        labels.append(objects.labels[keep])
        has_masks = has_masks or 'masks' in objects
        if 'masks' in objects:
            kept = np.asarray(objects.masks[keep])
            masks += [PlacedMask.crop(mask, tile.top, tile.left) for mask in kept]
    all_boxes, all_scores, all_labels = torch.cat(boxes), torch.cat(scores), torch.cat(labels)
    _, order = batched_nms(all_boxes, all_scores, all_labels, dict(type='nms', iou_threshold=IOU_THRESHOLD))
    merged = InstanceData(bboxes=all_boxes[order], scores=all_scores[order], labels=all_labels[order])
    if has_masks:
        merged.masks = [masks[i] for i in order.tolist()]
    return merged


def _left_to_neighbours(boxes: torch.Tensor, tile: Tile) -> torch.Tensor:
    """Which boxes (n, 4) touch an inner edge of the tile and are smaller than the overlap there."""
    above, before, below, after = tile.overlaps
    width, height = boxes[:, 2] - boxes[:, 0], boxes[:, 3] - boxes[:, 1]
    margin = 2  # pixels
    cut = (boxes[:, 1] < margin) & (height < above)
    cut |= (boxes[:, 0] < margin) & (width < before)
    cut |= (boxes[:, 3] > tile.bottom - tile.top - margin) & (height < below)
    return cut | ((boxes[:, 2] > tile.right - tile.left - margin) & (width < after))


def encode_mask(mask: Any, size: tuple[int, int]) -> dict[str, Any]:
    """COCO's run lengths of a mask, as JSON takes them.

    Args:
        mask: (H, W) of the image, or a :class:`PlacedMask`.
        size: (height, width) of the image.
    """
    from pycocotools import mask as coco

    if isinstance(mask, PlacedMask):
        encoded = coco.frPyObjects({'size': list(size), 'counts': _run_lengths(mask, size)}, *size)
    else:
        encoded = coco.encode(np.asfortranarray(mask, np.uint8))
    return {'size': list(encoded['size']), 'counts': encoded['counts'].decode()}


def _run_lengths(mask: PlacedMask, size: tuple[int, int]) -> list[int]:
    """Lengths of alternating runs of 0 and 1, column by column, without making a mask of the image's size."""
    height, width = size
    padded = np.pad(mask.pixels.astype(np.int8), ((1, 1), (0, 0)))
    columns, starts = np.nonzero((np.diff(padded, axis=0) == 1).T)
    _, ends = np.nonzero((np.diff(padded, axis=0) == -1).T)
    if not len(starts):
        return [height * width]
    offsets = (columns + mask.left) * height + mask.top
    edges = np.stack([offsets + starts, offsets + ends], -1).ravel()
    # A run that ends at the bottom of one column and begins at the top of the next is one run.
    inside = np.repeat(edges[1:-1:2] == edges[2::2], 2)
    edges = edges[~np.concatenate([[False], inside, [False]])]
    lengths = np.diff(np.concatenate([[0], edges, [height * width]])).tolist()
    return lengths if lengths[-1] else lengths[:-1]
