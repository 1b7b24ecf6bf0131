_base_ = './mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco.py'
optim_wrapper = dict(type='AmpOptimWrapper')
