# SwinV2-L, window 16, trained on ImageNet-22k (192 px, window 12), then on ImageNet-1k (256 px, window 16).
swin = dict(
    type='swin_mm.SwinTransformerV2',
    arch='l',
    window_size=16,
    pretrained_window_sizes=(12, 12, 12, 6),
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://github.com/SwinTransformer/storage/releases/download/v2.0.0/swinv2_large_patch4_window12to16_192to256_22kto1k_ft.pth',
    ),
)
channels = [192, 384, 768, 1536]
