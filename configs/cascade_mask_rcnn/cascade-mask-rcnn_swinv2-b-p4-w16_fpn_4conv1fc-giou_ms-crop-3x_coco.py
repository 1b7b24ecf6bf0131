_base_ = [
    '../_base_/models/cascade-mask-rcnn_swinv2_fpn_4conv1fc-giou_ms-crop-3x_coco.py',
    '../_base_/backbones/swinv2-b-p4-w16.py',
]
backbone = dict(_delete_=True, drop_path_rate=0.3, **_base_.swin)
model = dict(backbone=backbone, neck=dict(in_channels=_base_.channels))
