_base_ = ['mmdet::reppoints/reppoints-moment_r50_fpn-gn_head-gn_1x_coco.py', '../_base_/schedules/swin-t_coco.py']
backbone = dict(_delete_=True, drop_path_rate=0.2, out_indices=(1, 2, 3), **_base_.swin)
model = dict(backbone=backbone, neck=dict(in_channels=_base_.channels[1:], start_level=0))
train_pipeline = [*_base_.train_pipeline[:2], *_base_.ms_crop, _base_.train_pipeline[-1]]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
train_cfg = dict(max_epochs=36)
param_scheduler = _base_.steps_3x
optim_wrapper = dict(_delete_=True, **_base_.adamw)
