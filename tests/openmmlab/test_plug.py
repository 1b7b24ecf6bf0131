"""Plugging: stock configs keep what they compute with our Swin, or train and predict with it as a new backbone."""

import inspect
import json
import os
import re
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
from mmengine.registry import MODELS, TRANSFORMS, DefaultScope
from mmengine.utils import get_installed_path
from support.oracles import randomise, relative_error
from support.reference_models import NoRandomStart, reference
from support.tool_fixtures import ROOT

from swin_mm.openmmlab.config import load_config
from swin_mm.openmmlab.plug import plug, show, write
from swin_mm.utils.errors import InputError

TABLE = ROOT / 'docs/plug.md'


def stock_configs(library: str) -> Path:
    return Path(get_installed_path(library), '.mim/configs')


# Stock configs with Swin


@cache
def mentions_swin(path: Path) -> bool:
    """Whether a config or one it inherits from names a Swin."""
    if not path.is_file():  # some stock configs name a base that is not there
        return False
    if re.search(r"""type=['"]\S*SwinTransformer""", path.read_text()):
        return True
    bases = Config._get_base_files(str(path))
    return any(mentions_swin((path.parent / base).resolve()) for base in bases if '::' not in base)


def swin_configs(library: str) -> list[Path]:
    """All of a library's configs that may use a Swin."""
    root = stock_configs(library)
    return [p for p in sorted(root.rglob('*.py')) if '_base_' not in p.relative_to(root).parts and mentions_swin(p)]


def swins(node):
    """Every dict with a Swin in a nest of dicts and lists."""
    if isinstance(node, dict):
        if 'SwinTransformer' in str(node.get('type')):
            yield node
        node = list(node.values())
    for child in node if isinstance(node, list) else []:
        yield from swins(child)


def is_default(name: str, value) -> bool:
    """Whether leaving the argument out says the same."""
    default = inspect.signature(MMDetSwin).parameters[name].default
    return list(value) == list(default) if isinstance(default, (list, tuple)) else value == default


# Arguments that the features in evaluation do not depend on.
UNSEEN = ('type', 'init_cfg', 'pretrained', 'with_cp', 'drop_path_rate', 'convert_weights', 'frozen_stages')
UNSEEN += ('pretrain_img_size',)  # of the absolute embedding, which no stock config has


@torch.no_grad()
def test_every_stock_swin_is_replaced_and_computes_the_same(record_property):
    plugged, renamed, compared = 0, 0, set()
    for library in ('mmdet', 'mmseg'):
        for path in swin_configs(library):
            try:
                before = Config.fromfile(path)
            except (ImportError, FileNotFoundError):  # needs a library that is not there
                continue
            expected = before.to_dict()
            nodes = list(swins(expected.get('model')))
            if not nodes:
                continue
            for node in nodes:
                assert node['type'].rpartition('.')[2] == 'SwinTransformer'
                assert not node.get('use_abs_pos_embed')
                settings = {k: v for k, v in node.items() if k not in UNSEEN and not is_default(k, v)}
                compared.add((library, json.dumps(settings, sort_keys=True)))
                node['type'] = 'swin_mm.SwinTransformer'
            imports = expected.setdefault('custom_imports', {'imports': []})
            names = imports['imports']
            imports['imports'] = [*([names] if isinstance(names, str) else names), 'swin_mm']
            paramwise = expected.get('optim_wrapper', {}).get('paramwise_cfg', {})
            if 'custom_keys' in paramwise:  # they pick parameters by the names of the other Swin
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
    assert trained == [2, 3]  # theirs names the last frozen stage


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


def test_own_checkpoint_for_a_swin_changes_nothing_else():
    before = load_config('mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py')
    after = plug(before, checkpoint='mine.pth')
    assert after.model.backbone.init_cfg == {'type': 'Pretrained', 'checkpoint': 'mine.pth'}
    after.model.backbone.init_cfg = plug(before).model.backbone.init_cfg
    assert after.to_dict() == plug(before).to_dict()


# Stock configs with other backbones


def without(node: dict, *keys: str) -> dict:
    return {key: value for key, value in node.items() if key not in keys}


def test_resnet_detector_becomes_the_stock_swin_detector():
    """mmdet has both, so the one plugged must train as the other does."""
    actual = plug(load_config('mmdet::mask_rcnn/mask-rcnn_r50_fpn_1x_coco.py'))
    expected = load_config('mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py')
    built = [
        MODELS.build(backbone | {'type': 'swin_mm.SwinTransformer', 'init_cfg': None})
        for backbone in (actual.model.backbone, expected.model.backbone)
    ]
    assert str(built[0]) == str(built[1])  # sizes, windows, drop path of each block, output norms
    assert actual.model.backbone.init_cfg.checkpoint == expected.model.backbone.init_cfg.checkpoint
    assert without(actual.model, 'backbone') == without(expected.model, 'backbone')
    assert actual.optim_wrapper == expected.optim_wrapper
    plain = [[without(step, '_scope_') for step in cfg.param_scheduler] for cfg in (actual, expected)]
    assert plain[0] == plain[1]
    assert 'find_unused_parameters' not in actual


