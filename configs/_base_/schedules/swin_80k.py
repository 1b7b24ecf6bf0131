_base_ = 'swin_160k.py'
warmup, poly = _base_.param_scheduler
param_scheduler = [warmup, dict(poly, end=80000)]
train_cfg = dict(max_iters=80000, val_interval=8000)
default_hooks = dict(checkpoint=dict(interval=8000))
