"""data/nuclei: images, instance masks and semantic masks agree, and no field of view is in both splits."""

import json
from functools import cache
from pathlib import Path

import cv2
import numpy as np
import pytest
from pycocotools import mask as rle
from support.tool_fixtures import ROOT

NUCLEI = ROOT / 'data/nuclei'
SPLITS = ('train', 'val')


@cache
def annotations(split: str) -> dict:
    return json.loads((NUCLEI / f'annotations/{split}.json').read_text())


@cache
def images(split: str) -> dict[str, np.ndarray]:
    files = sorted((NUCLEI / split).glob('*.jpg'))
    return {file.stem: cv2.imread(str(file), cv2.IMREAD_GRAYSCALE).astype(float) for file in files}


@pytest.mark.parametrize('split', SPLITS)
def test_every_image_has_its_annotations(split):
    content = annotations(split)
    assert sorted(image['file_name'] for image in content['images']) == sorted(f'{name}.jpg' for name in images(split))
    assert sorted(file.stem for file in (NUCLEI / 'masks' / split).iterdir()) == sorted(images(split))
    assert {a['image_id'] for a in content['annotations']} == {image['id'] for image in content['images']}
    for image in content['images']:
        assert images(split)[Path(image['file_name']).stem].shape == (image['height'], image['width'])


@pytest.mark.parametrize('split', SPLITS)
def test_instance_and_semantic_masks_agree(split):
    by_image = {image['id']: [] for image in annotations(split)['images']}
    for annotation in annotations(split)['annotations']:
        mask = rle.decode(annotation['segmentation'])
        assert annotation['area'] == mask.sum() > 0
        assert annotation['bbox'] == rle.toBbox(annotation['segmentation']).tolist()
        by_image[annotation['image_id']].append(mask)
    for image in annotations(split)['images']:
        covered = np.any(by_image[image['id']], axis=0)
        semantic = cv2.imread(str(NUCLEI / 'masks' / split / image['file_name']).replace('jpg', 'png'), -1)
        assert np.array_equal(semantic, covered)


def edges(tiles: list[np.ndarray], side: str) -> np.ndarray:
    """One edge of each tile (tiles, length), smoothed; the square root makes the camera's noise even."""
    cut = {'right': np.s_[:, -1], 'left': np.s_[:, 0], 'bottom': np.s_[-1], 'top': np.s_[0]}[side]
    return np.stack([np.convolve(np.sqrt(tile[cut]), np.ones(3) / 3, 'valid') for tile in tiles])


def continuation(first: np.ndarray, second: np.ndarray) -> np.ndarray:
    """How well each first edge continues in each second one: 1 is exactly, 0 no better than any two edges."""
    difference = ((first[:, None] - second[None]) ** 2).mean(-1)
    return 1 - difference / (first.var(1)[:, None] + second.var(1)[None] + 0.02)


OPPOSITE = {'right': 'left', 'left': 'right', 'bottom': 'top', 'top': 'bottom'}
# Where a tile lies in its field (a b over c d): the sides on which another tile follows.
INSIDE = {
    'a': {'right': 'b', 'bottom': 'c'},
    'b': {'left': 'a', 'bottom': 'd'},
    'c': {'right': 'd', 'top': 'a'},
    'd': {'left': 'c', 'top': 'b'},
}


def test_no_field_of_view_is_in_both_splits():
    """The images are quarters of larger fields; a field in both splits would make the metrics optimistic."""
    tiles = images('train') | images('val')
    names = list(tiles)
    assert {name[:2] for name in images('val')}.isdisjoint(name[:2] for name in images('train'))
    for side, opposite in OPPOSITE.items():
        match = continuation(edges(list(images('val').values()), side), edges(list(tiles.values()), opposite))
        for row, name in zip(match, images('val'), strict=True):
            if side in INSIDE[name[2]]:  # of all images the one that continues this edge is in the same field
                assert names[row.argmax()] == name[:2] + INSIDE[name[2]][side]
                assert row.max() > 0.8


def test_it_is_small():
    assert sum(file.stat().st_size for file in NUCLEI.rglob('*') if file.is_file()) < 8e6
