# Swin-B, window 12, trained on ImageNet-22k at 384 px.
swin = dict(
    type='swin_mm.SwinTransformer',
    arch='b',
    window_size=12,
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_base_patch4_window12_384_22k.pth',
    ),
)
channels = [128, 256, 512, 1024]
