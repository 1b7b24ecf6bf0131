_base_ = './sparse-rcnn_swin-t-p4-w7_fpn_300-proposals_crop-ms-480-800-3x_coco.py'
optim_wrapper = dict(type='AmpOptimWrapper', dtype='bfloat16', loss_scale=1.0)
