_base_ = './retinanet_swin-t-p4-w7_fpn_adamw-1x_coco.py'
optim_wrapper = dict(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1.0)
