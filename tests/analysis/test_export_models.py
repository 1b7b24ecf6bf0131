"""Whole models that are exported: their replacements against mmdet's and mmseg's own predictions, and the files."""

import json

import pytest
import torch
from support import export_models

import swin_mm  # noqa: F401 (registers the backbones)
from swin_mm.analysis.export import KEY, export
from swin_mm.analysis.export.comparison import compare
from swin_mm.analysis.export.reference import reference_outputs
from swin_mm.analysis.export.whole import Exportable
from swin_mm.openmmlab.config import load_config
from swin_mm.utils.errors import InputError

pytest.importorskip('mmdet')
pytest.importorskip('mmseg')

# (batch, height, width): of a multiple of 32, which RTMDet's neck needs, and of none
SIZES = ((2, 96, 160), (1, 113, 90))
TWO_STAGE = ('faster-rcnn', 'mask-rcnn', 'cascade-mask-rcnn')


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


def test_panoptic_segments_are_refused(tmp_path):
    _, _, model = export_models.build('mask2former', tmp_path)
    model.panoptic_fusion_head.test_cfg.instance_on = False
    with pytest.raises(InputError, match='panoptic segments are merged one after the other'):
        Exportable(model, 'predictions')


FILES = [
    *((name, 'onnx') for name in export_models.ALL),
    *((name, 'openvino') for name in export_models.ALL),
    *((name, 'pt2') for name in export_models.ALL if name not in TWO_STAGE),
]


@pytest.mark.slow
@pytest.mark.parametrize('name, to', FILES, ids=lambda value: value)
def test_files_of_any_size(name, to, tmp_path):
    if to != 'pt2':
        pytest.importorskip('onnxscript')
        pytest.importorskip('openvino' if to == 'openvino' else 'onnxruntime')
    config, checkpoint, _ = export_models.build(name, tmp_path)
    suffix = {'onnx': 'onnx', 'openvino': 'xml', 'pt2': 'pt2'}[to]
    file = tmp_path / f'model.{suffix}'
    cfg = load_config(config)
    assert export(cfg, str(checkpoint), to, file, preprocess=True)  # compared at several sizes, else an error
    metadata = json.loads(read_metadata(file))
    assert metadata['classes'] == list(export_models.CLASSES)
    assert metadata['input']['dtype'] == 'uint8' and metadata['input']['size_divisor'] == 1
    assert metadata['task'] in ('semantic', 'detection', 'instance')


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
