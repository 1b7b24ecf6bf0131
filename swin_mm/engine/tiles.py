"""Prediction on large images by tiles, and merging of the results.

The prediction of the whole image is assembled tile by tile, so that only the result grows with the image: one byte per
pixel for class ids (four for more than 256 classes), and boxes with masks as run lengths.
"""

import ctypes
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice, pairwise
from typing import Any, NamedTuple

import cv2
import numpy as np
import torch
from mmengine.structures import BaseDataElement, InstanceData, PixelData

from swin_mm.engine.images import WindowedImage
from swin_mm.utils.errors import InputError

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
    """A mask cropped to its object and stored as run lengths.

    Args:
        runs: COCO's run lengths of the crop.
        top: row of the image where it starts.
        left: column of the image where it starts.
    """

    runs: dict[str, Any]
    top: int
    left: int

    @classmethod
    def crop(cls, mask: np.ndarray, top: int = 0, left: int = 0) -> 'PlacedMask':
        """Crop a mask (H, W), which starts at this row and column of the image."""
        from pycocotools import mask as coco

        rows, columns = np.flatnonzero(mask.any(1)), np.flatnonzero(mask.any(0))
        if len(rows):
            mask = mask[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            top, left = top + int(rows[0]), left + int(columns[0])
        else:
            mask = np.zeros((1, 1), bool)
        return cls(coco.encode(np.asfortranarray(mask, np.uint8)), top, left)

    @property
    def pixels(self) -> np.ndarray:
        """The crop (h, w), bool."""
        from pycocotools import mask as coco

        return coco.decode(self.runs).astype(bool)

    def resized(self, scale: float) -> 'PlacedMask':
        """The mask in an image of another size."""
        height, width = (max(1, round(scale * side)) for side in self.runs['size'])
        pixels = cv2.resize(self.pixels.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST)
        return PlacedMask.crop(pixels, round(scale * self.top), round(scale * self.left))


def require_tile(tile: int, overlap: float) -> None:
    """Check the size and overlap of tiles.

    Raises:
        InputError: they are too small or too large.
    """
    if not (tile >= 32 and 0 <= overlap <= 0.9):
        raise InputError(f'tile {tile}, overlap {overlap}: expected at least 32 pixels, and a share from 0 to 0.9')


def is_larger(image: Any, tile: int | None) -> bool:
    """Whether an image (H, W, channels) has a side of more pixels than a tile."""
    return tile is not None and max(image.shape[:2]) > tile


def predict_tiles(
    image: np.ndarray | WindowedImage,
    predict: Callable[[list[np.ndarray]], Iterable[BaseDataElement]],
    side: int,
    overlap: float,
    batch_size: int = 1,
    classes: int = 256,
) -> dict[str, BaseDataElement]:
    """Predict on tiles batch by batch, keeping of each only what goes into the merged prediction.

    Args:
        image: (H, W, channels).
        predict: predicts on a batch of arrays (h, w, channels); samples of mmdet or mmseg.
        side: of the tiles, in pixels.
        overlap: least share of a tile that it has in common with the next.
        batch_size: tiles at a time.
        classes: their number.

    Returns:
        What a sample of the whole image gets: 'pred_instances', whose masks are a list of :class:`PlacedMask`, or
        'pred_sem_seg'.

    Raises:
        InputError: the predictions are panoptic, which cannot be merged.
    """
    height, width = image.shape[:2]
    labels: np.ndarray | None = None
    parts: list[InstanceData] = []
    tiles = split_into_tiles((height, width), side, overlap)
    while batch := list(islice(tiles, batch_size)):
        samples = predict([np.ascontiguousarray(image[tile.pixels]) for tile in batch])
        for tile, sample in zip(batch, samples, strict=True):
            if 'pred_panoptic_seg' in sample:
                raise InputError('panoptic segments cannot be merged across tiles; predict on whole images')
            if 'pred_sem_seg' in sample:
                if labels is None:
                    labels = np.zeros((height, width), np.uint8 if classes <= 256 else np.int32)
                paste_labels(labels, sample.pred_sem_seg.data[0].cpu().numpy(), tile)
            else:
                parts.append(place_instances(sample.pred_instances.cpu(), tile))
        release_memory()
    if labels is not None:
        return {'pred_sem_seg': PixelData(data=torch.from_numpy(labels)[None])}
    return {'pred_instances': merge_instances(parts)}


def release_memory() -> None:
    """Return memory that has been freed to the system.

    glibc does so by itself only above the last object in use. What is kept of each tile lies above the freed arrays of
    that tile, so that without this the process grows from tile to tile. Does nothing with other C libraries.
    """
    if sys.platform == 'linux':
        trim = getattr(ctypes.CDLL(None), 'malloc_trim', None)
        if trim is not None:
            trim(ctypes.c_size_t(0))


def place_instances(objects: InstanceData, tile: Tile) -> InstanceData:
    """Objects of a tile in coordinates of the image, without those cut by an edge that a neighbour has completely.

    Args:
        objects: bboxes, scores, labels, and masks if there are any, of mmdet.
        tile: where they were found.

    Returns:
        The same fields; the masks are a list of :class:`PlacedMask`.
    """
    objects = objects[~_left_to_neighbours(objects.bboxes, tile)]
    placed = InstanceData(
        bboxes=objects.bboxes + objects.bboxes.new_tensor([tile.left, tile.top] * 2),
        scores=objects.scores,
        labels=objects.labels,
    )
    if 'masks' in objects:
        placed.masks = [PlacedMask.crop(mask, tile.top, tile.left) for mask in np.asarray(objects.masks)]
    return placed


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


def merge_instances(parts: Sequence[InstanceData]) -> InstanceData:
    """Merge the objects of all tiles, as mmdet's ``merge_results_by_nms`` does, by suppression within each class.

    Args:
        parts: objects in coordinates of the image, at least one part.
    """
    from mmcv.ops import batched_nms

    boxes, scores, labels = (torch.cat([part.get(key) for part in parts]) for key in ('bboxes', 'scores', 'labels'))
    _, order = batched_nms(boxes, scores, labels, dict(type='nms', iou_threshold=IOU_THRESHOLD))
    merged = InstanceData(bboxes=boxes[order], scores=scores[order], labels=labels[order])
    if 'masks' in parts[0]:
        masks = [mask for part in parts for mask in part.masks]
        merged.masks = [masks[i] for i in order.tolist()]
    return merged


def resized_sample(sample: BaseDataElement, scale: float, with_masks: bool = True) -> BaseDataElement:
    """A copy of a merged prediction, and of the ground truth beside it, for a smaller picture of the image.

    Args:
        sample: of mmdet or mmseg, on the CPU.
        scale: of the picture.
        with_masks: keep the masks of objects.
    """
    result = sample.clone()  # of the sample, not of what it holds
    for key in ('pred_instances', 'gt_instances'):
        if key in sample:
            objects = sample.get(key).clone()
            boxes = objects.bboxes
            objects.bboxes = (boxes if isinstance(boxes, torch.Tensor) else boxes.tensor) * scale
            masks = objects.pop('masks', None)
            if masks is not None and with_masks:
                objects.masks = [mask.resized(scale) for mask in masks]
            setattr(result, key, objects)
    for key in ('pred_sem_seg', 'gt_sem_seg'):
        if key in sample:
            labels = sample.get(key).data
            rows, columns = (
                (torch.arange(max(1, round(scale * length))) / scale).long().clamp(max=length - 1)
                for length in labels.shape[-2:]
            )
            setattr(result, key, PixelData(data=labels[:, rows][:, :, columns]))
    return result


def _left_to_neighbours(boxes: torch.Tensor, tile: Tile) -> torch.Tensor:
    """Which boxes (n, 4) touch an inner edge of the tile and are smaller than the overlap there.

    Such an object is cut by the edge, but lies completely in the neighbouring tile.
    """
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
