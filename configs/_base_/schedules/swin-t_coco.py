_base_ = ['swin_coco.py', '../backbones/swin-t-p4-w7.py']
custom_imports = dict(imports=['swin_mm'])
