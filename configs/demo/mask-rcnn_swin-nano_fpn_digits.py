_base_ = [
    '../_base_/models/mask-rcnn_swin-nano_fpn.py',
    '../_base_/datasets/digits_instance.py',
    '../_base_/schedules/adamw_epochs.py',
    'mmdet::_base_/default_runtime.py',
]
model = dict(roi_head=dict(bbox_head=dict(num_classes=10), mask_head=dict(num_classes=10)))
default_hooks = dict(logger=dict(interval=20), visualization=dict(score_thr=0.5))
