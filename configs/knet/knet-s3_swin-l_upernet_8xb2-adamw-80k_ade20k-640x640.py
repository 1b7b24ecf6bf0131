_base_ = 'mmseg::knet/knet-s3_swin-l_upernet_8xb2-adamw-80k_ade20k-640x640.py'
custom_imports = dict(imports=['swin_mm'])
checkpoint_file = (
    'https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_large_patch4_window7_224_22k.pth'
)
weights = dict(type='Pretrained', checkpoint=checkpoint_file)
model = dict(pretrained=None, backbone=dict(type='swin_mm.SwinTransformer', init_cfg=weights))
