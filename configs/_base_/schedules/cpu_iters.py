# mmseg on a CPU: AdamW from random weights for a few iterations, one checkpoint, a log line every 10 iterations.
# A change of max_iters needs the same change of the last scheduler's end.
_base_ = ['mmseg::_base_/schedules/schedule_20k.py', 'mmseg::_base_/default_runtime.py', 'no_decay.py']
max_iters = 240
train_cfg = dict(max_iters=max_iters, val_interval=max_iters)
optim_wrapper = dict(
    optimizer=dict(_delete_=True, type='AdamW', lr=1e-3, weight_decay=0.05),
    paramwise_cfg=dict(custom_keys=_base_.no_decay),
    clip_grad=dict(_delete_=True, max_norm=10.0),
)
param_scheduler = [
    dict(type='LinearLR', start_factor=0.01, by_epoch=False, begin=0, end=20),
    dict(type='PolyLR', eta_min=1e-6, power=1.0, begin=0, end=max_iters, by_epoch=False),
]
default_hooks = dict(checkpoint=dict(interval=max_iters), logger=dict(interval=10))
