"""Plugging: stock Swin configs compute the same with our Swin; others train and predict with it."""

import inspect
import json
import os
import re
import subprocess
import sys
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from mmdet.models.backbones.swin import SwinTransformer as MMDetSwin
from mmengine.config import Config
from mmengine.dataset import pseudo_collate
from mmengine.logging import MessageHub
from mmengine.model import revert_sync_batchnorm
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, PARAM_SCHEDULERS, TRANSFORMS, DefaultScope
from mmengine.utils import get_installed_path
from support.oracles import randomise, relative_error
from support.reference_models import NoRandomStart, reference
from support.tool_fixtures import ROOT

from swin_mm.openmmlab.config import build_model, is_pure_python, load_config, with_type_names
from swin_mm.openmmlab.layer_decay import NO_DECAY
from swin_mm.openmmlab.plug import PartStrides, plug, plug_with_report, show, write
from swin_mm.utils.errors import InputError

TABLE = ROOT / 'docs/plug.md'


def stock_configs(library: str) -> Path:
    return Path(get_installed_path(library), '.mim/configs')


# Stock configs with Swin


@cache
def mentions_swin(path: Path) -> bool:
    """Whether a config or one of its bases names a Swin."""
    if not path.is_file():  # some stock configs name a base that does not exist
        return False
    if re.search(r"""type=['"]\S*SwinTransformer""", path.read_text()):
        return True
    bases = Config._get_base_files(str(path))
    return any(mentions_swin((path.parent / base).resolve()) for base in bases if '::' not in base)


def swin_configs(library: str) -> list[Path]:
    """Return all configs of a library that may use a Swin."""
    root = stock_configs(library)
    return [p for p in sorted(root.rglob('*.py')) if '_base_' not in p.relative_to(root).parts and mentions_swin(p)]


def swins(node):
    """Yield every dict with a Swin in nested dicts and lists."""
    if isinstance(node, dict):
        if 'SwinTransformer' in str(node.get('type')):
            yield node
        node = list(node.values())
    for child in node if isinstance(node, list) else []:
        yield from swins(child)


def is_default(name: str, value) -> bool:
    """Whether a value is the default of the argument."""
    default = inspect.signature(MMDetSwin).parameters[name].default
    return list(value) == list(default) if isinstance(default, (list, tuple)) else value == default


# Arguments that do not change the features in evaluation.
UNSEEN = ('type', 'init_cfg', 'pretrained', 'with_cp', 'drop_path_rate', 'convert_weights', 'frozen_stages')
UNSEEN += ('pretrain_img_size',)  # for the absolute position embedding, which no stock config has


def quick_size(node: dict) -> dict:
    """A smaller size with the same number of stages."""
    stages = len(node.get('depths', range(4)))
    return {'embed_dims': 32, 'depths': [2] * stages, 'num_heads': [2**i for i in range(stages)]}


@torch.no_grad()
def test_every_stock_swin_is_replaced_and_computes_the_same(record_property):
    plugged, renamed, compared = 0, 0, set()
    for library in ('mmdet', 'mmseg'):
        for path in swin_configs(library):
            try:
                before = Config.fromfile(path)
            except (ImportError, FileNotFoundError):  # needs a library that is not installed
                continue
            expected = before.to_dict()
            nodes = list(swins(expected.get('model')))
            if not nodes:
                continue
            for node in nodes:
                assert node['type'].rpartition('.')[2] == 'SwinTransformer'
                assert not node.get('use_abs_pos_embed')
                settings = {k: v for k, v in node.items() if k not in UNSEEN and not is_default(k, v)}
                compared.add((library, json.dumps(settings | quick_size(node), sort_keys=True)))
                node['type'] = 'swin_mm.SwinTransformer'
            imports = expected.setdefault('custom_imports', {'imports': []})
            names = imports['imports']
            imports['imports'] = [*([names] if isinstance(names, str) else names), 'swin_mm']
            paramwise = expected.get('optim_wrapper', {}).get('paramwise_cfg', {})
            if 'custom_keys' in paramwise:  # they select parameters by the names of the other Swin
                keys = paramwise['custom_keys']
                paramwise['custom_keys'] = {
                    key.replace('backbone.stages.', 'backbone.layers.'): keys[key] for key in keys
                }
                renamed += paramwise['custom_keys'] != keys
            assert plug(before).to_dict() == expected
            plugged += 1
    record_property('plugged', plugged)
    print(f'{plugged} stock configs plugged, {len(compared)} distinct backbones compared')
    assert plugged >= 120
    assert renamed >= 10  # Mask2Former and MaskFormer
    for library, settings in sorted(compared):
        options = json.loads(settings)
        with DefaultScope.overwrite_default_scope(library), NoRandomStart():
            theirs = MODELS.build({'type': f'{library}.SwinTransformer', **options})
            ours = MODELS.build({'type': 'swin_mm.SwinTransformer', **options})
        randomise(theirs)
        ours.load_state_dict(theirs.state_dict())
        theirs.eval()  # returns None
        image = torch.rand(1, options.get('in_channels', 3), 60, 83)
        assert relative_error(ours.eval()(image), theirs(image)) < 1e-5, settings


