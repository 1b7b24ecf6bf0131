_base_ = './retinanet_swin-t-p4-w7_fpn_adamw-1x_coco.py'
optim_wrapper = dict(type='AmpOptimWrapper')
