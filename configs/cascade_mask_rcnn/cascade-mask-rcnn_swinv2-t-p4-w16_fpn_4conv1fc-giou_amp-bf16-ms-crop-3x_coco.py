_base_ = './cascade-mask-rcnn_swinv2-t-p4-w16_fpn_4conv1fc-giou_ms-crop-3x_coco.py'
optim_wrapper = dict(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1.0)
