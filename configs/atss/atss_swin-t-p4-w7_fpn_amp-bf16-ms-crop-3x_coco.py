_base_ = './atss_swin-t-p4-w7_fpn_ms-crop-3x_coco.py'
optim_wrapper = dict(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1.0)
