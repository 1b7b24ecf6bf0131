_base_ = ['mmdet::swin/retinanet_swin-t-p4-w7_fpn_1x_coco.py', '../_base_/schedules/swin_coco.py']
custom_imports = dict(imports=['swin_mm'])
model = dict(backbone=dict(type='swin_mm.SwinTransformer'))
param_scheduler = _base_.steps_1x
optim_wrapper = dict(_delete_=True, **_base_.adamw)
