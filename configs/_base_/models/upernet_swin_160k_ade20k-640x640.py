# UPerNet at 640 x 640; leaves set the backbone.
_base_ = [
    'mmseg::_base_/models/upernet_swin.py',
    'mmseg::_base_/datasets/ade20k_640x640.py',
    'mmseg::_base_/default_runtime.py',
    '../schedules/swin_160k.py',
]
custom_imports = dict(imports=['swin_mm'])
data_preprocessor = dict(size=_base_.crop_size)
classes = dict(num_classes=150)
model = dict(data_preprocessor=data_preprocessor, decode_head=classes, auxiliary_head=classes)
train_dataloader = dict(batch_size=2)
