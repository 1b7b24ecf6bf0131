_base_ = 'mmseg::swin/swin-base-patch4-window12-in1k-384x384-pre_upernet_8xb2-160k_ade20k-512x512.py'
custom_imports = dict(imports=['swin_mm'])
checkpoint_file = (
    'https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_base_patch4_window12_384.pth'
)
model = dict(backbone=dict(type='swin_mm.SwinTransformer', init_cfg=dict(checkpoint=checkpoint_file)))
