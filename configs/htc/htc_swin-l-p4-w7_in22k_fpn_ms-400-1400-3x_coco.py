_base_ = ['../_base_/models/htc_swin_fpn_ms-400-1400_coco.py', '../_base_/backbones/swin-l-p4-w7_in22k.py']
backbone = dict(_delete_=True, drop_path_rate=0.3, **_base_.swin)
model = dict(backbone=backbone, neck=dict(in_channels=_base_.channels))
train_cfg = dict(max_epochs=36)
param_scheduler = _base_.steps_3x
