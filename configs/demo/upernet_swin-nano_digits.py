_base_ = [
    '../_base_/models/upernet_swin-nano.py',
    '../_base_/datasets/digits_semantic.py',
    '../_base_/schedules/adamw_epochs.py',
    'mmseg::_base_/default_runtime.py',
]
default_hooks = dict(logger=dict(type='LoggerHook', interval=20), visualization=dict(type='SegVisualizationHook'))
head = dict(num_classes=3)
model = dict(data_preprocessor=dict(size=(128, 128)), decode_head=head, auxiliary_head=head)
