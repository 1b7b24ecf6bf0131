_base_ = 'mmdet::swin/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'
custom_imports = dict(imports=['swin_mm'])
weights = 'https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_tiny_patch4_window7_224.pth'
init_cfg = dict(type='Pretrained', checkpoint=weights)
backbone = dict(_delete_=True, type='swin_mm.SwinTransformer', arch='t', drop_path_rate=0.2, init_cfg=init_cfg)
model = dict(backbone=backbone)
