_base_ = [
    '../_base_/models/upernet_swin-nano.py',
    '../_base_/datasets/nuclei_semantic.py',
    '../_base_/schedules/cpu_iters.py',
]
head = dict(num_classes=2)
model = dict(data_preprocessor=dict(_base_.normalization, size=(256, 256)), decode_head=head, auxiliary_head=head)