@torch.no_grad()
def test_mmpretrain_swin_keeps_its_conventions():
    theirs = reference('mmpretrain', 1)
    backbone = {'type': 'SwinTransformer', 'arch': 'tiny', 'img_size': 224, 'frozen_stages': 1}
    head = {'type': 'LinearClsHead', 'in_channels': 768}
    cfg = plug(
        Config(
            {'model': {'type': 'ImageClassifier', 'backbone': backbone, 'head': head}} | {'default_scope': 'mmpretrain'}
        )
    )
    assert cfg.model.head == head
    ours = MODELS.build(cfg.model.backbone)
    ours.load_state_dict(theirs.state)
    image = torch.rand(1, 3, 224, 224)  # the last map is one window, which mmpretrain does not shift
    assert relative_error(ours.eval()(image), [theirs.classify(image)]) < 1e-5
    trained = [i for i, stage in enumerate(ours.layers) if next(stage.parameters()).requires_grad]
    assert trained == [2, 3]  # theirs is the index of the last frozen stage


@pytest.mark.parametrize(
    'name, arch, v2, channels',
    [
        ('mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py', 'b', False, [128, 256, 512, 1024]),
        ('mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py', 't', True, [96, 192, 384, 768]),
    ],
)
def test_another_size_or_version_of_a_swin(name, arch, v2, channels):
    cfg = plug(load_config(name), arch, v2)
    assert cfg.model.backbone.type == 'swin_mm.SwinTransformer' + 'V2' * v2
    assert cfg.model.backbone.arch == arch
    assert cfg.model.neck.in_channels == channels


def test_another_checkpoint_for_a_swin_changes_nothing_else():
    before = load_config('mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py')
    after = plug(before, checkpoint='mine.pth')
    assert after.model.backbone.init_cfg == {'type': 'Pretrained', 'checkpoint': 'mine.pth'}
    after.model.backbone.init_cfg = plug(before).model.backbone.init_cfg
    assert after.to_dict() == plug(before).to_dict()


# Stock configs with other backbones


def without(node: dict, *keys: str) -> dict:
    return {key: value for key, value in node.items() if key not in keys}


def test_resnet_detector_becomes_the_stock_swin_detector():
    """mmdet has both, so the plugged config must train like the stock one."""
    before = load_config('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py')
    actual = plug(before)
    expected = load_config('mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py')
    built = [
        MODELS.build(backbone | {'type': 'swin_mm.SwinTransformer', 'init_cfg': None})
        for backbone in (actual.model.backbone, expected.model.backbone)
    ]
    assert str(built[0]) == str(built[1])  # sizes, windows, drop path of each block, output norms
    assert actual.model.backbone.init_cfg.checkpoint == expected.model.backbone.init_cfg.checkpoint
    assert without(actual.model, 'backbone') == without(expected.model, 'backbone')
    assert actual.optim_wrapper == expected.optim_wrapper
    warmup, steps = actual.param_scheduler
    assert warmup == before.param_scheduler[0] and warmup.end == 500  # the config's own; mmdet's Swin has 1000
    assert steps == expected.param_scheduler[1]
    assert actual.auto_scale_lr == {'enable': False, 'base_batch_size': 16}
    assert 'find_unused_parameters' not in actual


def test_resnet_segmentor_becomes_the_stock_swin_segmentor():
    actual = plug(load_config('mmseg::upernet/upernet_r50_4xb4-160k_ade20k-512x512.py'))
    expected = load_config('mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py')
    assert without(actual.model, 'backbone') == without(expected.model, 'backbone')
    assert actual.model.backbone.drop_path_rate == expected.model.backbone.drop_path_rate
    for key in ('optimizer', 'paramwise_cfg'):
        assert actual.optim_wrapper[key] == expected.optim_wrapper[key]
    warmup, decay = actual.param_scheduler
    expected_warmup, expected_decay = expected.param_scheduler
    assert warmup == {'begin': 0} | expected_warmup
    # The schedule keeps its shape: its power, and the ratio of its end to its start.
    assert decay == expected_decay | {'power': 0.9, 'eta_min': 6e-7}


def test_config_with_adamw_keeps_its_rates():
    before = load_config('mmdet::detr/detr_r50_8xb2-150e_coco.py')
    after = plug(before)
    assert after.optim_wrapper.optimizer == before.optim_wrapper.optimizer
    assert after.param_scheduler == before.param_scheduler
    assert after.optim_wrapper.clip_grad == before.optim_wrapper.clip_grad
    assert after.optim_wrapper.paramwise_cfg.custom_keys == {
        'backbone': {'lr_mult': 0.1, 'decay_mult': 1.0},
        'absolute_pos_embed': {'decay_mult': 0.0},
        'relative_position_bias_table': {'decay_mult': 0.0},
        'norm': {'decay_mult': 0.0},
    }


def test_images_are_normalised_as_in_pre_training():
    """A Caffe ResNet takes BGR images without division by the standard deviation."""
    before = load_config('mmdet::retinanet/retinanet_r50-caffe_fpn_1x_coco.py')
    assert not before.model.data_preprocessor.bgr_to_rgb
    preprocessor = plug(before).model.data_preprocessor
    assert preprocessor.bgr_to_rgb
    assert preprocessor.mean == [123.675, 116.28, 103.53] and preprocessor.std == [58.395, 57.12, 57.375]


