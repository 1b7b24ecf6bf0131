# Swin-T, window 7, trained on ImageNet-1k.
swin = dict(
    type='swin_mm.SwinTransformer',
    arch='t',
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_tiny_patch4_window7_224.pth',
    ),
)
channels = [96, 192, 384, 768]
