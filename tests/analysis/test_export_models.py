"""Whole models that are exported: their replacements against mmdet's and mmseg's own predictions, and the files."""

import json
from itertools import product

import mmcv
import numpy as np
import pytest
import torch
from support import export_models
from torch import nn

import swin_mm  # noqa: F401 (registers the backbones)
from swin_mm.analysis.export import KEY, export
from swin_mm.analysis.export.comparison import compare
from swin_mm.analysis.export.reference import reference_outputs
from swin_mm.analysis.export.whole import Exportable, Resize
from swin_mm.openmmlab.config import load_config
from swin_mm.utils.compat import EXPORTS_ANY_SIZE
from swin_mm.utils.errors import InputError

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

# (batch, height, width): of a multiple of 32, which RTMDet's neck needs, and of none
SIZES = ((2, 96, 160), (1, 113, 90))
TWO_STAGE = ('faster-rcnn', 'mask-rcnn', 'cascade-mask-rcnn', 'mask-rcnn-v2')
SCALE = (160, 128)  # (width, height), of the tests of resizing


@torch.no_grad()
def check(model, exportable, sizes=SIZES):
    """Compare with the original on noise."""
    for batch, *size in sizes:
        image = torch.randn(batch, 3, *size, generator=torch.Generator().manual_seed(1))
        expected = reference_outputs(model, 'predictions', image, tuple(size))
        names = exportable.output_names(len(expected))
        found = compare(names, image, expected, exportable, exportable.mask_threshold)
        assert all(each.within_tolerance for each in found), found
        if 'scores' in names:
            assert found[0].shape[0] >= 10  # objects: otherwise nothing was compared


@pytest.mark.parametrize('name', export_models.ALL)
def test_replacements_predict_what_the_original_does(name, tmp_path):
    _, _, model = export_models.build(name, tmp_path)
    check(model, Exportable(model, 'predictions').eval(), SIZES[:1] if name == 'rtmdet' else SIZES)


@torch.no_grad()
@pytest.mark.parametrize('name', ['upernet', 'mask-rcnn', 'mask2former', 'mask2former-panoptic', 'rtmdet'])
def test_predictions_are_in_pixels_of_the_image_before_it_is_resized(name, tmp_path):
    _, _, model = export_models.build(name, tmp_path)
    resize = Resize(SCALE, keep_ratio=True, pad=SCALE if name == 'rtmdet' else None, value=114)
    exportable = Exportable(model, 'predictions', resize=resize).eval()
    image = torch.randint(0, 256, (1, 3, 113, 190), generator=torch.Generator().manual_seed(1)).float()
    native = mmcv.imrescale(image[0].permute(1, 2, 0).numpy().astype(np.uint8), SCALE)
    x = torch.from_numpy(native).permute(2, 0, 1)[None].float()
    size = (x.shape[2], x.shape[3])
    if name == 'rtmdet':
        x = nn.functional.pad(x, (0, SCALE[0] - size[1], 0, SCALE[1] - size[0]), value=114)
    assert (resize(image) - x).abs().max() <= 1
    x = resize(image)  # the original gets exactly the same numbers
    expected = reference_outputs(model, exportable.part, x, tuple(x.shape[2:]), (113, 190), size)
    names = exportable.output_names(len(expected))
    found = compare(names, image, expected, exportable, exportable.mask_threshold)
    assert all(each.within_tolerance for each in found), found
    if name in ('upernet', 'mask2former-panoptic'):
        assert expected[-1].shape[-2:] == (113, 190)
    else:
        assert found[0].shape[0] >= 10 and expected[0][..., 2].max() > 160


@pytest.mark.parametrize('scale', [(1333, 800), (2048, 512), (97, 131)])
def test_sizes_after_resizing_are_those_of_mmcv(scale):
    resize, sides = Resize(scale, keep_ratio=True), [*range(1, 40, 3), 256, 333, 480, 500, 640, 1080, 1920, 2048]
    for height, width in product(sides, sides):
        expected = mmcv.rescale_size((width, height), scale)[::-1]
        assert resize.size(height, width) == tuple(max(side, 1) for side in expected)
    assert Resize(scale, keep_ratio=False).size(7, 9) == scale[::-1]


@pytest.mark.parametrize('size', [(60, 81), (128, 160), (300, 250), (700, 1111)])
def test_pixels_after_resizing_are_those_of_opencv(size):
    image = np.random.default_rng(0).integers(0, 256, (*size, 3), np.uint8)
    found = Resize(SCALE, keep_ratio=True)(torch.from_numpy(image).permute(2, 0, 1)[None])[0].permute(1, 2, 0).numpy()
    expected = mmcv.imrescale(image, SCALE)
    assert found.shape == expected.shape
    differ = np.abs(found - expected)
    assert differ.max() <= 1 and differ.mean() < 0.2


@pytest.mark.skipif(not hasattr(torch, 'while_loop'), reason='this torch has no while_loop')
def test_replacements_by_operators_of_pytorch_only(tmp_path):
    _, _, model = export_models.build('retinanet', tmp_path)
    check(model, Exportable(model, 'predictions', onnx=False).eval(), SIZES[1:])


