# Cascade Mask R-CNN with the recipe of Swin; leaves set the backbone.
_base_ = ['mmdet::cascade_rcnn/cascade-mask-rcnn_r50_fpn_1x_coco.py', '../schedules/swin_coco.py']
custom_imports = dict(imports=['swin_mm'])
head = dict(
    type='ConvFCBBoxHead',
    num_shared_convs=4,
    num_shared_fcs=1,
    conv_out_channels=256,
    reg_class_agnostic=False,
    reg_decoded_bbox=True,
    norm_cfg=dict(type='SyncBN', requires_grad=True),
    loss_bbox=dict(type='GIoULoss', loss_weight=10.0),
)
model = dict(roi_head=dict(bbox_head=[dict(stock, **head) for stock in _base_.model.roi_head.bbox_head]))
train_pipeline = [*_base_.train_pipeline[:2], *_base_.ms_crop, _base_.train_pipeline[-1]]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
train_cfg = dict(max_epochs=36)
param_scheduler = _base_.steps_3x
optim_wrapper = dict(_delete_=True, **_base_.adamw)
