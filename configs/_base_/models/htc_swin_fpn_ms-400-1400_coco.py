# HTC with multi-scale training and soft NMS of HTC++; leaves set the backbone and the number of epochs.
_base_ = ['mmdet::htc/htc_r50_fpn_1x_coco.py', '../schedules/swin_coco.py']
custom_imports = dict(imports=['swin_mm'])
model = dict(test_cfg=dict(rcnn=dict(nms=dict(type='soft_nms'))))
multi_scale = dict(type='RandomResize', scale=[(1600, 400), (1600, 1400)], keep_ratio=True)
train_pipeline = [*_base_.train_pipeline[:2], multi_scale, *_base_.train_pipeline[3:]]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
optim_wrapper = dict(_delete_=True, **_base_.adamw)