def test_two_stages_need_an_operator_that_pytorch_lacks(tmp_path):
    _, _, model = export_models.build('mask-rcnn', tmp_path)
    with pytest.raises(InputError, match='no operator for RoIAlign.*--to onnx or openvino'):
        Exportable(model, 'predictions', onnx=False)


def test_heads_without_a_replacement_are_named(tmp_path):
    _, _, model = export_models.build('retinanet', tmp_path)

    class OtherHead(type(model.bbox_head)):
        pass

    model.bbox_head.__class__ = OtherHead
    with pytest.raises(InputError, match=r'OtherHead: its predictions have no exportable replacement'):
        Exportable(model, 'predictions')


def test_other_suppressions_are_refused(tmp_path):
    _, _, model = export_models.build('retinanet', tmp_path)
    model.bbox_head.test_cfg.nms = dict(type='soft_nms', iou_threshold=0.5)
    with pytest.raises(InputError, match="RetinaHead: test_cfg.nms={'type': 'soft_nms'.* no standard operator"):
        Exportable(model, 'predictions')


def test_queries_are_what_panoptic_segments_are_merged_from(tmp_path):
    """The file ends where a graph has to; mmdet's own merge of its outputs gives the model's segments."""
    from mmdet.structures import DetDataSample

    _, _, model = export_models.build('mask2former-panoptic', tmp_path)
    fusion = model.panoptic_fusion_head
    fusion.test_cfg.update(object_mask_thr=0.05, iou_thr=0.0)  # random weights are not sure of anything
    exportable = Exportable(model, 'predictions').eval()
    assert (exportable.task, exportable.mask_format) == ('queries', None)
    image = torch.randn(1, 3, 96, 128, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        logits, masks = exportable(image)
        meta = dict(img_shape=(96, 128), ori_shape=(96, 128), batch_input_shape=(96, 128), pad_shape=(96, 128))
        (expected,) = model.predict(image, [DetDataSample(metainfo=meta)], rescale=True)
    segments = fusion.panoptic_postprocess(logits[0], masks[0]).sem_seg
    assert len(segments.unique()) > 1
    assert (segments == expected.pred_panoptic_seg.sem_seg).float().mean() > 0.999


FILES = [
    *((name, 'onnx') for name in export_models.NAMES),
    *((name, 'openvino') for name in export_models.NAMES),
    *((name, 'pt2') for name in export_models.NAMES if name not in TWO_STAGE),
]


RESIZING = [
    *((name, 'onnx') for name in ('upernet', 'retinanet', 'mask-rcnn', 'mask2former', 'dino', 'rtmdet')),
    *((name, 'openvino') for name in ('upernet', 'mask-rcnn')),
    *((name, 'pt2') for name in ('upernet', 'retinanet', 'mask2former')),
]


@pytest.mark.slow
@pytest.mark.skipif(not EXPORTS_ANY_SIZE, reason='this torch exports models for one size')
@pytest.mark.parametrize(
    'name, to, resize',
    [*((*file, False) for file in FILES), *((*file, True) for file in RESIZING)],
    ids=lambda value: 'resize' if value is True else value or '',
)
def test_files_of_any_size(name, to, resize, tmp_path):
    if to != 'pt2':
        pytest.importorskip('onnxscript')
        pytest.importorskip('openvino' if to == 'openvino' else 'onnxruntime')
    config, checkpoint, _ = export_models.build(name, tmp_path)
    suffix = {'onnx': 'onnx', 'openvino': 'xml', 'pt2': 'pt2'}[to]
    file = tmp_path / f'model.{suffix}'
    cfg = load_config(config)
    scale = (SCALE[0], SCALE[0]) if name == 'rtmdet' else SCALE
    for step in cfg.test_dataloader.dataset.pipeline if resize else ():
        step.update({'Resize': dict(scale=scale), 'Pad': dict(size=scale)}.get(step.type, {}))
    # compared at several sizes, else an error
    assert export(cfg, str(checkpoint), to, file, preprocess=True, resize=resize)
    metadata = json.loads(read_metadata(file))
    assert metadata['classes'] == list(export_models.CLASSES)
    multiple = 32 if name == 'rtmdet' and not resize else 1  # its neck's
    assert metadata['input']['dtype'] == 'uint8' and metadata['input']['size_divisor'] == multiple
    assert metadata['task'] in ('semantic', 'detection', 'instance', 'queries')
    assert (metadata['resize'] is None) == (metadata['input']['resize_inside'] is not None) == resize


def read_metadata(file):
    """The metadata, by the library that reads the file."""
    if file.suffix == '.onnx':
        import onnx

        model = onnx.load(file)
        assert {node.domain for node in model.graph.node} == {''}
        return next(entry.value for entry in model.metadata_props if entry.key == KEY)
    if file.suffix == '.xml':
        import openvino

        return openvino.Core().read_model(file).get_rt_info([KEY]).astype(str)
    extra = {KEY: ''}
    torch.export.load(file, extra_files=extra)
    return extra[KEY]
