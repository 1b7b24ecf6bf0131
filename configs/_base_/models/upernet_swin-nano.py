# UPerNet of a size that trains on a CPU: Swin with half of Swin-T's channels, and heads to match.
_base_ = 'mmseg::_base_/models/upernet_swin.py'
custom_imports = dict(imports=['swin_mm'])
norm_cfg = dict(type='BN', requires_grad=True)
model = dict(
    backbone=dict(
        type='swin_mm.SwinTransformer',
        embed_dims=48,
        depths=(2, 2, 4, 2),
        num_heads=(3, 6, 12, 24),
        drop_path_rate=0.0,
    ),
    decode_head=dict(in_channels=[48, 96, 192, 384], channels=64, norm_cfg=norm_cfg),
    auxiliary_head=dict(in_channels=192, channels=32, norm_cfg=norm_cfg),
)
