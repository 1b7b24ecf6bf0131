# Mask R-CNN of a size that trains on a CPU: Swin with half of Swin-T's channels, and heads to match.
_base_ = 'mmdet::_base_/models/mask-rcnn_r50_fpn.py'
custom_imports = dict(imports=['swin_mm'])
model = dict(
    backbone=dict(
        _delete_=True,
        type='swin_mm.SwinTransformer',
        embed_dims=48,
        depths=(2, 2, 4, 2),
        num_heads=(3, 6, 12, 24),
        drop_path_rate=0.0,
    ),
    neck=dict(in_channels=[48, 96, 192, 384], out_channels=96),
    rpn_head=dict(in_channels=96, feat_channels=96, anchor_generator=dict(scales=[6])),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=96),
        bbox_head=dict(in_channels=96, fc_out_channels=256),
        mask_roi_extractor=dict(out_channels=96),
        mask_head=dict(in_channels=96, num_convs=2, conv_out_channels=64),
    ),
    train_cfg=dict(rpn_proposal=dict(nms_pre=400, max_per_img=200), rcnn=dict(sampler=dict(num=32))),
    test_cfg=dict(rpn=dict(nms_pre=400, max_per_img=200)),
)
