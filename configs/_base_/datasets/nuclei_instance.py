# Your own data in COCO format, with cell nuclei in microscopy images as the example: nuclei_cc0/{train,val}/ and
# nuclei_cc0/annotations/instances_{train,val}.json in the folder that the environment variable SWIN_MM_DATA names.
_base_ = 'digits_instance.py'
data_root = '{{$SWIN_MM_DATA:data}}/nuclei_cc0/'
own = dict(data_root=data_root, metainfo=dict(classes=('nucleus',)))
load = [dict(type='LoadImageFromFile'), dict(type='LoadAnnotations', with_bbox=True, with_mask=True)]
resize = dict(type='Resize', scale=(256, 256), keep_ratio=True)
flip = dict(type='RandomFlip', prob=0.75, direction=['horizontal', 'vertical', 'diagonal'])
keys = ('img_id', 'img_path', 'ori_shape', 'img_shape', 'scale_factor')
train_dataloader = dict(batch_size=4, dataset=dict(**own, pipeline=[*load, resize, flip, dict(type='PackDetInputs')]))
val_dataloader = dict(
    dataset=dict(**own, pipeline=[load[0], resize, load[1], dict(type='PackDetInputs', meta_keys=keys)])
)
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + 'annotations/instances_val.json')
test_evaluator = val_evaluator
