_base_ = 'mmseg::swin/swin-large-patch4-window7-in22k-pre_upernet_8xb2-160k_ade20k-512x512.py'
custom_imports = dict(imports=['swin_mm'])
checkpoint_file = (
    'https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_large_patch4_window7_224_22k.pth'
)
model = dict(backbone=dict(type='swin_mm.SwinTransformer', init_cfg=dict(checkpoint=checkpoint_file)))
