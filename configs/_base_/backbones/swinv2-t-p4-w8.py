# SwinV2-T, window 8, trained on ImageNet-1k at 256 px.
swin = dict(
    type='swin_mm.SwinTransformerV2',
    arch='t',
    window_size=8,
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://github.com/SwinTransformer/storage/releases/download/v2.0.0/swinv2_tiny_patch4_window8_256.pth',
    ),
)
channels = [96, 192, 384, 768]
