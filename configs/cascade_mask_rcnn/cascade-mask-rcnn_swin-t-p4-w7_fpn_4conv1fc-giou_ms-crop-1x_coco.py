_base_ = [
    '../_base_/models/cascade-mask-rcnn_swin_fpn_4conv1fc-giou_ms-crop-1x_coco.py',
    '../_base_/backbones/swin-t-p4-w7.py',
]
backbone = dict(_delete_=True, drop_path_rate=0.0, **_base_.swin)
model = dict(backbone=backbone, neck=dict(in_channels=_base_.channels))
