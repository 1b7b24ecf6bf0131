_base_ = ['../_base_/models/upernet_swin_80k_cityscapes-512x1024.py', '../_base_/backbones/swin-t-p4-w7.py']
backbone = dict(_delete_=True, drop_path_rate=0.3, **_base_.swin)
head, aux = dict(in_channels=_base_.channels), dict(in_channels=_base_.channels[2])
model = dict(backbone=backbone, decode_head=head, auxiliary_head=aux)
