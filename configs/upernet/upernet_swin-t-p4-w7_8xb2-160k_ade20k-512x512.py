_base_ = 'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py'
custom_imports = dict(imports=['swin_mm'])
weights = 'https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_tiny_patch4_window7_224.pth'
init_cfg = dict(type='Pretrained', checkpoint=weights)
backbone = dict(_delete_=True, type='swin_mm.SwinTransformer', arch='t', drop_path_rate=0.3, init_cfg=init_cfg)
model = dict(backbone=backbone)
