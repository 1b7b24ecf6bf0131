"""Test-time augmentation."""

from mmengine.config import Config

from swin_mm.openmmlab.config import as_list, test_dataset
from swin_mm.utils.errors import InputError

_DET_TTA = {'type': 'DetTTAModel', 'tta_cfg': {'nms': {'type': 'nms', 'iou_threshold': 0.5}, 'max_per_img': 100}}


def apply_tta(cfg: Config) -> None:
    """Wrap the model in its library's test-time augmentation: a flip, unless the config says otherwise."""
    if cfg.default_scope == 'mmdet':
        _leave_out_masks(cfg)
        model, pack = _DET_TTA, 'PackDetInputs'
    else:
        model, pack = {'type': 'SegTTAModel'}, 'PackSegInputs'
    dataset = test_dataset(cfg)
    # Unflipped first: the merged prediction keeps the ground truth of the first view.
    flips = [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)]
    default = [*dataset.pipeline[:-1], dict(type='TestTimeAug', transforms=[flips, [dict(type=pack)]])]
    dataset.pipeline = cfg.get('tta_pipeline') or default
    cfg.model = dict(cfg.get('tta_model') or model, module=cfg.model)


def _leave_out_masks(cfg: Config) -> None:
    """Test boxes only: mmdet's test-time augmentation refuses predictions with masks."""
    if 'panoptic_head' in cfg.model:
        raise InputError(f'--tta: mmdet merges boxes only, and {cfg.model.type} predicts masks; leave --tta out')
    heads = cfg.model.get('roi_head')
    if not heads or heads.get('mask_head') is None:
        return
    print('note: test-time augmentation of mmdet merges boxes only, masks are left out')
    heads.mask_head = heads.mask_roi_extractor = None
    for evaluator in as_list(cfg.test_evaluator):
        if 'segm' in evaluator.get('metric', ()):
            evaluator.metric = ['bbox']
