# The template for instances on a CPU: a small Swin from random weights, small images, few proposals, a short run.
_base_ = 'mask-rcnn_swin-t-p4-w7_fpn_custom.py'
short, long, epochs = 256, 448, 12
train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline
train_pipeline[2].scales = [(short * part // 25, long) for part in range(15, 26)]
test_pipeline[1].scale = (long, short)
train_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(pipeline=train_pipeline))
val_dataloader = test_dataloader = dict(num_workers=0, persistent_workers=False, dataset=dict(pipeline=test_pipeline))
param_scheduler = [_base_.param_scheduler[0], dict(_base_.param_scheduler[1], end=epochs, milestones=[9, 11])]
optim_wrapper, train_cfg = dict(optimizer=dict(lr=1e-3), clip_grad=dict(max_norm=10.0)), dict(max_epochs=epochs)
width, heads = dict(out_channels=96), dict(bbox_head=dict(in_channels=96, fc_out_channels=256))
heads.update(mask_head=dict(in_channels=96, num_convs=2, conv_out_channels=64))
model = dict(backbone=dict(embed_dims=48, depths=(2, 2, 4, 2), drop_path_rate=0.0, init_cfg=None))
model.update(neck=dict(in_channels=[48, 96, 192, 384], **width), rpn_head=dict(in_channels=96, feat_channels=96))
model.update(roi_head=dict(bbox_roi_extractor=width, mask_roi_extractor=width, **heads))
proposals = dict(nms_pre=400, max_per_img=200)
model.update(train_cfg=dict(rpn_proposal=proposals, rcnn=dict(sampler=dict(num=64))), test_cfg=dict(rpn=proposals))
