# A template for your own instances in COCO format.
_base_ = '../mask_rcnn/mask-rcnn_swin-t-p4-w7_fpn_ms-crop-3x_coco.py'
data = dict(data_root='data/custom/', metainfo=dict(classes=('cat', 'dog')))
train_dataloader = dict(dataset=dict(ann_file='annotations/train.json', data_prefix=dict(img='train/'), **data))
val_dataloader = dict(dataset=dict(ann_file='annotations/val.json', data_prefix=dict(img='val/'), **data))
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(ann_file='data/custom/annotations/val.json')
head = dict(num_classes=len(data['metainfo']['classes']))
model = dict(roi_head=dict(bbox_head=head, mask_head=head))
