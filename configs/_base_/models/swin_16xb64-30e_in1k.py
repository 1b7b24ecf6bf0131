# Fine-tuning on ImageNet-1k after ImageNet-22k with the recipe of Swin; leaves set the backbone.
_base_ = 'mmpretrain::swin_transformer/swin-tiny_16xb64_in1k.py'
custom_imports = dict(imports=['swin_mm'])
lr = 2e-5 * 1024 / 512
optim_wrapper = dict(optimizer=dict(lr=lr, weight_decay=1e-8))
train_cfg = dict(max_epochs=30)
param_scheduler = [
    dict(type='LinearLR', start_factor=1e-3, by_epoch=True, begin=0, end=5, convert_to_iter_based=True),
    dict(type='CosineAnnealingLR', eta_min=lr / 100, by_epoch=True, begin=5),
]