def test_resnet_segmentor_becomes_the_stock_swin_segmentor():
    actual = plug(load_config('mmseg::upernet/upernet_r50_4xb4-160k_ade20k-512x512.py'))
    expected = load_config('mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py')
    assert without(actual.model, 'backbone') == without(expected.model, 'backbone')
    assert actual.model.backbone.drop_path_rate == expected.model.backbone.drop_path_rate
    for key in ('optimizer', 'paramwise_cfg'):
        assert actual.optim_wrapper[key] == expected.optim_wrapper[key]
    warmup, decay = (without(step, '_scope_') for step in actual.param_scheduler)
    expected_warmup, expected_decay = (without(step, '_scope_') for step in expected.param_scheduler)
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
    """A Caffe ResNet takes BGR without a deviation."""
    before = load_config('mmdet::retinanet/retinanet_r50-caffe_fpn_1x_coco.py')
    assert not before.model.data_preprocessor.bgr_to_rgb
    preprocessor = plug(before).model.data_preprocessor
    assert preprocessor.bgr_to_rgb
    assert preprocessor.mean == [123.675, 116.28, 103.53] and preprocessor.std == [58.395, 57.12, 57.375]


def test_maps_that_nothing_reads_are_announced():
    """RetinaNet's neck starts at the second map, so the first output norm has no gradient."""
    assert plug(load_config('mmdet::retinanet/retinanet_r50_fpn_1x_coco.py')).find_unused_parameters


def test_necks_that_take_the_last_map_first_keep_their_order():
    neck = plug(load_config('mmdet::yolo/yolov3_d53_8xb8-320-273e_coco.py')).model.neck
    assert neck.in_channels == [768, 384, 192]


def test_weights_of_the_replaced_model_are_left_out():
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
        ('mmseg::mae/mae-base_upernet_8xb2-amp-160k_ade20k-512x512.py', 'neck'),
        ('mmseg::mobilenet_v3/mobilenet-v3-d8_lraspp_4xb4-320k_cityscapes-512x1024.py', 'strides .2, 4, 8.'),
        ('mmseg::san/san-vit-b16_voc12aug-640x640.py', 'has no entry "backbone"'),
    ],
)
def test_what_no_swin_fits_is_refused(name, reason):
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
    assert Config.fromfile(tmp_path / 'sub.py').to_dict() == after.to_dict()
    text = (tmp_path / 'sub.py').read_text()
    assert len(text.splitlines()) < len(after.pretty_text.splitlines()) / 3
    assert 'dataloader' not in text and 'test_cfg' not in text
    assert list(tmp_path.iterdir()) == [tmp_path / 'sub.py']


def test_changes_are_shown_by_path():
    before = load_config('mmdet::atss/atss_r50_fpn_1x_coco.py')
    lines = show(before, plug(before)).splitlines()
    at = lines.index('- model.neck.in_channels = [256, 512, 1024, 2048]')
    assert lines[at + 1] == '+ model.neck.in_channels = [96, 192, 384, 768]'
    assert not any('dataloader' in line or 'bbox_head' in line for line in lines)


def table() -> list[tuple[str, str]]:
    """(config, outcome) of every row in the documentation."""
    return re.findall(r'^\| \S+ \| `(\w+::\S+)` \| (.+) \|$', TABLE.read_text(), re.MULTILINE)


QUICK = ('mmdet::atss/', 'mmdet::conditional_detr/', 'mmseg::fcn/')


@pytest.mark.parametrize(
    'name, outcome',
    [row if row[0].startswith(QUICK) else pytest.param(*row, marks=pytest.mark.slow) for row in table()],
    ids=lambda v: v.partition('/')[0],
)
def test_table_of_the_documentation_is_true(name, outcome, data):
    cfg = load_config(name)
    if outcome.startswith('refused: '):
        with pytest.raises(InputError, match=re.escape(outcome.removeprefix('refused: '))):
            plug(cfg, 't')
    else:
        train_and_predict(plug(cfg, 't'), data)


def make_batch(scope: str, classes: int, data: Path, count: int = 2) -> dict:
    """Small real images with their annotations, or tiny ones, as the library's dataloaders give them."""
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
    """One training step, which must move the whole backbone, and one prediction."""
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
        MessageHub.get_current_instance().update_info('iter', 0)  # some losses warm up by it
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
        # Training on several GPUs stops at a parameter without gradient unless it is announced.
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


def test_nothing_is_left_behind_where_writing_fails(tmp_path, monkeypatch):
    def fail(*_):
        raise OSError(28, 'No space left on device')

    before = load_config('mmdet::atss/atss_r50_fpn_1x_coco.py')
    monkeypatch.setattr('os.replace', fail)
    with pytest.raises(InputError, match='cannot be written: No space left'):
        write(before, plug(before), tmp_path / 'new.py')
    assert not list(tmp_path.iterdir())
