_base_ = [
    'mmdet::sparse_rcnn/sparse-rcnn_r50_fpn_300-proposals_crop-ms-480-800-3x_coco.py',
    '../_base_/schedules/swin-t_coco.py',
]
backbone = dict(_delete_=True, drop_path_rate=0.2, **_base_.swin)
model = dict(backbone=backbone, neck=dict(in_channels=_base_.channels))
param_scheduler = _base_.steps_3x
optim_wrapper = dict(_delete_=True, clip_grad=dict(max_norm=1, norm_type=2), **_base_.adamw)
