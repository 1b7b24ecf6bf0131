_base_ = [
    '../_base_/models/mask-rcnn_swin-nano_fpn.py',
    '../_base_/datasets/nuclei_instance.py',
    '../_base_/schedules/adamw_epochs.py',
    'mmdet::_base_/default_runtime.py',
]
one, many = dict(num_classes=1), dict(nms_pre=1000, max_per_img=400)  # nuclei are small and many
model = dict(rpn_head=dict(anchor_generator=dict(scales=[2])), roi_head=dict(bbox_head=one, mask_head=one))
model.update(train_cfg=dict(rpn_proposal=many), test_cfg=dict(rpn=many, rcnn=dict(max_per_img=150)))
default_hooks = dict(logger=dict(interval=20))
