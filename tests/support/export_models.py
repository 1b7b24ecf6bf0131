"""Tiny models of every kind that can be exported, as configs on top of the project's own."""

from pathlib import Path

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from support.oracles import randomise
from support.tool_fixtures import ROOT, SMALL_BACKBONE
from torch import nn

CLASSES = ('square', 'bar', 'disc')
NECK_64 = 'neck=dict(in_channels=[32, 64, 128], out_channels=64{more}),'
DENSE_64 = 'bbox_head=dict(in_channels=64, feat_channels=64, stacked_convs=1, num_classes=3),'
FEWER = 'test_cfg=dict(nms_pre=200),'
TWO_STAGE_NECK = 'neck=dict(in_channels=[16, 32, 64, 128], out_channels=32),'
RPN = 'rpn_head=dict(in_channels=32, feat_channels=32),'
BOX = 'in_channels=32, fc_out_channels=32, num_classes=3'
POOL = 'dict(out_channels=32)'
MASK = 'dict(in_channels=32, conv_out_channels=32, num_convs=1, num_classes=3)'
FEW = 'test_cfg=dict(rpn=dict(nms_pre=200, max_per_img=60), rcnn=dict(max_per_img=20)),'
CASCADE_BOX = (
    "dict(type='{kind}', in_channels=32, conv_out_channels=32, fc_out_channels=32, roi_feat_size=7, num_classes=3, "
    "reg_class_agnostic={agnostic}, num_shared_convs=1, num_shared_fcs=1, norm_cfg=dict(type='BN'), "
    "bbox_coder=dict(type='DeltaXYWHBBoxCoder', target_stds=[{stds}]), loss_cls=dict(type='CrossEntropyLoss'), "
    "loss_bbox=dict(type='L1Loss'))"
)
CASCADE_BOXES = ', '.join(
    CASCADE_BOX.format(kind='ConvFCBBoxHead', agnostic=agnostic, stds=stds)
    for agnostic, stds in ((True, '.1, .1, .2, .2'), (False, '.05, .05, .1, .1'), (False, '.033, .033, .067, .067'))
)
# Mask2Former: 32 channels, one layer of each kind, 12 queries.
ATTENTION = 'embed_dims=32, num_heads=4'
FFN = 'ffn_cfg=dict(embed_dims=32, feedforward_channels=32)'
MASK2FORMER = (
    'in_channels=[16, 32, 64, 128], feat_channels=32, out_channels=32, num_queries=12, '
    'loss_cls=dict(class_weight=[1.0] * {classes} + [0.1]), '
    'positional_encoding=dict(num_feats=16), pixel_decoder=dict(positional_encoding=dict(num_feats=16), encoder=dict('
    f'num_layers=1, layer_cfg=dict(self_attn_cfg=dict({ATTENTION}), {FFN}))), '
    f'transformer_decoder=dict(num_layers=3, layer_cfg=dict(self_attn_cfg=dict({ATTENTION}), '
    f'cross_attn_cfg=dict({ATTENTION}), {FFN}))'
)
MASKFORMER = (
    'in_channels=[16, 32, 64, 128], feat_channels=32, out_channels=32, num_queries=12, '
    'loss_cls=dict(class_weight=[1.0] * 3 + [0.1]), positional_encoding=dict(num_feats=16), '
    f'transformer_decoder=dict(num_layers=2, layer_cfg=dict(self_attn_cfg=dict({ATTENTION}), '
    f'cross_attn_cfg=dict({ATTENTION}), {FFN}))'
)
SEGMENTS = 'num_things_classes=2, num_stuff_classes=1'
FUSION = 'panoptic_fusion_head=dict(num_things_classes=3), test_cfg=dict(max_per_image=10),'

