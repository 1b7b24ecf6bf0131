"""Which predictions count as right, and how pictures show it."""

import numpy as np
import pytest
from pycocotools import mask as rle
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from swin_mm.analysis.comparison import (
    MISSED,
    RIGHT,
    TRUTH,
    WRONG,
    contact_sheet,
    draw_annotation,
    draw_objects,
    draw_pixels,
    match_objects,
)


def disc(row: int, column: int, radius: int = 6, size: int = 64) -> np.ndarray:
    y, x = np.ogrid[:size, :size]
    return (y - row) ** 2 + (x - column) ** 2 <= radius**2


def has(picture: np.ndarray, colour: tuple[int, int, int]) -> np.ndarray:
    """Where a picture has a colour; lines are smoothed, so nearly is enough."""
    return np.abs(picture.astype(int) - colour).max(-1) < 40


PHOTO = np.full((64, 64, 3), 90, np.uint8)


@pytest.mark.parametrize('seed', range(5))
def test_matches_are_those_of_coco(seed):
    random = np.random.default_rng(seed)
    truth = np.stack([disc(*random.integers(8, 56, 2)) for _ in range(12)])
    moved = [np.roll(mask, tuple(random.integers(-3, 4, 2)), (0, 1)) for mask in truth]
    predicted = np.stack([moved[i] for i in random.integers(0, 12, 15)])  # some twice, some never

    def records(masks: np.ndarray) -> list[dict]:
        codes = rle.encode(np.asfortranarray(masks.transpose(1, 2, 0), np.uint8))
        return [
            dict(
                id=i,
                image_id=1,
                category_id=1,
                iscrowd=0,
                segmentation=code,
                area=float(rle.area(code)),
                score=1 - i / 100,
            )
            for i, code in enumerate(codes, start=1)
        ]

    coco = COCO()
    coco.dataset = dict(info={}, images=[dict(id=1, width=64, height=64)], categories=[dict(id=1, name='disc')])
    coco.dataset['annotations'] = records(truth)
    coco.createIndex()
    evaluation = COCOeval(coco, coco.loadRes(records(predicted)), 'segm')
    evaluation.params.iouThrs = np.array([0.5])
    evaluation.evaluate()
    expected = evaluation.evalImgs[0]
    right, found = match_objects(truth, predicted)
    assert right.tolist() == (expected['dtMatches'][0] > 0).tolist()
    assert found.tolist() == (expected['gtMatches'][0] > 0).tolist()
    assert 0 < right.sum() < len(right)


def test_nothing_matches_nothing():
    nothing, something = np.zeros((0, 64, 64), bool), disc(30, 30)[None]
    for truth, predicted in ((nothing, something), (something, nothing), (nothing, nothing)):
        right, found = match_objects(truth, predicted)
        assert (right.shape, found.shape) == ((len(predicted),), (len(truth),))
        assert not right.any() and not found.any()


def test_objects_have_the_colour_of_what_they_are():
    truth = np.stack([disc(15, 15), disc(15, 48)])
    predicted = np.stack([disc(16, 15), disc(48, 15)])
    drawn = draw_objects(PHOTO, truth, predicted)
    top, left = np.s_[:64], np.s_[:64]
    assert has(drawn, RIGHT)[top, left].any() and not has(drawn, RIGHT)[64:].any()
    assert has(drawn, MISSED)[top, 64:].any() and not has(drawn, MISSED)[64:].any()
    assert has(drawn, WRONG)[64:, left].any() and not has(drawn, WRONG)[top].any()
    assert has(draw_annotation(PHOTO, truth), TRUTH)[top].any()
    for picture in (drawn, draw_annotation(PHOTO, truth)):
        assert (picture == 90).all(-1).mean() > 0.8  # the photograph is visible, inside the objects as well
        assert (picture[30, 30] == 90).all()


def test_pixels_one_off_the_outline_are_not_errors():
    truth = disc(30, 30, 10)
    for shift in ((1, 0), (0, -1), (1, 1)):
        drawn = draw_pixels(PHOTO, truth, np.roll(truth, shift, (0, 1)))
        assert has(drawn, RIGHT).any() and not has(drawn, WRONG).any() and not has(drawn, MISSED).any()
    drawn = draw_pixels(PHOTO, truth, np.roll(truth, 6, 1))
    assert has(drawn, WRONG)[:, 76:].any() and not has(drawn, WRONG)[:, :50].any()
    assert has(drawn, MISSED)[:, :50].any() and not has(drawn, MISSED)[:, 76:].any()


def test_a_contact_sheet_shows_every_panel():
    panels = [[np.full((64, 64, 3), 20 * row + 60 * column, np.uint8) for column in range(3)] for row in range(2)]
    sheet = np.asarray(contact_sheet(('a', 'b', 'c'), panels))
    for panel in (panel for row in panels for panel in row if panel.any()):
        assert (sheet == panel[0, 0]).all(-1).sum() >= 64 * 64
