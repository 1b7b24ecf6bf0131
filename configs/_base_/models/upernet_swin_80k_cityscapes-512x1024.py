# UPerNet on Cityscapes with the ADE20K recipe, for 80k iterations; leaves set the backbone.
_base_ = [
    'mmseg::_base_/models/upernet_swin.py',
    'mmseg::_base_/datasets/cityscapes.py',
    'mmseg::_base_/default_runtime.py',
    '../schedules/swin_80k.py',
]
custom_imports = dict(imports=['swin_mm'])
model = dict(data_preprocessor=dict(size=_base_.crop_size))
