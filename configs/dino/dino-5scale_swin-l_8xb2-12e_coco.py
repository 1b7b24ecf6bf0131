_base_ = 'mmdet::dino/dino-5scale_swin-l_8xb2-12e_coco.py'
custom_imports = dict(imports=['swin_mm'])
model = dict(backbone=dict(type='swin_mm.SwinTransformer'))
