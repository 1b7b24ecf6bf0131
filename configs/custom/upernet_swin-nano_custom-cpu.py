# The template for semantic masks on a CPU: a small Swin from random weights, small crops, a short run.
_base_ = 'upernet_swin-t-p4-w7_custom-512x512.py'
crop, iterations = 128, 400
train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline
train_pipeline[2].scale = test_pipeline[1].scale = (4 * crop, crop)
train_pipeline[3].crop_size = (crop, crop)
train_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(pipeline=test_pipeline))
test_dataloader = val_dataloader
warmup, decay = _base_.param_scheduler
param_scheduler = [dict(warmup, end=iterations // 20), dict(decay, begin=iterations // 20, end=iterations)]
optim_wrapper, train_cfg = dict(optimizer=dict(lr=1e-3)), dict(max_iters=iterations, val_interval=iterations // 2)
decode_head = dict(in_channels=[48, 96, 192, 384], channels=64, norm_cfg=dict(type='BN'))
auxiliary_head = dict(in_channels=192, channels=32, norm_cfg=dict(type='BN'))
backbone = dict(embed_dims=48, depths=(2, 2, 4, 2), drop_path_rate=0.0, init_cfg=None)
model = dict(backbone=backbone, data_preprocessor=dict(size=(crop, crop)), decode_head=decode_head)
model.update(auxiliary_head=auxiliary_head)
