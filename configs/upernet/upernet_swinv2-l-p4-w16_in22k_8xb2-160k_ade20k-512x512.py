_base_ = ['../_base_/models/upernet_swinv2_160k_ade20k-512x512.py', '../_base_/backbones/swinv2-l-p4-w16_in22k.py']
backbone = dict(_delete_=True, drop_path_rate=0.3, **_base_.swin)
head, aux = dict(in_channels=_base_.channels), dict(in_channels=_base_.channels[2])
model = dict(backbone=backbone, decode_head=head, auxiliary_head=aux)