# name -> the config below it, and what is made small besides the backbone
MODELS_OF_MMDET = {
    'retinanet': ('retinanet/retinanet_swin-t-p4-w7_fpn_adamw-1x_coco', NECK_64.format(more='') + DENSE_64 + FEWER),
    'fcos': (  # on RetinaNet's config: the project has none of FCOS
        'retinanet/retinanet_swin-t-p4-w7_fpn_adamw-1x_coco',
        f"{NECK_64.format(more='')} bbox_head=dict(_delete_=True, type='FCOSHead', in_channels=64, feat_channels=64, "
        f'stacked_convs=1, num_classes=3), {FEWER}',
    ),
    'atss': ('atss/atss_swin-t-p4-w7_fpn_ms-crop-3x_coco', NECK_64.format(more='') + DENSE_64 + FEWER),
    'rtmdet': (
        'rtmdet/rtmdet_l_swin_b_4xb32-100e_coco',
        NECK_64.format(more=", num_csp_blocks=1, norm_cfg=dict(_delete_=True, type='BN')") + DENSE_64,
    ),
    'faster-rcnn': (
        'mask_rcnn/mask-rcnn_swin-t-p4-w7_fpn_1x_coco',
        f"type='FasterRCNN', {TWO_STAGE_NECK} {RPN} roi_head=dict(bbox_roi_extractor={POOL}, bbox_head=dict({BOX}), "
        f'mask_roi_extractor=None, mask_head=None), {FEW}',
    ),
    'mask-rcnn': (
        'mask_rcnn/mask-rcnn_swin-t-p4-w7_fpn_1x_coco',
        f'{TWO_STAGE_NECK} {RPN} roi_head=dict(bbox_roi_extractor={POOL}, bbox_head=dict({BOX}), '
        f'mask_roi_extractor={POOL}, mask_head={MASK}), {FEW}',
    ),
    'cascade-mask-rcnn': (
        'cascade_mask_rcnn/cascade-mask-rcnn_swin-t-p4-w7_fpn_4conv1fc-giou_ms-crop-3x_coco',
        f'{TWO_STAGE_NECK} {RPN} roi_head=dict(bbox_roi_extractor={POOL}, bbox_head=[{CASCADE_BOXES}], '
        f'mask_roi_extractor={POOL}, mask_head={MASK}), {FEW}',
    ),
    'mask2former': (
        'mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco',
        f'panoptic_head=dict({MASK2FORMER.format(classes=3)}, num_things_classes=3), {FUSION}',
    ),
    'mask2former-panoptic': (
        'mask2former/mask2former_swin-t-p4-w7-224_8xb2-lsj-50e_coco-panoptic',
        f'panoptic_head=dict({MASK2FORMER.format(classes=3)}, {SEGMENTS}), '
        f'panoptic_fusion_head=dict({SEGMENTS}), test_cfg=dict(instance_on=False),',
    ),
    'maskformer-panoptic': (
        'mmdet::maskformer/maskformer_swin-l-p4-w12_64xb1-ms-300e_coco',
        f'panoptic_head=dict({MASKFORMER}, {SEGMENTS}), panoptic_fusion_head=dict({SEGMENTS}),',
    ),
    'dino': (
        'dino/dino-5scale_swin-l_8xb2-12e_coco',
        # The original mmdet embeds queries in 256 channels, whatever the config says.
        'neck=dict(in_channels=[16, 32, 64, 128]), num_queries=20, '
        'encoder=dict(num_layers=1, layer_cfg=dict(ffn_cfg=dict(feedforward_channels=32))), '
        'decoder=dict(num_layers=2, layer_cfg=dict(ffn_cfg=dict(feedforward_channels=32))), '
        'bbox_head=dict(num_classes=3), '
        'test_cfg=dict(max_per_img=15),',
    ),
}
MODELS_OF_MMSEG = {
    'upernet': (
        'upernet/upernet_swin-t-p4-w7_8xb2-160k_ade20k-512x512',
        'decode_head=dict(in_channels=[16, 32, 64, 128], channels=16, num_classes=3), '
        'auxiliary_head=dict(in_channels=64, channels=16, num_classes=3),',
    ),
    'mask2former-semantic': (
        'mask2former/mask2former_swin-t_8xb2-160k_ade20k-512x512',
        f'decode_head=dict({MASK2FORMER.format(classes=3)}, num_classes=3),',
    ),
    'maskformer-semantic': (
        'maskformer/maskformer_swin-t_upernet_8xb2-160k_ade20k-512x512',
        f'decode_head=dict({MASKFORMER}, num_classes=3),',
    ),
}
ALL = MODELS_OF_MMDET | MODELS_OF_MMSEG
V2 = ('upernet', 'retinanet', 'mask-rcnn')  # these also exist as NAME-v2, with Swin V2
BACKBONE_V2 = SMALL_BACKBONE.replace('dict(', "dict(type='swin_mm.SwinTransformerV2', window_size=8, ", 1)
NAMES = (*ALL, *(f'{name}-v2' for name in V2))


def write_config(name: str, folder: Path) -> Path:
    """Write the config of a tiny model; its data does not exist."""
    plain = name.removesuffix('-v2')
    base, model = ALL[plain]
    backbone = SMALL_BACKBONE if plain == name else BACKBONE_V2
    kind = "type='BaseSegDataset', " if plain in MODELS_OF_MMSEG else ''
    if '::' in base:
        backbone = backbone.replace('dict(', "dict(_delete_=True, type='swin_mm.SwinTransformer', ", 1)
    base = f'{base}.py' if '::' in base else f'{ROOT}/configs/{base}.py'
    path = folder / f'{name}.py'
    path.write_text(
        f"_base_ = r'{base}'\nmodel = dict({backbone}{model})\n"
        f'test_dataloader = dict(dataset=dict({kind}metainfo=dict(classes={CLASSES})))\n'
    )
    return path


def build(name: str, folder: Path) -> tuple[Path, Path, nn.Module]:
    """The config, a checkpoint, and the model of it."""
    config = write_config(name, folder)
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    model = randomise(MODELS.build(cfg.model))
    model.eval()
    checkpoint = folder / f'{name}.pth'
    torch.save({'state_dict': model.state_dict()}, checkpoint)
    return config, checkpoint, model
