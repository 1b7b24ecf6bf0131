_base_ = ['./mask2former_swin-s-p4-w7-224_8xb2-lsj-50e_coco.py', '../_base_/backbones/swin-b-p4-w12_in22k.py']
backbone = dict(_delete_=True, drop_path_rate=0.3, **_base_.swin)
model = dict(backbone=backbone, panoptic_head=dict(in_channels=_base_.channels))
