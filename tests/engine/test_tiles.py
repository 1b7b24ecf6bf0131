"""Tiles of large images: geometry, merging, run lengths, copies for small pictures."""

import platform
import resource
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData, PixelData
from pycocotools import mask as coco

from swin_mm.engine.tiles import (
    PlacedMask,
    Tile,
    encode_mask,
    merge_instances,
    paste_labels,
    place_instances,
    release_memory,
    resized_sample,
    split_into_tiles,
)


@pytest.mark.parametrize('size, side, overlap', [((100, 250), 64, 0.25), ((64, 64), 64, 0.2), ((30, 200), 50, 0.0)])
def test_tiles_cover_the_image_and_labels_are_joined(size, side, overlap):
    labels = np.random.default_rng(0).integers(0, 200, size, dtype=np.uint8)
    joined, times = np.full(size, 255, np.uint8), np.zeros(size, int)
    tiles = list(split_into_tiles(size, side, overlap))
    for tile in tiles:
        part = labels[tile.pixels].copy()
        assert part.shape == (min(side, size[0]), min(side, size[1]))
        if len(tiles) > 1 and overlap:  # what is next to an inner edge must not be used
            for axis, at in ((0, 0), (1, 0), (0, -1), (1, -1)):
                if tile.overlaps[axis if at == 0 else axis + 2]:
                    np.moveaxis(part, axis, 0)[at] = 255
        paste_labels(joined, part, tile)
        times[tile.pixels] += 1
    assert (joined == labels).all() and times.min() == 1
    shared = [t.overlaps for t in tiles]
    assert all(o == 0 or o >= overlap * side - 1 for each in shared for o in each)


def test_run_lengths_of_a_placed_mask():
    random = np.random.default_rng(0)
    for _ in range(50):
        mask = np.zeros((20, 30), bool)
        top, left = random.integers(0, 15), random.integers(0, 25)
        mask[top : top + 8, left : left + 8] = random.random((20, 30))[top : top + 8, left : left + 8] > 0.3
        mask[:, 3] |= random.random() > 0.5  # a whole column
        expected = coco.encode(np.asfortranarray(mask, np.uint8))
        placed = PlacedMask.crop(mask[2:, 1:], 2, 1) if not mask[:2].any() and not mask[:, 0].any() else None
        for found in (encode_mask(PlacedMask.crop(mask), (20, 30)), placed and encode_mask(placed, (20, 30))):
            assert found is None or found == {'size': [20, 30], 'counts': expected['counts'].decode()}


def test_objects_of_tiles_are_merged():
    pytest.importorskip('mmcv.ops')
    tiles = Tile(0, 0, 100, 100, (0, 0, 0, 30)), Tile(0, 70, 100, 170, (0, 30, 0, 0))

    def objects(*boxes):
        masks = np.zeros((len(boxes), 100, 100), bool)
        for mask, (x1, y1, x2, y2, _) in zip(masks, boxes, strict=True):
            mask[y1:y2, x1:x2] = True
        values = torch.tensor(boxes, dtype=torch.float)
        return InstanceData(
            bboxes=values[:, :4], scores=values[:, 4], labels=torch.zeros(len(boxes), dtype=torch.long), masks=masks
        )

    first = (5, 5, 20, 20, 0.9), (75, 10, 90, 30, 0.8), (90, 50, 100, 60, 0.99), (40, 70, 100, 90, 0.5)
    merged = merge_instances(
        [
            # Alone; in both tiles; cut, and whole in the other; cut, and too large for the overlap.
            place_instances(objects(*first), tiles[0]),
            place_instances(objects((5, 10, 20, 30, 0.7), (20, 50, 35, 60, 0.6)), tiles[1]),
        ]
    )
    assert merged.bboxes.tolist() == [[5, 5, 20, 20], [75, 10, 90, 30], [90, 50, 105, 60], [40, 70, 100, 90]]
    assert merged.scores.tolist() == pytest.approx([0.9, 0.8, 0.6, 0.5])
    for mask, (x1, y1, x2, y2) in zip(merged.masks, merged.bboxes.int().tolist(), strict=True):
        assert (mask.left, mask.top) == (x1, y1) and mask.pixels.shape == (y2 - y1, x2 - x1)


def test_an_empty_mask_stays_empty():
    placed = PlacedMask.crop(np.zeros((5, 6), bool), 3, 4)
    assert encode_mask(placed, (20, 30)) == encode_mask(np.zeros((20, 30), bool), (20, 30))


def test_a_sample_for_a_smaller_picture():
    structures = pytest.importorskip('mmdet.structures')
    mask = np.zeros((40, 60), bool)
    mask[10:20, 30:50] = True
    objects = InstanceData(
        bboxes=torch.tensor([[30.0, 10, 50, 20]]),
        scores=torch.tensor([0.5]),
        labels=torch.tensor([1]),
        masks=[PlacedMask.crop(mask)],
    )
    labels = PixelData(data=torch.from_numpy(mask.astype(np.uint8))[None])
    sample = structures.DetDataSample(pred_instances=objects, pred_sem_seg=labels)
    small = resized_sample(sample, 0.5)
    assert small.pred_instances.bboxes.tolist() == [[15, 5, 25, 10]]
    (half,) = small.pred_instances.masks
    assert (half.top, half.left) == (5, 15) and half.pixels.shape == (5, 10) and half.pixels.all()
    assert (small.pred_sem_seg.data[0].numpy() == mask[::2, ::2]).all()
    assert sample.pred_instances.bboxes.tolist() == [[30, 10, 50, 20]] and len(sample.pred_instances.masks) == 1


@pytest.mark.skipif(platform.libc_ver()[0] != 'glibc', reason='only glibc keeps freed memory and can be asked for it')
def test_freed_memory_is_returned():
    def resident():  # MB
        return int(Path('/proc/self/statm').read_text().split()[1]) * resource.getpagesize() / 1e6

    freed, kept = [], []
    for _ in range(1000):  # what is kept lies between what is freed
        freed.append(np.ones(100_000, np.uint8))
        kept.append(np.ones(2000, np.uint8))
    before = resident()
    del freed
    release_memory()
    assert before - resident() > 50
    assert len(kept) == 1000
