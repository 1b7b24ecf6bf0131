_base_ = './upernet_swinv2-t-p4-w16_8xb2-160k_ade20k-512x512.py'
optim_wrapper = dict(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1.0)
