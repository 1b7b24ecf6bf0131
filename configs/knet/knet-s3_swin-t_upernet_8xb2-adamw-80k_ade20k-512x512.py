_base_ = 'mmseg::knet/knet-s3_swin-t_upernet_8xb2-adamw-80k_ade20k-512x512.py'
custom_imports = dict(imports=['swin_mm'])
checkpoint_file = 'https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_tiny_patch4_window7_224.pth'
weights = dict(type='Pretrained', checkpoint=checkpoint_file)
model = dict(pretrained=None, backbone=dict(type='swin_mm.SwinTransformer', init_cfg=weights))
