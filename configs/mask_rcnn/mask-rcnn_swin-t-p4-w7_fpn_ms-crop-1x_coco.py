_base_ = ['./mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py', '../_base_/schedules/swin_coco.py']
model = dict(backbone=dict(drop_path_rate=0.1))
train_cfg = dict(max_epochs=12)
param_scheduler = _base_.steps_1x
