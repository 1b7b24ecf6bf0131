"""How models of mmdet and mmseg are made exportable: one table of replacements, applied to a copy of the model."""

import copy
from collections.abc import Callable
from typing import Any

from torch import nn

from swin_mm.analysis.export import dense_heads, dino, layers, query_heads, roi_heads, uper_head
from swin_mm.analysis.export.operators import Operators

# LIBRARY.Class -> what replaces it. Only exactly these classes: a subclass may predict otherwise.
Table = dict[str, Callable[[Any, Operators], nn.Module]]
POOLING: Table = {'torch.AdaptiveAvgPool2d': layers.AdaptivePool}
LAYERS: Table = {
    'mmcv.MultiScaleDeformableAttention': layers.DeformableAttention,
    'mmdet.MSDeformAttnPixelDecoder': layers.PixelDecoder,
    'mmdet.SingleRoIExtractor': roi_heads.RoIExtractor,
}
HEADS: Table = {
    'mmdet.RetinaHead': dense_heads.DenseHead,
    'mmdet.ATSSHead': dense_heads.DenseHead,
    'mmdet.FCOSHead': dense_heads.DenseHead,
    'mmdet.RTMDetHead': dense_heads.DenseHead,
    'mmdet.RTMDetSepBNHead': dense_heads.DenseHead,
    'mmdet.RPNHead': dense_heads.ProposalHead,
    'mmdet.StandardRoIHead': roi_heads.StandardRoI,
    'mmdet.CascadeRoIHead': roi_heads.CascadeRoI,
    'mmdet.MaskFormerHead': query_heads.MaskFormerQueries,
    'mmdet.Mask2FormerHead': query_heads.Mask2FormerQueries,
    'mmdet.MaskFormerFusionHead': query_heads.InstanceFusion,
    'mmseg.UPerHead': uper_head.uper_head,
    'mmseg.MaskFormerHead': query_heads.SemanticMaskFormerQueries,
    'mmseg.Mask2FormerHead': query_heads.SemanticQueries,
}
DETECTORS: Table = {'mmdet.DINO': dino.DinoTransformer}  # whole detectors, whose heads do not stand alone


def class_name(module: nn.Module) -> str:
    """The name of a module's class with its library, as in the table: 'mmdet.RPNHead'."""
    return f'{type(module).__module__.partition(".")[0]}.{type(module).__name__}'


def exportable_copy(model: nn.Module, operators: Operators, heads: bool, pooling: bool) -> nn.Module:
    """A copy of a model in which the modules of the table are replaced; the model itself is not changed.

    Args:
        model: a model or a part of one.
        operators: compute boxes.
        heads: replace heads, too.
        pooling: replace adaptive pooling, which PyTorch's ONNX exporter gets wrong.

    Raises:
        InputError: a module does what no standard operator does.
    """
    model = copy.deepcopy(model)
    # In this order: heads take over layers that are replaced already.
    for table in (POOLING if pooling else {}, LAYERS, HEADS if heads else {}):
        replace(model, table, operators)
    make = DETECTORS.get(class_name(model)) if heads else None
    return make(model, operators) if make else model


def replace(model: nn.Module, table: Table, operators: Operators) -> None:
    """Replace the modules of a table in place, inner ones first."""
    for name, child in list(model.named_children()):
        replace(child, table, operators)
        if make := table.get(class_name(child)):
            setattr(model, name, make(child, operators).train(child.training))
