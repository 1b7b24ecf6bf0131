_base_ = 'cascade-mask-rcnn_swin_fpn_4conv1fc-giou_ms-crop-3x_coco.py'
train_cfg = dict(max_epochs=12)
param_scheduler = _base_.steps_1x
