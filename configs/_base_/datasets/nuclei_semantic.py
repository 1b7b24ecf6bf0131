# Semantic masks, one PNG of class indices per image: the cell nuclei in data/nuclei. To train on your own data, see
# docs/own_data.md.
_base_ = 'mmseg::_base_/datasets/ade20k.py'
metainfo = dict(classes=('background', 'nucleus'), palette=[[0, 0, 0], [255, 225, 25]])
data = dict(type='BaseSegDataset', data_root='data/nuclei/', metainfo=metainfo, reduce_zero_label=False)
normalization = dict(mean=[12.3] * 3, std=[17.3] * 3)  # statistics of these dark images
load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations')]
resize = dict(type='Resize', scale=(256, 256), keep_ratio=True)
flip = dict(type='RandomFlip', prob=0.75, direction=['horizontal', 'vertical', 'diagonal'])
train_pipeline = [*load, resize, flip, dict(type='PackSegInputs')]
test_pipeline = [load[0], resize, load[1], dict(type='PackSegInputs')]
train_dataloader = dict(
    batch_size=4,
    num_workers=0,
    persistent_workers=False,
    dataset=dict(**data, data_prefix=dict(img_path='train', seg_map_path='masks/train'), pipeline=train_pipeline),
)
val_dataloader = dict(
    num_workers=0,
    persistent_workers=False,
    dataset=dict(**data, data_prefix=dict(img_path='val', seg_map_path='masks/val'), pipeline=test_pipeline),
)
test_dataloader = val_dataloader
