"""One training iteration and a test run of one config per family, on small versions of real images."""

import json
import os
from pathlib import Path

import pytest
from mmengine.config import Config
from PIL import Image
from support.tool_fixtures import ROOT, run_tool

import swin_mm  # noqa: F401 (makes mmdet:: and mmseg:: names of configs work)

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif('SWIN_MM_DATA' not in os.environ, reason='SWIN_MM_DATA is not set'),
]
SMALLER = 4  # every length in pixels is divided by this
FAMILIES = {
    'mask_rcnn/mask-rcnn_swin-s-p4-w7_fpn_ms-crop-1x_coco': 'coco/segm_mAP',
    'cascade_mask_rcnn/cascade-mask-rcnn_swin-t-p4-w7_fpn_4conv1fc-giou_ms-crop-3x_coco': 'coco/segm_mAP',
    'cascade_mask_rcnn/cascade-mask-rcnn_swinv2-t-p4-w16_fpn_4conv1fc-giou_ms-crop-3x_coco': 'coco/segm_mAP',
    'retinanet/retinanet_swin-t-p4-w7_fpn_adamw-1x_coco': 'coco/bbox_mAP',
    'atss/atss_swin-t-p4-w7_fpn_ms-crop-3x_coco': 'coco/bbox_mAP',
    'reppoints/reppoints-moment_swin-t-p4-w7_fpn-gn_head-gn_ms-crop-3x_coco': 'coco/bbox_mAP',
    'sparse_rcnn/sparse-rcnn_swin-t-p4-w7_fpn_300-proposals_crop-ms-480-800-3x_coco': 'coco/bbox_mAP',
    'htc/htc_swin-b-p4-w7_in22k_fpn_ms-400-1400-6x_coco': 'coco/segm_mAP',
    'rtmdet/rtmdet_l_swin_b_4xb32-100e_coco': 'coco/bbox_mAP',
    'dino/dino-5scale_swin-l_8xb2-12e_coco': 'coco/bbox_mAP',
    'mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco': 'coco/segm_mAP',
    'mask2former/mask2former_swin-t_8xb2-160k_ade20k-512x512': 'mIoU',
    'upernet/upernet_swin-b-p4-w7_in22k_8xb2-160k_ade20k-640x640': 'mIoU',
    'upernet/upernet_swinv2-t-p4-w16_8xb2-160k_ade20k-512x512': 'mIoU',
    'knet/knet-s3_swin-t_upernet_8xb2-adamw-80k_ade20k-512x512': 'mIoU',
    'maskformer/maskformer_swin-t_upernet_8xb2-160k_ade20k-512x512': 'mIoU',
    'custom/upernet_swin-t-p4-w7_custom-512x512': 'mIoU',
}
# mmdet merges boxes only, so a model that predicts masks without a separate mask head has no test-time augmentation.
WITHOUT_TTA = ('mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco',)


def link(folder: Path) -> None:
    """Link the data sets to where the configs expect them."""
    source = Path(os.environ['SWIN_MM_DATA'])
    (folder / 'data/ade').mkdir(parents=True)
    (folder / 'data/ade/ADEChallengeData2016').symlink_to(source / 'coco_sem_cc')
    for path in (source / 'coco_sem_cc/annotations').glob('*/*.png'):  # the template has three classes
        place = folder / 'data/custom/annotations' / path.parent.name / path.name
        place.parent.mkdir(parents=True, exist_ok=True)
        Image.open(path).point(lambda label: label % 4).save(place)
    (folder / 'data/custom/images').symlink_to(source / 'coco_sem_cc/images')
    annotations = folder / 'data/coco/annotations'
    # Stock configs of Mask2Former for instances name panoptic maps too, but do not read them.
    (annotations / 'panoptic_train2017').mkdir(parents=True)
    (annotations / 'panoptic_val2017').mkdir()
    for path in (source / 'coco_cc/annotations').iterdir():
        (annotations / path.name).symlink_to(path)
    for name in ('train2017', 'val2017'):
        (folder / 'data/coco' / name).symlink_to(source / 'coco_cc' / name)
    # For the semantic branch of HTC: all pixels of one class.
    things = folder / 'data/coco/stuffthingmaps/train2017'
    things.mkdir(parents=True)
    for path in (source / 'coco_cc/train2017').glob('*.jpg'):
        Image.new('L', Image.open(path).size).save(things / f'{path.stem}.png')


def shrink(node, name: str = ''):
    """Divide every length in pixels in a config by SMALLER."""
    if isinstance(node, dict):
        return {key: shrink(value, key) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(shrink(value, name) for value in node)
    if name == 'scale_factor':
        return node / SMALLER
    lengths = ('scale', 'scales', 'crop_size', 'img_scale', 'size', 'max_size')
    if name in lengths and isinstance(node, int) and node > 32:
        return max(32, node // SMALLER // 32 * 32)  # some necks need multiples of their largest stride
    return node


def small_config(name: str, folder: Path) -> Path:
    """Write a version of a config for one iteration from random weights, with two small images and no workers."""
    config = Config.fromfile(ROOT / 'configs' / f'{name}.py')
    for key in ('train_dataloader', 'test_dataloader', 'tta_pipeline'):
        if key in config:
            config[key] = shrink(config[key])
    for key in ('size', 'batch_augments'):
        if config.model.data_preprocessor.get(key):
            config.model.data_preprocessor[key] = shrink(config.model.data_preprocessor[key], key)
    for part, images in (('train', 2), ('test', 2)):
        loader = config[f'{part}_dataloader']
        loader.update(num_workers=0, persistent_workers=False, batch_size=min(loader.batch_size, 2))
        loader.dataset.indices = images
    config.model.backbone.init_cfg = None
    limits = config.model.get('test_cfg') or {}
    for part in (limits, limits.get('rcnn') or {}):
        if 'score_thr' in part:
            part.score_thr = 0.0  # random weights give low scores
    if limits.get('rpn'):  # the cost of the second stage does not depend on the image size
        limits.rpn.max_per_img = 50
        stages = config.model.train_cfg.rcnn
        for stage in stages if isinstance(stages, list) else [stages]:
            stage.sampler.num = 32
    config.val_cfg = config.val_dataloader = config.val_evaluator = None  # covered by the test run
    by_epoch = 'max_epochs' in config.train_cfg
    config.train_cfg = dict(type='EpochBasedTrainLoop', max_epochs=1)
    if not by_epoch:
        config.train_cfg = dict(type='IterBasedTrainLoop', max_iters=1)
    config.default_hooks.checkpoint = dict(type='CheckpointHook', by_epoch=by_epoch, interval=1, save_optimizer=False)
    config.default_hooks.logger.interval = 1
    path = folder / 'small.py'
    config.dump(path)
    return path


@pytest.mark.parametrize('name', FAMILIES)
def test_one_iteration_and_a_test_run(name, tmp_path):
    link(tmp_path)
    config = small_config(name, tmp_path)
    log = run_tool('train', config, '--work-dir', 'run', cwd=tmp_path, timeout=1800)
    assert 'loss: ' in log and 'nan' not in log.rpartition('loss: ')[2].split()[0]
    (weights,) = (tmp_path / 'run').glob('*_1.pth')
    for options in ([], ['--tta'])[: 1 if name in WITHOUT_TTA else 2]:
        run_tool('test', config, weights, '--work-dir', 'test', *options, cwd=tmp_path, timeout=1800)
        (path,) = tmp_path.glob('test/*/*.json')
        metric = 'coco/bbox_mAP' if options and 'coco' in FAMILIES[name] else FAMILIES[name]
        assert metric in json.loads(path.read_text())
        path.unlink()
