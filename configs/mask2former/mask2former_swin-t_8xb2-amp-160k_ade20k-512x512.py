_base_ = './mask2former_swin-t_8xb2-160k_ade20k-512x512.py'
optim_wrapper = dict(type='AmpOptimWrapper')
