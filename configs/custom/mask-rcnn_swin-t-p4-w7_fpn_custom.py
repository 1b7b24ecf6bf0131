# A template for your own instances in COCO format, for one GPU. Set the first block; the rest follows from it, so that
# scales, schedule and warm-up fit together. README.md says how to choose, docs/own_data.md how to lay out the files.
_base_ = '../mask_rcnn/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'
data = dict(data_root='data/custom/', metainfo=dict(classes=('cat', 'dog')))
short, long = 800, 1333  # pixels: images are resized to this short side, or to the long one if that is less
batch_size = 2
epochs = 36  # more for fewer images: about 18,000 iterations in all, at least 12 epochs

train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline
scales = [(short * part // 25, long) for part in range(15, 26)]  # from 0.6 to 1
train_pipeline[2] = dict(type='RandomChoiceResize', scales=scales, keep_ratio=True)
test_pipeline[1].scale = (long, short)
train_set = dict(ann_file='annotations/train.json', data_prefix=dict(img='train/'), pipeline=train_pipeline)
val_set = dict(ann_file='annotations/val.json', data_prefix=dict(img='val/'), pipeline=test_pipeline)
train_dataloader = dict(batch_size=batch_size, dataset=dict(**train_set, **data))
val_dataloader = dict(dataset=dict(**val_set, **data))
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(ann_file=data['data_root'] + val_set['ann_file'])
warmup, steps = _base_.param_scheduler  # the warm-up takes a twentieth of the run, whatever the number of images
warmup = dict(warmup, by_epoch=True, convert_to_iter_based=True, end=max(1, epochs // 20))
param_scheduler = [warmup, dict(steps, end=epochs, milestones=[epochs * 3 // 4, epochs * 11 // 12])]
train_cfg = dict(max_epochs=epochs)
head = dict(num_classes=len(data['metainfo']['classes']))
model = dict(roi_head=dict(bbox_head=head, mask_head=head))
