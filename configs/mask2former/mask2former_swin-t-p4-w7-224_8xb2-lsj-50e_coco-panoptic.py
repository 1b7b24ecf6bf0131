_base_ = 'mmdet::mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco-panoptic.py'
custom_imports = dict(imports=['swin_mm'])
model = dict(backbone=dict(type='swin_mm.SwinTransformer'))
keys = {key.replace('stages', 'layers'): value for key, value in _base_.custom_keys.items()}
optim_wrapper = dict(paramwise_cfg=dict(custom_keys=dict(_delete_=True, **keys)))
