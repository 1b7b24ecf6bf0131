_base_ = './swin-t-p4-w7_in22k_16xb64-30e_in1k.py'
optim_wrapper = dict(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1.0)
