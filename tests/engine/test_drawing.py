"""Pictures of predictions and annotations."""

import numpy as np
import pytest
import torch
from mmengine.structures import InstanceData, PixelData

from swin_mm.engine.drawing import draw_comparison, draw_instances, draw_label_map, with_legend
from swin_mm.engine.tiles import PlacedMask

PALETTE = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def test_legends_have_one_even_size():
    row = ((255, 0, 0), 'class')
    for width in (400, 401):
        picture = np.zeros((301, width, 3), np.uint8)
        shapes = {with_legend(picture, [row] * count, 'longest class').shape for count in (0, 1, 40)}
        assert len(shapes) == 1 and all(side % 2 == 0 for side in shapes.pop()[:2])


def test_regions_are_outlined_and_the_picture_stays_visible():
    picture = np.random.default_rng(0).integers(0, 256, (100, 100, 3), dtype=np.uint8)
    labels = np.full((100, 100), 9)  # void
    labels[20:60, 20:60], labels[20:60, 60:80] = 0, 1
    drawn = draw_label_map(picture, labels, PALETTE)
    assert (drawn[labels == 9] == picture[labels == 9]).all()
    edge = np.zeros((100, 100), bool)
    edge[20:60, 20:80] = True
    edge[21:59, 21:59] = edge[21:59, 61:79] = False
    colours = np.array(PALETTE)[np.where(labels == 9, 0, labels)]
    assert (drawn[edge] == colours[edge]).all()
    inside = drawn[25:55, 25:55].astype(float), picture[25:55, 25:55].astype(float)
    assert np.corrcoef(inside[0][..., 1].ravel(), inside[1][..., 1].ravel())[0, 1] > 0.99


def test_objects_are_outlined_by_mask_or_box():
    picture, mask = np.zeros((100, 100, 3), np.uint8), np.zeros((1, 100, 100), bool)
    mask[0, 30:50, 40:70] = True
    boxes, labels = np.array([[40.0, 30, 69, 49]]), np.array([1])
    outline = np.zeros((100, 100), bool)
    outline[30:50, 40:70] = True
    outline[31:49, 41:69] = False
    for masks in (mask, [PlacedMask.crop(mask[0])], None):
        drawn = draw_instances(picture, boxes, labels, PALETTE, masks)
        assert ((drawn == PALETTE[1]).all(-1) == outline).all()
    scored = draw_instances(picture, boxes, labels, PALETTE, mask, np.array([0.5]))
    assert ((scored == PALETTE[1]).all(-1) != outline).any()


def test_narrow_boxes_are_not_covered_by_scores():
    picture, mask = np.zeros((100, 100, 3), np.uint8), np.zeros((1, 100, 100), bool)
    mask[0, 30:50, 40:52] = True
    arguments = picture, np.array([[40.0, 30, 51, 49]]), np.array([1]), PALETTE, mask
    assert (draw_instances(*arguments, np.array([0.5])) == draw_instances(*arguments)).all()


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 200, (200, 300, 3), dtype=np.uint8)


def test_pixels_beside_their_ground_truth(picture):
    Sample = pytest.importorskip('mmseg.structures').SegDataSample
    truth, found = torch.full((1, 100, 150), 255), torch.zeros(1, 200, 300, dtype=torch.long)
    truth[:, 10:60, 10:60] = 1  # half the size of the picture; the rest is unlabelled
    found[:, 100:, :] = 2
    sample = Sample(gt_sem_seg=PixelData(data=truth), pred_sem_seg=PixelData(data=found))
    drawn = draw_comparison(picture, sample, ['a', 'b', 'c'], PALETTE)
    left, right = drawn[:200, :300], drawn[:200, 300:600]
    assert (left[:20] == picture[:20]).all() and (left[20, 20:120] == PALETTE[1]).all()
    assert (right[99] == PALETTE[0]).all() and (right[100] == PALETTE[2]).all()
    for side in (left, right):  # nothing is covered
        assert np.corrcoef(side[130:, :, 0].ravel(), picture[130:, :, 0].ravel())[0, 1] > 0.9


def test_objects_beside_their_ground_truth(picture):
    structures = pytest.importorskip('mmdet.structures')
    from mmdet.structures.bbox import HorizontalBoxes
    from mmdet.structures.mask import PolygonMasks

    square = [np.array([20.0, 30, 80, 30, 80, 90, 20, 90])]
    truth = InstanceData(
        bboxes=HorizontalBoxes(torch.tensor([[20.0, 30, 80, 90]])),
        labels=torch.tensor([1]),
        masks=PolygonMasks([square], 200, 300),
    )
    boxes = torch.tensor([[100.0, 30, 200, 90], [150.0, 100, 250, 190]])
    found = InstanceData(bboxes=boxes, labels=torch.tensor([1, 2]), scores=torch.tensor([0.9, 0.8]))
    sample = structures.DetDataSample(gt_instances=truth, pred_instances=found)
    drawn = draw_comparison(picture, sample, ['a', 'b', 'c'], PALETTE)
    left, right = (drawn[:200, x : x + 300] for x in (0, 300))
    assert (left[31:89, 20] == PALETTE[1]).all() and (left[:, 101:] == picture[:, 101:]).all()
    assert (right[150, 150] == PALETTE[2]).all() and (right[:, :90] == picture[:, :90]).all()
    assert (drawn[:, 600:] == PALETTE[1]).all(-1).any() and (drawn[:, 600:] == PALETTE[2]).all(-1).any(), 'the legend'
    del sample.gt_instances
    assert (draw_comparison(picture, sample, ['a', 'b', 'c'], PALETTE)[:200, :300] == picture).all()
