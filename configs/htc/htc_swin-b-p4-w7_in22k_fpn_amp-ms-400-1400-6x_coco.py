_base_ = './htc_swin-b-p4-w7_in22k_fpn_ms-400-1400-6x_coco.py'
optim_wrapper = dict(type='AmpOptimWrapper')
