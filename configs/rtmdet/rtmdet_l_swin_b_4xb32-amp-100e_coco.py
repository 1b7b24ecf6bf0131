_base_ = './rtmdet_l_swin_b_4xb32-100e_coco.py'
optim_wrapper = dict(type='AmpOptimWrapper')
