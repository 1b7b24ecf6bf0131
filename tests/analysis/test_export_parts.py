"""Parts of the export: operators on boxes, preprocessing, and the comparison."""

import math

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from support import export_models
from support.exported import require_exporter

from swin_mm.analysis.export.comparison import compare, paste_masks
from swin_mm.analysis.export.operators import CUSTOM, best, looped_nms, nms, onnx_translations
from swin_mm.analysis.export.query_heads import edges
from swin_mm.analysis.export.replacements import exportable_copy
from swin_mm.analysis.export.roi_heads import RoIExtractor
from swin_mm.analysis.export.run import preprocess_module


def random_boxes(count, seed=0, batch=2):
    generator = torch.Generator().manual_seed(seed)
    boxes = torch.rand(batch, count, 4, generator=generator) * 60
    boxes[..., 2:] += boxes[..., :2]
    return boxes, torch.rand(batch, count, generator=generator)


@pytest.mark.parametrize('suppress', [nms, looped_nms])
@pytest.mark.parametrize('threshold', [0.1, 0.5])
def test_suppression_is_mmcvs(suppress, threshold):
    if suppress is looped_nms and not hasattr(torch, 'while_loop'):
        pytest.skip('this torch has no while_loop')
    ops = pytest.importorskip('mmcv.ops')
    boxes, scores = random_boxes(150)
    kept = suppress(boxes, scores, threshold)
    for i in range(2):
        expected = torch.zeros(150, dtype=torch.bool)
        expected[ops.nms(boxes[i], scores[i], threshold)[1]] = True
        assert 10 < expected.sum() < 140 and torch.equal(kept[i], expected)


class Suppression(torch.nn.Module):
    def forward(self, boxes, scores):
        return nms(boxes, scores, 0.3)


def test_suppression_in_onnx():
    runtime = pytest.importorskip('onnxruntime')
    require_exporter()
    count = torch.export.Dim('count', min=2)
    program = torch.export.export(
        Suppression(), random_boxes(20), dynamic_shapes=({0: torch.export.Dim('batch'), 1: count},) * 2
    )
    file = torch.onnx.export(program, custom_translation_table=onnx_translations(), dynamo=True, verbose=False)
    session = runtime.InferenceSession(file.model_proto.SerializeToString())
    boxes, scores = random_boxes(77, seed=3, batch=3)
    inputs = {entry.name: value.numpy() for entry, value in zip(session.get_inputs(), (boxes, scores), strict=True)}
    assert np.array_equal(session.run(None, inputs)[0], nms(boxes, scores, 0.3).numpy())


def test_the_best_are_padded_with_zeros():
    boxes, scores = random_boxes(4)
    scores[:, 2] = 0
    chosen, values, groups = best(6, scores, boxes, torch.tensor([[3, 4, 5, 6]] * 2))
    assert torch.equal(values[:, :3], scores[:, [0, 1, 3]].sort(descending=True).values)
    assert not values[:, 3:].any() and not chosen[:, 3:].any() and not groups[:, 3:].any()
    assert all(5 not in row for row in groups.tolist())


def test_edges_of_masks():
    there = torch.tensor([[[0, 1, 0, 1, 0], [0, 0, 0, 0, 0], [1, 1, 1, 1, 1]]], dtype=torch.bool)
    first, last = edges(there)
    assert first.tolist() == [[1, 0, 0]] and last.tolist() == [[4, 0, 5]]


PREPROCESSORS = {
    'rgb': dict(type='mmdet.DetDataPreprocessor', bgr_to_rgb=True, pad_size_divisor=32, pad_value=0.5),
    'bgr': dict(type='mmdet.DetDataPreprocessor', bgr_to_rgb=False, pad_size_divisor=32),
    'mmseg': dict(type='mmseg.SegDataPreProcessor', bgr_to_rgb=True, size=(64, 64), test_cfg=dict(size_divisor=16)),
}


@pytest.mark.parametrize('kind', PREPROCESSORS)
def test_preprocessing_is_that_of_the_config(kind):
    scope = PREPROCESSORS[kind]['type'].partition('.')[0]
    pytest.importorskip(f'{scope}.models')
    settings = PREPROCESSORS[kind] | dict(mean=[10.0, 20, 30], std=[1.0, 2, 3])
    image = torch.randint(0, 256, (2, 3, 40, 70), dtype=torch.uint8)  # as OpenCV reads them
    samples = None
    if scope == 'mmseg':
        from mmseg.structures import SegDataSample

        samples = [SegDataSample(), SegDataSample()]
    expected = MODELS.build(settings)({'inputs': list(image), 'data_samples': samples}, False)['inputs']
    actual = preprocess_module(Config(dict(model=dict(data_preprocessor=settings))))(image.flip(1))
    torch.testing.assert_close(actual, expected)


NAMES = ['boxes', 'scores', 'labels', 'masks']


def objects():
    """Two images with three and one objects, as a file gives them and as PyTorch does."""
    boxes = torch.tensor([[[4.0, 4, 20, 16], [10, 2, 30, 30], [0, 0, 8, 8]], [[2, 2, 12, 12], [0] * 4, [0] * 4]])
    scores = torch.tensor([[0.9, 0.8, 0.7], [0.6, 0, 0]])
    labels = torch.tensor([[0, 1, 0], [1, 0, 0]])
    masks = torch.rand(2, 3, 28, 28, generator=torch.Generator().manual_seed(0))
    whole = torch.stack([paste_masks(m, b, (32, 40)) for m, b in zip(masks, boxes, strict=True)]) >= 0.5
    return [boxes, scores, labels, whole], [boxes.clone(), scores.clone(), labels.clone(), masks.clone()]


