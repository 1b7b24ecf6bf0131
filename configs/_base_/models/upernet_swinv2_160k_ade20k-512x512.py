# UPerNet with the recipe of Swin V2; leaves set the backbone.
_base_ = 'mmseg::swin/swin-tiny-patch4-window7-in1k-pre_upernet_8xb2-160k_ade20k-512x512.py'
custom_imports = dict(imports=['swin_mm'])
optim_wrapper = dict(
    constructor='swin_mm.LayerDecayOptimWrapperConstructor',
    optimizer=dict(lr=0.00004, weight_decay=0.05),
    paramwise_cfg=dict(decay_rate=0.95),
)
