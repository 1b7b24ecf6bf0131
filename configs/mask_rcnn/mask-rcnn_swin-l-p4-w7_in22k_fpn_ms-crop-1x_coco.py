_base_ = ['./mask-rcnn_swin-t-p4-w7_fpn_ms-crop-1x_coco.py', '../_base_/backbones/swin-l-p4-w7_in22k.py']
backbone = dict(_delete_=True, drop_path_rate=0.3, **_base_.swin)
model = dict(backbone=backbone, neck=dict(in_channels=_base_.channels))
