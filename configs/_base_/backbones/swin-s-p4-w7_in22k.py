# Swin-S, window 7, trained on ImageNet-22k.
swin = dict(
    type='swin_mm.SwinTransformer',
    arch='s',
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://github.com/SwinTransformer/storage/releases/download/v1.0.8/swin_small_patch4_window7_224_22k.pth',
    ),
)
channels = [96, 192, 384, 768]
