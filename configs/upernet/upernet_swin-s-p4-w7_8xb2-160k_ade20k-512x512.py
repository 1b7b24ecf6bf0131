_base_ = 'mmseg::swin/swin-small-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py'
custom_imports = dict(imports=['swin_mm'])
checkpoint_file = (
    'https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_small_patch4_window7_224.pth'
)
model = dict(backbone=dict(type='swin_mm.SwinTransformer', init_cfg=dict(checkpoint=checkpoint_file)))
