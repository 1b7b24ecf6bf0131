# Instances in COCO format: the cell nuclei in data/nuclei. To train on your own data, see docs/own_data.md.
_base_ = 'mmdet::_base_/datasets/coco_instance.py'
data = dict(data_root='data/nuclei/', metainfo=dict(classes=('nucleus',)))
normalization = dict(mean=[12.3] * 3, std=[17.3] * 3)  # statistics of these dark images
load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True, with_mask=True)]
resize = dict(type='Resize', scale=(256, 256), keep_ratio=True)
flip = dict(type='RandomFlip', prob=0.75, direction=['horizontal', 'vertical', 'diagonal'])
keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
train_pipeline = [*load, resize, flip, dict(type='PackDetInputs')]
test_pipeline = [load[0], resize, load[1], dict(type='PackDetInputs', meta_keys=keys)]
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(**data, ann_file='annotations/train.json', data_prefix=dict(img='train/'), pipeline=train_pipeline),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(**data, ann_file='annotations/val.json', data_prefix=dict(img='val/'), pipeline=test_pipeline),
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file='data/nuclei/annotations/val.json')
test_evaluator = val_evaluator
