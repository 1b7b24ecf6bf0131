_base_ = 'cascade-mask-rcnn_swin_fpn_4conv1fc-giou_ms-crop-3x_coco.py'
optim_wrapper = dict(constructor='swin_mm.LayerDecayOptimWrapperConstructor', paramwise_cfg=dict(decay_rate=0.95))
