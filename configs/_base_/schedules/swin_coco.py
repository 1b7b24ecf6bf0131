# Optimizer, schedules and multi-scale augmentation of Swin on COCO; leaves pick what they need by name.
_base_ = 'no_decay.py'
adamw = dict(
    type='OptimWrapper',
    optimizer=dict(type='AdamW', lr=0.0001, betas=(0.9, 0.999), weight_decay=0.05),
    paramwise_cfg=dict(custom_keys=_base_.no_decay),
)
warmup = dict(type='LinearLR', start_factor=0.001, by_epoch=False, begin=0, end=500)
steps_1x = [warmup, dict(type='MultiStepLR', begin=0, end=12, by_epoch=True, milestones=[8, 11], gamma=0.1)]
steps_3x = [warmup, dict(type='MultiStepLR', begin=0, end=36, by_epoch=True, milestones=[27, 33], gamma=0.1)]
steps_6x = [warmup, dict(type='MultiStepLR', begin=0, end=72, by_epoch=True, milestones=[63, 69], gamma=0.1)]
resize = dict(type='RandomChoiceResize', scales=[(side, 1333) for side in range(480, 801, 32)], keep_ratio=True)
crop_first = [
    dict(type='RandomChoiceResize', scales=[(400, 1333), (500, 1333), (600, 1333)], keep_ratio=True),
    dict(type='RandomCrop', crop_type='absolute_range', crop_size=(384, 600), allow_negative_crop=True),
    resize,
]
ms_crop = [dict(type='RandomFlip', prob=0.5), dict(type='RandomChoice', transforms=[[resize], crop_first])]
