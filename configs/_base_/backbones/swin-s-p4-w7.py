# Swin-S, window 7, trained on ImageNet-1k.
swin = dict(
    type='swin_mm.SwinTransformer',
    arch='s',
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_small_patch4_window7_224.pth',
    ),
)
channels = [96, 192, 384, 768]
