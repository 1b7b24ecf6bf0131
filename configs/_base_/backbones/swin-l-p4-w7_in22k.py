# Swin-L, window 7, trained on ImageNet-22k.
swin = dict(
    type='swin_mm.SwinTransformer',
    arch='l',
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_large_patch4_window7_224_22k.pth',
    ),
)
channels = [192, 384, 768, 1536]
