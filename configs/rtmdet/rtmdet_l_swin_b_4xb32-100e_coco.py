_base_ = 'mmdet::rtmdet/rtmdet_l_swin_b_4xb32-100e_coco.py'
custom_imports = dict(imports=['swin_mm'])
model = dict(backbone=dict(type='swin_mm.SwinTransformer'))
