# Swin-B, window 7, trained on ImageNet-22k.
swin = dict(
    type='swin_mm.SwinTransformer',
    arch='b',
    init_cfg=dict(
        type='Pretrained',
        checkpoint='https://github.com/SwinTransformer/storage/releases/download/v1.0.0/swin_base_patch4_window7_224_22k.pth',
    ),
)
channels = [128, 256, 512, 1024]
