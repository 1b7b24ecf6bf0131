# SwinV2-S, window 16, trained on ImageNet-1k at 256 px, where the last map is one window of 8.
swin = dict(
    type='swin_mm.SwinTransformerV2',
    arch='s',
    window_size=16,
    pretrained_window_sizes=(16, 16, 16, 8),
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://github.com/SwinTransformer/storage/releases/download/v2.0.0/swinv2_small_patch4_window16_256.pth',
    ),
)
channels = [96, 192, 384, 768]
