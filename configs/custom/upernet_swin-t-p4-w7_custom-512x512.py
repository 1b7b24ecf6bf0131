# A template for your own semantic masks; the layout of the files is explained in docs/own_data.md.
_base_ = '../upernet/upernet_swin-t-p4-w7_8xb2-160k_ade20k-512x512.py'
metainfo = dict(classes=('wall', 'floor', 'door'), palette=[[200, 80, 80], [80, 80, 200], [80, 200, 80]])
data = dict(type='BaseSegDataset', data_root='data/custom', metainfo=metainfo, reduce_zero_label=True)
train_dataloader = dict(dataset=data)
val_dataloader = dict(dataset=data)
test_dataloader = val_dataloader
head = dict(num_classes=len(metainfo['classes']))
model = dict(decode_head=head, auxiliary_head=head)
