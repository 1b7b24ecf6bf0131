"""Configs: what they build, and that they differ from the stock ones in the backbone alone."""

from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import load_checkpoint
from oracles import randomise, relative_error
from zoo import NoRandomStart

import swin_mm
from swin_mm.checkpoints import convert, parse
from swin_mm.cli import use_safe_reader

CONFIGS = Path(__file__).parents[1] / 'configs'
LEAVES = sorted(CONFIGS.glob('[!_]*/*.py'))

# config, stock config it stands for, published parameter count of the whole model
STOCK = [
    (
        'mask_rcnn/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
        'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',
        47_794_602,
    ),
    (
        'upernet/upernet_swin-t-p4-w7_8xb2-160k_ade20k-512x512.py',
        'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py',
        59_941_862,
    ),
]


def load(name: str | Path, tmp_path: Path) -> Config:
    """A config of ours by path, or a stock one by its ``library::`` name."""
    if '::' in str(name):
        wrapper = tmp_path / 'stock.py'
        wrapper.write_text(f'_base_ = {name!r}\n')
        name = wrapper
    return Config.fromfile(name)


@pytest.mark.parametrize('ours, stock, parameters', STOCK, ids=lambda v: str(v).rpartition('/')[2])
def test_differs_from_the_stock_config_in_the_backbone_alone(ours, stock, parameters, tmp_path):
    config, expected = (load(c, tmp_path).to_dict() for c in (CONFIGS / ours, stock))
    assert config.pop('custom_imports') == {'imports': ['swin_mm']}
    backbone, replaced = config['model'].pop('backbone'), expected['model'].pop('backbone')
    for leftover in ('pretrained', 'checkpoint_file'):  # names of the weights' address
        config.pop(leftover, None), expected.pop(leftover, None)
    assert config == expected
    assert backbone.pop('type') == 'swin_mm.SwinTransformer'
    assert replaced.pop('type') == 'SwinTransformer'
    weights = backbone.pop('init_cfg')
    assert weights['checkpoint'].startswith('https://github.com/SwinTransformer/storage/releases/download/')
    replaced.pop('init_cfg')
    assert backbone == replaced


@pytest.mark.parametrize('ours, stock, parameters', STOCK, ids=lambda v: str(v).rpartition('/')[2])
def test_whole_models_have_the_published_size(ours, stock, parameters, tmp_path):
    config = load(CONFIGS / ours, tmp_path)
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    assert type(model.backbone) is swin_mm.SwinTransformer
    assert sum(p.numel() for p in model.parameters()) == parameters


def test_configs_are_found_by_library_name(tmp_path):
    ours = STOCK[0][0]
    assert load(f'swin_mm::{ours}', tmp_path).model == load(CONFIGS / ours, tmp_path).model


@pytest.mark.parametrize('leaf', LEAVES, ids=lambda p: p.stem)
def test_leaves_are_short_and_build(leaf, tmp_path):
    assert len(leaf.read_text().splitlines()) <= 10
    config = load(leaf, tmp_path)
    init_default_scope(config.default_scope)
    model = MODELS.build(config.model)
    features = model.backbone.num_features
    head = config.model.neck if 'neck' in config.model else config.model.decode_head
    assert list(head.in_channels) == [features[i] for i in model.backbone.out_indices]


@pytest.mark.parametrize('ours, stock, parameters', STOCK, ids=lambda v: str(v).rpartition('/')[2])
@pytest.mark.parametrize('naming', ['mmdet', 'official'])
@torch.no_grad()
def test_whole_checkpoints_of_stock_models_load(ours, stock, parameters, naming, tmp_path):
    """As mmdet and mmseg publish them, and as the official repositories do, which named the backbone otherwise."""
    models = []
    for name in (stock, CONFIGS / ours):
        config = load(name, tmp_path)
        init_default_scope(config.default_scope)
        with NoRandomStart():
            models.append(MODELS.build(config.model))
    theirs, model = randomise(models[0]), models[1]
    state = theirs.state_dict()
    torch.save(convert(parse(state), naming)[0], tmp_path / 'whole.pth')
    use_safe_reader()
    load_checkpoint(model, str(tmp_path / 'whole.pth'))
    assert model.backbone.load_report.complete and not model.backbone.load_report.new
    loaded = model.state_dict()
    others = [key for key in loaded if not key.startswith('backbone.')]
    assert len(others) > 40
    assert all(torch.equal(loaded[key], state[key]) for key in others)
    image = torch.rand(1, 3, 70, 90)
    theirs.backbone.eval()
    assert relative_error(model.backbone.eval()(image), theirs.backbone(image)) < 1e-5
