"""Checkpoints of whole detectors and segmentors, heads included."""

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from support.oracles import randomise, relative_error
from support.reference_models import NoRandomStart
from torch import nn

from swin_mm.checkpoints import convert, parse
from swin_mm.engine.runner import load_complete
from swin_mm.openmmlab.loading import read_for_mmengine

PAIRS = [
    (
        'swin_mm::mask_rcnn/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
        'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
    ),
    (
        'swin_mm::upernet/upernet_swin-t-p4-w7_8xb2-160k_ade20k-512x512.py',
        'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
    ),
]


def build(name: str, tmp_path) -> nn.Module:
    (tmp_path / 'config.py').write_text(f'_base_ = {name!r}\n')
    config = Config.fromfile(tmp_path / 'config.py')
    init_default_scope(config.default_scope)
    with NoRandomStart():
        return MODELS.build(config.model)


@pytest.mark.parametrize('ours, stock', PAIRS, ids=['mask_rcnn', 'upernet'])
@pytest.mark.parametrize('naming', ['mmdet', 'official'])
@torch.no_grad()
def test_whole_checkpoints_of_stock_models_load(ours, stock, naming, tmp_path):
    """As mmdet and mmseg publish them, and as the official repositories do, which named the backbone otherwise."""
    theirs, model = randomise(build(stock, tmp_path)), build(ours, tmp_path)
    state = theirs.state_dict()
    torch.save(convert(parse(state), naming)[0], tmp_path / 'whole.pth')
    load_complete(model, read_for_mmengine(str(tmp_path / 'whole.pth'))['state_dict'], 'whole.pth')
    assert model.backbone.load_report.complete and not model.backbone.load_report.new
    loaded = model.state_dict()
    others = [key for key in loaded if not key.startswith('backbone.')]
    assert len(others) > 40
    assert all(torch.equal(loaded[key], state[key]) for key in others)
    image = torch.rand(1, 3, 70, 90)
    theirs.backbone.eval()
    assert relative_error(model.backbone.eval()(image), theirs.backbone(image)) < 1e-5
