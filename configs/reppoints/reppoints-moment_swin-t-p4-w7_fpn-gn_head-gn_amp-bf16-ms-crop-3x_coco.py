_base_ = './reppoints-moment_swin-t-p4-w7_fpn-gn_head-gn_ms-crop-3x_coco.py'
optim_wrapper = dict(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1.0)
