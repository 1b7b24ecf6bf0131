_base_ = 'mmseg::maskformer/maskformer_swin-s_upernet_8xb2-160k_ade20k-512x512.py'
custom_imports = dict(imports=['swin_mm'])
checkpoint_file = (
    'https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_small_patch4_window7_224.pth'
)
model = dict(backbone=dict(type='swin_mm.SwinTransformer', init_cfg=dict(checkpoint=checkpoint_file)))
keys = {key.replace('stages', 'layers'): value for key, value in _base_.custom_keys.items()}
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(_delete_=True, **keys)))
