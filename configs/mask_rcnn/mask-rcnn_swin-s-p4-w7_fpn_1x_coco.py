_base_ = ['./mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py', '../_base_/backbones/swin-s-p4-w7.py']
backbone = dict(_delete_=True, drop_path_rate=0.2, **_base_.swin)
model = dict(backbone=backbone, neck=dict(in_channels=_base_.channels))
