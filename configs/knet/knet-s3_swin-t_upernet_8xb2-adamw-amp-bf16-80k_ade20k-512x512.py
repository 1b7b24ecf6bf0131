_base_ = './knet-s3_swin-t_upernet_8xb2-adamw-80k_ade20k-512x512.py'
optim_wrapper = dict(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1.0)