def test_maps_that_nothing_reads_are_not_computed():
    """RetinaNet's neck starts at the second map; mmdet has a Swin config with the three others."""
    actual = plug(load_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py'))
    expected = load_config('mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py')
    assert actual.model.neck == expected.model.neck
    assert actual.model.backbone.out_indices == tuple(expected.model.backbone.out_indices) == (1, 2, 3)
    assert 'find_unused_parameters' not in actual


def test_stages_after_the_last_map_that_heads_read_are_not_built():
    cfg = load_config('mmseg::fcn/fcn_r50-d8_4xb4-80k_ade20k-512x512.py')
    cfg.model.decode_head.update(in_index=2, in_channels=1024)
    cfg.model.auxiliary_head.update(in_index=1, in_channels=512)
    after = plug(cfg)
    assert after.model.backbone.out_indices == (1, 2)
    heads = after.model.decode_head, after.model.auxiliary_head
    assert [(head.in_index, head.in_channels) for head in heads] == [(1, 384), (0, 192)]
    assert len(MODELS.build(after.model.backbone | {'init_cfg': None}).layers) == 3


def test_maps_that_a_head_takes_but_does_not_use_are_announced():
    after = plug(load_config('mmseg::encnet/encnet_r50-d8_4xb4-80k_ade20k-512x512.py'))
    assert after.model.backbone.out_indices == (1, 2, 3)  # EncHead takes three maps and uses the last one
    assert after.find_unused_parameters


def test_maps_that_cannot_be_left_out_are_announced():
    """This neck reads the two maps in the middle."""
    cfg = load_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py')
    cfg.model.neck = {'type': 'FPN', 'in_channels': [256, 512, 1024, 2048], 'out_channels': 256, 'num_outs': 2}
    cfg.model.neck.update(start_level=1, end_level=2)
    after = plug(cfg)
    assert after.find_unused_parameters
    assert after.model.backbone.out_indices == (0, 1, 2, 3)


# Strides


def notes_of(cfg: Config) -> list[str]:
    return plug_with_report(cfg)[1].notes


def test_dilations_follow_the_stride():
    """DeepLab's rates are 12, 24, 36 at stride 8 and 6, 12, 18 at stride 16."""
    after, report = plug_with_report(
        load_config('mmseg::deeplabv3plus/deeplabv3plus_r50-d8_4xb4-80k_ade20k-512x512.py')
    )
    assert after.model.decode_head.dilations == (1, 3, 6, 9)
    assert after.model.decode_head.c1_in_channels == 96
    note = next(note for note in report.notes if note.startswith('decode_head'))
    assert note == (
        'decode_head (DepthwiseSeparableASPPHead) reads maps of stride 32, before 8; '
        'dilations (1, 12, 24, 36) became (1, 3, 6, 9)'
    )
    assert PartStrides('decode_head', (8,), (32,)) in report.strides
    assert PartStrides('backbone', (4, 8, 8, 8), (4, 8, 16, 32)) in report.strides


@pytest.mark.parametrize(
    'name, argument, value',
    [
        ('mmseg::isanet/isanet_r50-d8_4xb4-80k_ade20k-512x512.py', 'down_factor', (2, 2)),
        ('mmseg::psanet/psanet_r50-d8_4xb4-80k_ade20k-512x512.py', 'mask_size', (17, 17)),
    ],
)
def test_other_arguments_in_pixels_of_the_map_follow_the_stride(name, argument, value):
    assert plug(load_config(name)).model.decode_head[argument] == value


def test_defaults_in_pixels_of_the_map_follow_the_stride():
    cfg = load_config('mmseg::deeplabv3/deeplabv3_r50-d8_4xb4-80k_ade20k-512x512.py')
    del cfg.model.decode_head['dilations']  # (1, 6, 12, 18) by default
    assert plug(cfg).model.decode_head.dilations == (1, 2, 3, 5)


def test_equal_strides_are_not_mentioned():
    _, report = plug_with_report(load_config('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'))
    assert not report.notes
    assert all(part.before == part.after for part in report.strides)
    assert [part.part for part in report.strides] == ['backbone', 'neck']
    assert report.strides[1].after == (4, 8, 16, 32, 64)


@pytest.mark.parametrize(
    'name, neck',
    [
        ('mmseg::vit/vit_deit-b16_mln_upernet_8xb2-160k_ade20k-512x512.py', 'MultiLevelNeck'),
        ('mmseg::mae/mae-base_upernet_8xb2-amp-160k_ade20k-512x512.py', 'Feature2Pyramid'),
    ],
)
def test_necks_that_make_a_pyramid_for_a_plain_transformer_are_removed(name, neck):
    """A Swin gives a pyramid; with the neck its strides would be 1, 4, 16, 64."""
    before = load_config(name)
    before.model.backbone.num_layers = 12
    after, report = plug_with_report(before)
    assert before.model.neck.type == neck and 'neck' not in after.model
    assert f'neck ({neck}) removed: the backbone itself gives maps of strides 4, 8, 16, 32' in report.notes
    assert list(after.model.decode_head.in_channels) == [96, 192, 384, 768]
    assert all(part.before == part.after for part in report.strides if part.part.endswith('_head'))
    build_model(after, after.model.decode_head)
    expected = load_config('mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py')
    heads = [without(cfg.model.decode_head, 'channels', 'num_classes') for cfg in (after, expected)]
    assert heads[0] == heads[1]


def test_changed_strides_after_the_neck_of_a_detector_are_rejected():
    """Its anchors have the strides written down."""
    cfg = load_config('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py')
    cfg.default_scope = 'mmdet'
    cfg.model.backbone.strides = (1, 2, 2, 1)  # maps of strides 4, 8, 16, 16
    with pytest.raises(InputError, match=r'ResNet gives maps of strides \[4, 8, 16, 16\], a Swin has'):
        plug(cfg)


# Schedules


def rates(cfg: Config, iterations: int, epoch_length: int) -> list[float]:
    """Return the learning rate of every iteration, from mmengine's own schedulers."""
    optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=cfg.optim_wrapper.optimizer.lr)
    max_epochs = cfg.train_cfg.get('max_epochs', 1)
    schedulers = []
    for scheduler in cfg.param_scheduler:
        end = max_epochs if scheduler.get('by_epoch', True) else iterations
        defaults = {'optimizer': optimizer, 'epoch_length': epoch_length}
        schedulers.append(PARAM_SCHEDULERS.build({'end': end, **scheduler}, default_args=defaults))
    found = []
    for i in range(iterations):
        found.append(optimizer.param_groups[0]['lr'])
        optimizer.step()
        for scheduler in schedulers:
            if not scheduler.by_epoch or (i + 1) % epoch_length == 0:
                scheduler.step()
    return found


