_base_ = [
    '../_base_/models/mask-rcnn_swin-nano_fpn.py',
    '../_base_/datasets/nuclei_instance.py',
    '../_base_/schedules/cpu_epochs.py',
]
head, many = dict(num_classes=1), dict(nms_pre=1000, max_per_img=400)  # small objects, up to 100 in an image
model = dict(rpn_head=dict(anchor_generator=dict(scales=[2])), roi_head=dict(bbox_head=head, mask_head=head))
model.update(train_cfg=dict(rpn_proposal=many), test_cfg=dict(rpn=many, rcnn=dict(max_per_img=150)))
model.update(data_preprocessor=_base_.normalization)
