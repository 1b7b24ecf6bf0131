_base_ = ['../_base_/models/swin_16xb64-30e_in1k.py', '../_base_/backbones/swin-t-p4-w7_in22k.py']
backbone = dict(_delete_=True, drop_path_rate=0.1, out_indices=(3,), pad_small_map=False, **_base_.swin)
model = dict(backbone=backbone, head=dict(in_channels=_base_.channels[-1]))