def measured(expected, actual):
    """What is beyond its tolerance."""
    found = compare(NAMES, torch.zeros(2, 3, 32, 40), expected, lambda image: actual, 0.5)
    assert len(found) == 4
    return {each.measure for each in found if not each.within_tolerance}


def test_equal_objects_agree_in_any_order():
    expected, actual = objects()
    assert measured(expected, actual) == set()
    order = [2, 0, 1]
    assert measured(expected, [output[:, order] for output in actual]) == set()


@pytest.mark.parametrize(
    'output, change, measure',
    [
        (0, lambda boxes: boxes + torch.tensor([0, 0, 0.5, 0]), 'largest 1 - IoU of boxes'),
        (0, lambda boxes: boxes + 5, 'share of objects without a partner'),
        (1, lambda scores: scores * 0.99, 'largest difference of scores'),
        (1, lambda scores: scores + 0.5, 'share of objects without a partner'),  # padding becomes objects
        (2, lambda labels: 1 - labels, 'share of objects without a partner'),
        (3, lambda masks: masks.flip(-1), 'mean 1 - IoU of masks'),
    ],
)
def test_objects_that_differ(output, change, measure):
    expected, actual = objects()
    actual[output] = change(actual[output])
    assert measure in measured(expected, actual)


def test_labels_that_differ():
    labels = torch.zeros(1, 50, 50, dtype=torch.long)
    other = labels.clone()
    other[0, 0, :2] = 1
    assert compare(['labels'], labels, [labels], lambda image: [other])[0].value == pytest.approx(2 / 2500)
    other[0, 0, :3] = 1
    assert not compare(['labels'], labels, [labels], lambda image: [other])[0].within_tolerance


def test_a_file_that_does_not_run():
    def fails(image):
        raise RuntimeError('no such operator')

    for names in (['labels'], NAMES):
        expected = objects()[0] if names == NAMES else [torch.zeros(1, 4, 4)]
        (found,) = compare(names, torch.zeros(1, 3, 4, 4), expected, fails)
        assert found.value == math.inf and found.error == 'no such operator' and not found.within_tolerance


def test_nan_does_not_pass():
    expected = torch.ones(1, 2, 4, 4)
    (found,) = compare(['logits'], expected, [expected], lambda image: [expected * math.nan])
    assert not found.within_tolerance


def test_masks_are_pasted_as_mmdet_does():
    fcn = pytest.importorskip('mmdet.models.roi_heads.mask_heads.fcn_mask_head')
    boxes, _ = random_boxes(6, batch=1)
    masks = torch.rand(6, 28, 28)
    head = fcn.FCNMaskHead(num_classes=1, class_agnostic=True)
    from mmengine.structures import InstanceData

    meta = dict(scale_factor=(1.0, 1.0), ori_shape=(70, 90))
    results = head.predict_by_feat(
        (masks[:, None].logit(),),
        [InstanceData(bboxes=boxes[0].clone(), labels=torch.zeros(6, dtype=torch.long))],
        [meta],
        Config(dict(mask_thr_binary=0.5)),
        rescale=True,
    )
    ours = paste_masks(masks, boxes[0], (70, 90)) >= 0.5
    assert (ours != results[0].masks).float().mean() < 1e-4


def test_regions_are_pooled_from_the_levels_of_mmdet():
    extractors = pytest.importorskip('mmdet.models.roi_heads.roi_extractors')
    layer = dict(type='RoIAlign', output_size=7, sampling_ratio=0)
    theirs = extractors.SingleRoIExtractor(layer, out_channels=4, featmap_strides=[4, 8, 16, 32])
    feats = tuple(torch.randn(2, 4, 512 // stride, 640 // stride) for stride in (4, 8, 16, 32))
    low = torch.rand(60, 2) * 200
    sides = torch.logspace(0, 2.8, 60)[:, None] * torch.tensor([1.0, 0.7])  # up to 630 pixels: every level
    rois = torch.cat((torch.arange(60)[:, None] % 2, low, low + sides), dim=1)
    assert len(theirs.map_roi_levels(rois, 4).unique()) == 4
    torch.testing.assert_close(RoIExtractor(theirs, CUSTOM)(feats, rois), theirs(feats, rois))


def test_the_pixel_decoder_is_mmdets(tmp_path):
    pytest.importorskip('mmseg')
    _, _, model = export_models.build('mask2former-semantic', tmp_path)
    theirs = model.decode_head.pixel_decoder
    ours = exportable_copy(model, CUSTOM, heads=False, pooling=False).decode_head.pixel_decoder
    feats = [torch.randn(2, 16 * 2**i, 48 // 2**i, 40 // 2**i) for i in range(4)]
    with torch.no_grad():
        expected, actual = theirs(feats), ours(feats)
    torch.testing.assert_close(actual[0], expected[0], rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(actual[1], expected[1], rtol=1e-4, atol=1e-4)