SHORT = [  # (max_iters, warm-up of the config)
    (120, 20),
    (300, 50),
    (300, None),
    (40, None),
    (19, None),  # too short for a warm-up
    (1, None),
]


@pytest.mark.parametrize('iterations, warmup', SHORT)
def test_short_runs_reach_the_learning_rate(iterations, warmup):
    cfg = load_config('mmseg::fcn/fcn_r50-d8_4xb4-80k_ade20k-512x512.py')
    cfg.train_cfg.max_iters = iterations
    begin = warmup or 0
    poly = {'type': 'PolyLR', 'eta_min': 1e-4, 'power': 0.9, 'begin': begin, 'end': iterations, 'by_epoch': False}
    own = {'type': 'LinearLR', 'start_factor': 0.1, 'by_epoch': False, 'begin': 0, 'end': warmup}
    cfg.param_scheduler = [own, poly] if warmup else [poly]
    after, report = plug_with_report(cfg)
    if warmup:
        assert after.param_scheduler[0] == own, 'the warm-up of the config stays'
        assert not any('warm-up' in note for note in report.notes)
    else:
        length = iterations // 10
        assert length < 2 or after.param_scheduler[0].end == length
        assert length < 2 or f'param_scheduler: added a warm-up of {length} iterations' in report.notes
    found = rates(after, iterations, epoch_length=iterations)
    assert max(found) == pytest.approx(6e-5, rel=0.02)
    assert found.index(max(found)) <= max(begin, iterations // 10)


@pytest.mark.parametrize('epochs, epoch_length', [(12, 10), (300, 1), (36, 50), (4, 100), (1, 300)])
def test_warm_up_of_runs_by_epoch(epochs, epoch_length):
    cfg = load_config('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py')
    cfg.train_cfg.max_epochs = epochs
    cfg.param_scheduler = [{'type': 'MultiStepLR', 'milestones': [max(1, epochs - 1)], 'by_epoch': True}]
    found = rates(plug(cfg), epochs * epoch_length, epoch_length)
    assert max(found) == pytest.approx(1e-4)
    assert found[0] == pytest.approx(1e-7)
    assert found.index(max(found)) <= max(1, len(found) // 10)


def test_long_runs_have_the_warm_up_of_the_recipe():
    after = plug(load_config('mmseg::fcn/fcn_r50-d8_4xb4-80k_ade20k-512x512.py'))
    assert after.param_scheduler[0] == {
        'type': 'LinearLR', 'start_factor': 1e-6, 'by_epoch': False, 'begin': 0, 'end': 1500
    }  # fmt: skip
    assert after.param_scheduler[1].begin == 1500


def test_linear_decay_is_no_warm_up():
    cfg = load_config('mmseg::fcn/fcn_r50-d8_4xb4-80k_ade20k-512x512.py')
    decay = {'type': 'LinearLR', 'start_factor': 1.0, 'end_factor': 0.1, 'by_epoch': False, 'end': 80000}
    cfg.param_scheduler = [decay]
    assert [scheduler.end for scheduler in plug(cfg).param_scheduler] == [1500, 80000]


def test_one_cycle_brings_its_own_warm_up():
    cfg = load_config('mmseg::fcn/fcn_r50-d8_4xb4-80k_ade20k-512x512.py')
    cfg.param_scheduler = [{'type': 'OneCycleLR', 'eta_max': 0.02, 'total_steps': 80000, 'by_epoch': False}]
    (cycle,) = plug(cfg).param_scheduler
    assert cycle.eta_max == pytest.approx(0.02 * 6e-5 / 0.01)  # as high above the rate as before


def test_schedules_that_cannot_be_built_are_refused():
    cfg = load_config('mmseg::fcn/fcn_r50-d8_4xb4-80k_ade20k-512x512.py')
    cfg.param_scheduler[0].update(begin=500, end=400)
    with pytest.raises(InputError, match='param_scheduler PolyLR cannot be built: end should be larger than begin'):
        plug(cfg)


# Settings of the old backbone


def test_custom_keys_of_layers_that_are_gone_are_removed():
    cfg = load_config('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py')
    keys = {
        'backbone.layer4': {'lr_mult': 0.1},  # of the ResNet
        'downsample.1': {'decay_mult': 0.0},  # of the ResNet, without naming it
        'backbone': {'lr_mult': 0.1},  # of both
        'roi_head.mask_head': {'lr_mult': 2.0},
        'nothing_at_all': {'lr_mult': 3.0},  # selected nothing before either: not ours to judge
    }
    cfg.optim_wrapper.paramwise_cfg = {'custom_keys': keys}
    after, report = plug_with_report(cfg)
    kept = after.optim_wrapper.paramwise_cfg.custom_keys
    assert kept.keys() - NO_DECAY == {'backbone', 'roi_head.mask_head', 'nothing_at_all'}
    assert kept['roi_head.mask_head'] == {'lr_mult': 2.0}
    assert report.notes == [
        'optim_wrapper: removed custom_keys of layers that the new model does not have: backbone.layer4, downsample.1'
    ]


def test_dead_custom_keys_are_removed_from_adamw_configs_too():
    before = load_config('mmseg::vit/vit_deit-b16_mln_upernet_8xb2-160k_ade20k-512x512.py')
    keys = plug(before).optim_wrapper.paramwise_cfg.custom_keys
    assert 'cls_token' in before.optim_wrapper.paramwise_cfg.custom_keys
    assert keys.keys() == set(NO_DECAY)


@pytest.mark.parametrize('key', ['decay_rate', 'layer_decay_rate'])
def test_layer_decay_of_the_old_backbone_is_removed(key):
    """mmseg's BEiT calls it layer_decay_rate, its ConvNeXt decay_rate."""
    cfg = load_config('mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py')
    cfg.optim_wrapper.constructor = 'LayerDecayOptimizerConstructor'
    cfg.optim_wrapper.paramwise_cfg = {'num_layers': 12, key: 0.9}
    after = plug(cfg)
    assert 'constructor' not in after.optim_wrapper
    assert after.optim_wrapper.paramwise_cfg.keys() == {'custom_keys'}


def test_bias_lr_mult_is_removed_with_sgd():
    before = load_config('mmdet::fcos/fcos_r50-caffe_fpn_gn-head_1x_coco.py')
    assert before.optim_wrapper.paramwise_cfg.bias_lr_mult == 2.0
    after, report = plug_with_report(before)
    assert 'bias_lr_mult' not in after.optim_wrapper.paramwise_cfg
    assert 'optim_wrapper: removed bias_lr_mult, which is meant for SGD' in report.notes
    before.optim_wrapper.optimizer = {'type': 'AdamW', 'lr': 1e-4}  # somebody chose it for AdamW
    assert plug(before).optim_wrapper.paramwise_cfg.bias_lr_mult == 2.0


def test_auto_scale_lr_gets_the_batch_of_the_learning_rate():
    segmentor = load_config('mmseg::fcn/fcn_r50-d8_4xb4-80k_ade20k-512x512.py')
    assert 'auto_scale_lr' not in segmentor
    assert plug(segmentor).auto_scale_lr == {'enable': False, 'base_batch_size': 16}
    detector = load_config('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py')
    detector.auto_scale_lr = {'enable': True, 'base_batch_size': 64}
    assert plug(detector).auto_scale_lr == {'enable': True, 'base_batch_size': 16}
    detector.optim_wrapper.optimizer = {'type': 'AdamW', 'lr': 3e-4}  # keeps its rate, and so its batch
    assert plug(detector).auto_scale_lr == {'enable': True, 'base_batch_size': 64}


def test_notes_are_logged(monkeypatch):
    lines = []
    monkeypatch.setattr('swin_mm.openmmlab.plug.print_log', lambda line, logger: lines.append(line))
    cfg = load_config('mmseg::fcn/fcn_r50-d8_4xb4-80k_ade20k-512x512.py')
    plug(cfg)
    assert lines == [f'plug: {note}' for note in notes_of(cfg)]
    assert 'plug: decode_head (FCNHead) reads maps of stride 32, before 8' in lines


def test_necks_that_take_the_last_map_first_keep_their_order():
    neck = plug(load_config('mmdet::yolo/yolov3_d53_8xb8-320-273e_coco.py')).model.neck
    assert neck.in_channels == [768, 384, 192]


def test_weights_of_the_replaced_model_are_removed():
    before = load_config('mmdet::cityscapes/mask-rcnn_r50_fpn_1x_cityscapes.py')
    assert before.load_from
    before.model.init_cfg = {'type': 'Pretrained', 'checkpoint': 'detector.pth'}
    after = plug(before)
    assert after.load_from is None and after.model.init_cfg is None
    assert plug(load_config('mmseg::fcn/fcn_r50-d8_4xb4-80k_ade20k-512x512.py')).model.pretrained is None


def test_nested_detectors_are_plugged():
    cfg = plug(load_config('mmdet::soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py'))
    assert cfg.model.detector.backbone.type == 'swin_mm.SwinTransformer'
    assert cfg.model.detector.neck.in_channels == [96, 192, 384, 768]
    for preprocessor in (cfg.model.detector.data_preprocessor, cfg.model.data_preprocessor.data_preprocessor):
        assert preprocessor.bgr_to_rgb


@pytest.mark.parametrize(
    'name, reason',
    [
        ('mmdet::faster_rcnn/faster-rcnn_r50-caffe_c4-1x_coco.py', 'RoI head runs the last stage'),
        ('mmdet::faster_rcnn/faster-rcnn_r50-caffe-dc5_1x_coco.py', 'RPN reads one map'),
        ('mmdet::rpn/rpn_r50-caffe-c4_1x_coco.py', 'RPN reads one map'),
        ('mmdet::ssd/ssd300_coco.py', 'SSDVGG is part of the method'),
        ('mmseg::icnet/icnet_r18-d8_4xb2-80k_cityscapes-832x832.py', 'ICNet is part of the method'),
        ('mmseg::setr/setr_vit-l-mla_8xb1-160k_ade20k-512x512.py', 'neck'),
        ('mmseg::mobilenet_v3/mobilenet-v3-d8_lraspp_4xb4-320k_cityscapes-512x1024.py', 'strides .2, 4, 8.'),
        ('mmseg::san/san-vit-b16_voc12aug-640x640.py', 'has no entry "backbone"'),
    ],
)
def test_models_without_a_replaceable_backbone_are_rejected(name, reason):
    with pytest.raises(InputError, match=reason) as refused:
        plug(load_config(name))
    assert '\n' not in str(refused.value)


@pytest.mark.parametrize(
    'name',
    [
        'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py',  # the type alone
        'mmdet::soft_teacher/soft-teacher_faster-rcnn_r50-caffe_fpn_180k_semi-0.1-coco.py',  # nested
        'mmseg::ocrnet/ocrnet_hr18_4xb4-80k_ade20k-512x512.py',  # heads in a list
        'mmseg::segformer/segformer_mit-b0_8xb2-160k_ade20k-512x512.py',  # custom keys with dots
        str(ROOT / 'configs/mask_rcnn/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'),  # a path
    ],
)
def test_written_config_is_small_and_reads_back_as_plugged(name, tmp_path):
    before = load_config(name)
    after = plug(before)
    write(before, after, tmp_path / 'sub.py')
    assert load_config(tmp_path / 'sub.py').to_dict() == after.to_dict()
    text = (tmp_path / 'sub.py').read_text()
    assert len(text.splitlines()) < len(after.pretty_text.splitlines()) / 3
    assert 'dataloader' not in text and 'test_cfg' not in text
    assert list(tmp_path.iterdir()) == [tmp_path / 'sub.py']


def test_changes_are_shown_by_path():
    before = load_config('mmdet::atss/atss_r50_fpn_1x_coco.py')
    lines = show(before, plug(before)).splitlines()
    at = lines.index('- model.neck.in_channels = [256, 512, 1024, 2048]')
    assert lines[at + 1] == '+ model.neck.in_channels = [192, 384, 768]'
    assert not any('dataloader' in line or 'bbox_head' in line for line in lines)


@pytest.mark.parametrize(
    'library, folder', [('mmdet', 'atss/atss_r50_fpn_1x_coco'), ('mmseg', 'ann/ann_r50-d8_4xb4-80k_ade20k-512x512')]
)
def test_flat_config_stands_alone(library, folder, tmp_path):
    """mmengine reads it in a process that has not imported swin_mm, as the tools of mmdet and mmseg do."""
    before = load_config(f'{library}::{folder}.py')
    after = plug(before)
    write(before, after, tmp_path / 'flat.py', flat=True)
    assert '_base_ = ' not in (tmp_path / 'flat.py').read_text()
    code = (
        'import sys\nfrom mmengine.config import Config\nfrom mmengine.registry import MODELS\n'
        'cfg = Config.fromfile("flat.py")\n'
        'assert "swin_mm" in sys.modules\n'
        f'from {library}.utils import register_all_modules\nregister_all_modules()\n'
        'cfg.model.backbone.init_cfg = None\n'
        'print(type(MODELS.build(cfg.model).backbone).__module__)\n'
    )
    environment = {'PYTHONPATH': str(ROOT), 'PATH': ''}
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.stdout.strip().splitlines()[-1:] == ['swin_mm.openmmlab.backbone'], done.stderr
    assert Config.fromfile(tmp_path / 'flat.py').to_dict() == after.to_dict()


def test_missing_folders_are_made(tmp_path):
    before = load_config('mmdet::atss/atss_r50_fpn_1x_coco.py')
    write(before, plug(before), tmp_path / 'a/b/new.py')
    assert load_config(tmp_path / 'a/b/new.py').model.backbone.type == 'swin_mm.SwinTransformer'


# Pure Python style

PURE_PYTHON = """
from mmdet.models import FPN, DetDataPreprocessor, ResNet, RetinaHead, RetinaNet
from mmdet.models.losses import FocalLoss, L1Loss
from mmdet.models.task_modules import AnchorGenerator, DeltaXYWHBBoxCoder, MaxIoUAssigner, PseudoSampler
from mmengine.optim import OptimWrapper
from mmengine.optim.scheduler import LinearLR, MultiStepLR
from mmengine.runner import EpochBasedTrainLoop
from torch.optim import SGD

model = dict(
    type=RetinaNet,
    data_preprocessor=dict(type=DetDataPreprocessor, mean=[103.5, 116.3, 123.7], std=[1.0, 1.0, 1.0], bgr_to_rgb=False),
    backbone=dict(type=ResNet, depth=50, out_indices=(0, 1, 2, 3)),
    neck=dict(type=FPN, in_channels=[256, 512, 1024, 2048], out_channels=256, start_level=1, num_outs=5),
    bbox_head=dict(
        type=RetinaHead,
        num_classes=80,
        in_channels=256,
        anchor_generator=dict(
            type=AnchorGenerator, octave_base_scale=4, scales_per_octave=3, ratios=[1.0], strides=[8, 16, 32, 64, 128]
        ),
        bbox_coder=dict(type=DeltaXYWHBBoxCoder),
        loss_cls=dict(type=FocalLoss, use_sigmoid=True),
        loss_bbox=dict(type=L1Loss),
    ),
    train_cfg=dict(
        assigner=dict(type=MaxIoUAssigner, pos_iou_thr=0.5, neg_iou_thr=0.4), sampler=dict(type=PseudoSampler)
    ),
)
optim_wrapper = dict(type=OptimWrapper, optimizer=dict(type=SGD, lr=0.01, momentum=0.9))
param_scheduler = [
    dict(type=LinearLR, start_factor=0.001, by_epoch=False, begin=0, end=20),
    dict(type=MultiStepLR, begin=0, end=12, by_epoch=True, milestones=[8, 11]),
]
train_cfg = dict(type=EpochBasedTrainLoop, max_epochs=12)
"""


@pytest.fixture
def pure_python(tmp_path) -> Path:
    (tmp_path / 'sub').mkdir()
    (tmp_path / 'sub/retinanet.py').write_text(PURE_PYTHON)
    return tmp_path / 'sub/retinanet.py'


@pytest.mark.parametrize('out', ['sub/new.py', 'new.py', 'other/deep/new.py'])
def test_pure_python_configs_are_plugged_and_written_in_their_style(pure_python, out, tmp_path):
    before = load_config(pure_python)
    after = plug(before)
    assert after.model.backbone.type == 'swin_mm.SwinTransformer'
    assert after.model.neck.in_channels == [192, 384, 768]
    assert after.optim_wrapper.optimizer.type == 'AdamW' and after.param_scheduler[0].end == 20
    assert '+ model.neck.start_level = 0' in show(before, after)

    write(before, after, tmp_path / out)
    text = (tmp_path / out).read_text()
    assert 'from swin_mm import SwinTransformer\n' in text and 'type=SwinTransformer' in text
    assert 'with read_base():\n    from .' in text and 'FocalLoss' not in text
    written = load_config(tmp_path / out)
    assert is_pure_python(written) and with_type_names(written).to_dict() == after.to_dict()
    assert plug(written).to_dict() == after.to_dict()
    written.model.backbone.init_cfg = None
    with DefaultScope.overwrite_default_scope('mmdet'):
        model = MODELS.build(written.model)
    assert (type(model).__name__, type(model.backbone).__module__) == ('RetinaNet', 'swin_mm.openmmlab.backbone')


def test_flat_config_of_a_pure_python_config(pure_python, tmp_path):
    before = load_config(pure_python)
    after = plug(before)
    write(before, after, tmp_path / 'flat.py', flat=True)
    assert Config.fromfile(tmp_path / 'flat.py').to_dict() == after.to_dict()


def test_pure_python_config_that_cannot_be_imported_is_written_flat(pure_python, tmp_path):
    path = pure_python.rename(pure_python.with_name('retina-net.py'))
    before = load_config(path)
    with pytest.raises(InputError, match=r'cannot be imported as a module.*with --flat'):
        write(before, plug(before), tmp_path / 'new.py')
    assert not (tmp_path / 'new.py').exists()


def table() -> list[tuple[str, str]]:
    """Return (config, last column) of every row in the documentation."""
    return re.findall(r'^\| \S+ \| `(\w+::\S+)` \| .* \| ([^|]+) \|$', TABLE.read_text(), re.MULTILINE)


QUICK = ('mmdet::atss/', 'mmdet::conditional_detr/', 'mmseg::fcn/')


@pytest.mark.parametrize(
    'name, outcome',
    [row if row[0].startswith(QUICK) else pytest.param(*row, marks=pytest.mark.slow) for row in table()],
    ids=lambda v: v.partition('/')[0],
)
def test_table_of_the_documentation_is_true(name, outcome, data):
    """Plugged with Swin-T, every config of the table trains and predicts, or is refused with the reason given."""
    cfg = load_config(name)
    if outcome.startswith('refused: '):
        with pytest.raises(InputError, match=re.escape(outcome.removeprefix('refused: '))):
            plug(cfg, 't')
    else:
        train_and_predict(plug(cfg, 't'), data)


def make_batch(scope: str, classes: int, data: Path, count: int = 2) -> dict:
    """Return a batch of small real images with annotations, or of tiny ones without SWIN_MM_DATA."""
    real = 'SWIN_MM_DATA' in os.environ
    if scope == 'mmdet':
        from mmdet.datasets import CocoDataset

        root = Path(os.environ['SWIN_MM_DATA'], 'coco_cc') if real else data / 'coco'
        dataset = CocoDataset(
            data_root=str(root),
            ann_file='annotations/instances_train2017.json',
            data_prefix={'img': 'train2017/'},
            metainfo={} if real else {'classes': ('square', 'bar')},
            filter_cfg={'filter_empty_gt': True},
            pipeline=[
                {'type': 'LoadImageFromFile'},
                {'type': 'mmdet.LoadAnnotations', 'with_bbox': True, 'with_mask': True},
                {'type': 'mmdet.Resize', 'scale': (320, 256)},
            ],
        )
        pack = TRANSFORMS.build({'type': 'mmdet.PackDetInputs'})
        samples = []
        for i in range(count):
            sample = dataset[i]
            sample['gt_bboxes_labels'] %= classes
            sample['gt_seg_map'] = np.full(sample['img_shape'], 255, np.uint8)
            for label, mask in zip(sample['gt_bboxes_labels'], sample['gt_masks'].masks, strict=True):
                sample['gt_seg_map'][mask > 0] = label
            samples.append(pack(sample))
        return pseudo_collate(samples)

    from mmseg.datasets import BaseSegDataset

    root = Path(os.environ['SWIN_MM_DATA'], 'coco_sem_cc') if real else data / 'ade'
    dataset = BaseSegDataset(
        data_root=str(root),
        data_prefix={'img_path': 'images/training', 'seg_map_path': 'annotations/training'},
        reduce_zero_label=True,
        pipeline=[
            {'type': 'LoadImageFromFile'},
            {'type': 'mmseg.LoadAnnotations', 'reduce_zero_label': True},
            {'type': 'mmseg.Resize', 'scale': (128, 128)},
        ],
    )
    pack = TRANSFORMS.build({'type': 'mmseg.PackSegInputs'})
    samples = []
    for i in range(count):
        sample = dataset[i]
        labels = sample['gt_seg_map']
        sample['gt_seg_map'] = np.where(labels == 255, 255, labels % classes).astype(labels.dtype)
        samples.append(pack(sample))
    return pseudo_collate(samples)


def train_and_predict(cfg: Config, data: Path) -> None:
    """Run one training step, which must change the whole backbone, and one prediction."""
    scope = cfg.default_scope
    model_cfg = cfg.model
    for owner in [model_cfg, *(n for n in model_cfg.values() if isinstance(n, dict))]:
        if 'backbone' in owner:
            owner.backbone.init_cfg = None
            owner.backbone.drop_path_rate = 0.0  # a dropped branch has no gradient
    preprocessor = model_cfg.data_preprocessor
    preprocessor.pop('batch_augments', None)
    if scope == 'mmseg':
        preprocessor.size = (128, 128)
        model_cfg.test_cfg.mode = 'whole'
    classes = [int(n) for n in re.findall(r"'num_classes': (\d+)", str(model_cfg.to_dict()))]
    classes += [int(n) for n in re.findall(r"'num_things_classes': (\d+)", str(model_cfg.to_dict()))]
    batch = make_batch(scope, min(classes, default=80), data)
    with DefaultScope.overwrite_default_scope(scope):
        MessageHub.get_current_instance().update_info('iter', 0)  # some losses depend on the iteration
        model = revert_sync_batchnorm(MODELS.build(model_cfg))
        model.init_weights()
        wrapper = cfg.optim_wrapper
        wrapper.type = 'OptimWrapper'
        wrapper.pop('loss_scale', None), wrapper.pop('dtype', None)
        optimizer = build_optim_wrapper(model, wrapper)
        before = {name: p.detach().clone() for name, p in model.backbone.named_parameters()}
        model.train()
        losses = model.train_step(batch, optimizer)
        assert losses and all(torch.isfinite(value).all() for value in losses.values()), losses
        still = [name for name, p in model.backbone.named_parameters() if torch.equal(p, before[name])]
        # Distributed training fails at a parameter without gradient unless find_unused_parameters is set.
        assert not still or cfg.get('find_unused_parameters'), still
        assert all(name.startswith('norm') for name in still), still
        model.eval()
        with torch.no_grad():
            results = model.test_step(batch)
        assert len(results) == 2
        for result in results:
            if scope == 'mmseg':
                assert result.pred_sem_seg.data.shape[-2:] == tuple(result.ori_shape)
            else:
                assert 'pred_instances' in result or 'pred_panoptic_seg' in result


def test_failed_writing_leaves_nothing_behind(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, 'No space left on device')

    before = load_config('mmdet::atss/atss_r50_fpn_1x_coco.py')
    monkeypatch.setattr('pathlib.Path.replace', fail)
    with pytest.raises(InputError, match='cannot be written: No space left'):
        write(before, plug(before), tmp_path / 'new.py')
    assert not list(tmp_path.iterdir())
