# A template for your own semantic masks, for one GPU. Set the first block; the rest follows from it, so that crop,
# scales, schedule and warm-up fit together. README.md says how to choose, docs/own_data.md how to lay out the files.
_base_ = '../upernet/upernet_swin-t-p4-w7_8xb2-160k_ade20k-512x512.py'
metainfo = dict(classes=('wall', 'floor', 'door'), palette=[[200, 80, 80], [80, 80, 200], [80, 200, 80]])
zero_is_void = True  # masks: 0 is unlabelled and classes count from 1; False: the first class is 0 (255 is unlabelled)
crop = 512  # pixels, a multiple of 32; images are resized to this short side
batch_size = 4
iterations = 8000  # about 50 epochs: 50 * images / batch_size

data = dict(type='BaseSegDataset', data_root='data/custom', metainfo=metainfo, reduce_zero_label=zero_is_void)
train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline
train_pipeline[1].reduce_zero_label = test_pipeline[2].reduce_zero_label = zero_is_void
train_pipeline[2].scale = test_pipeline[1].scale = (4 * crop, crop)  # RandomResize then takes 0.5 to 2 times this
train_pipeline[3].crop_size = (crop, crop)
train_dataloader = dict(batch_size=batch_size, dataset=dict(pipeline=train_pipeline, **data))
val_dataloader = dict(dataset=dict(pipeline=test_pipeline, **data))
test_dataloader = val_dataloader
warmup, decay = _base_.param_scheduler
param_scheduler = [dict(warmup, end=iterations // 20), dict(decay, begin=iterations // 20, end=iterations)]
train_cfg = dict(max_iters=iterations, val_interval=iterations // 8)
default_hooks = dict(checkpoint=dict(interval=iterations // 8, max_keep_ckpts=2))
head = dict(num_classes=len(metainfo['classes']))
model = dict(data_preprocessor=dict(size=(crop, crop)), decode_head=head, auxiliary_head=head)
