"""Operators on boxes: PyTorch has none that exporters know, ONNX has standard ones.

Shapes: B batch, N boxes, R regions, C channels. Boxes are (x1, y1, x2, y2).
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from swin_mm.utils.compat import custom_op


class Operators(NamedTuple):
    """What the replacements in this package compute boxes with.

    Args:
        nms: see :func:`nms`.
        roi_align: see :func:`roi_align`; None where there is no such operator.
    """

    nms: Callable[[Tensor, Tensor, float], Tensor]
    roi_align: Callable[[Tensor, Tensor, list[int], float, int, bool], Tensor] | None


def overlaps(boxes: Tensor) -> Tensor:
    """IoU of all pairs: (B, N, 4) -> (B, N, N); 0 between empty boxes."""
    low = torch.maximum(boxes[:, :, None, :2], boxes[:, None, :, :2])
    high = torch.minimum(boxes[:, :, None, 2:], boxes[:, None, :, 2:])
    common = (high - low).clamp(min=0).prod(-1)
    areas = (boxes[..., 2:] - boxes[..., :2]).prod(-1)
    return common / (areas[:, :, None] + areas[:, None] - common).clamp(min=1e-9)


def sorted_overlaps(boxes: Tensor, scores: Tensor, iou_threshold: float) -> tuple[Tensor, Tensor]:
    """Which boxes could suppress which, in the order of scores.

    Returns:
        The order (B, N); and (B, N, N), nonzero at [b, i, j] where box i of the order overlaps box j after it.
    """
    order = scores.argsort(dim=1, descending=True, stable=True)
    ordered = boxes.gather(1, order[..., None].expand(-1, -1, 4))
    return order, (overlaps(ordered) > iou_threshold).float().triu(1)


def kept_once(keep: Tensor, suppressors: Tensor) -> Tensor:
    """Keep the boxes that none of ``keep`` (B, N) suppresses.

    Repeated until nothing changes, this is greedy suppression: the i-th box is right after at most i steps.
    """
    return torch.bmm(keep.float()[:, None], suppressors)[:, 0] == 0


@custom_op('swin_mm::nms')
def nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """Greedy non-maximum suppression: (B, N, 4), (B, N) -> (B, N) bool, the boxes that are kept.

    A box is suppressed by one of a higher score that is kept, if their IoU is above the threshold.
    """
    order, suppressors = sorted_overlaps(boxes, scores, iou_threshold)
    keep = torch.ones_like(scores, dtype=torch.bool)
    while not torch.equal(keep, after := kept_once(keep, suppressors)):
        keep = after
    return torch.zeros_like(keep).scatter(1, order, keep)


@nms.register_fake
def _(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    return torch.empty_like(scores, dtype=torch.bool)


def looped_nms(boxes: Tensor, scores: Tensor, iou_threshold: float) -> Tensor:
    """:func:`nms` by operators of PyTorch only, with a loop inside the graph."""
    order, suppressors = sorted_overlaps(boxes, scores, iou_threshold)
    keep = torch.ones_like(scores, dtype=torch.bool)

    def unstable(keep: Tensor, after: Tensor, suppressors: Tensor) -> Tensor:
        return (keep != after).any()

    def step(keep: Tensor, after: Tensor, suppressors: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return after.clone(), kept_once(after, suppressors), suppressors.clone()

    keep = torch.while_loop(unstable, step, (keep, kept_once(keep, suppressors), suppressors))[0]
    return torch.zeros_like(keep).scatter(1, order, keep)


@custom_op('swin_mm::roi_align')
def roi_align(features: Tensor, rois: Tensor, size: list[int], scale: float, samples: int, aligned: bool) -> Tensor:
    """RoIAlign with average pooling: (B, C, H, W), (R, 5) -> (R, C, *size).

    Args:
        features: the map.
        rois: index in the batch, and the box in pixels of the image.
        size: height and width of the output.
        scale: size of the map over size of the image.
        samples: samples of a bin along each axis; 0 for one per cell of the map.
        aligned: whether pixel centres are at half-integers.
    """
    from mmcv.ops import roi_align as mmcv_roi_align

    return mmcv_roi_align(features, rois, tuple(size), scale, samples, 'avg', aligned)


@roi_align.register_fake
def _(features: Tensor, rois: Tensor, size: list[int], scale: float, samples: int, aligned: bool) -> Tensor:
    return features.new_empty(rois.shape[0], features.shape[1], *size)


CUSTOM = Operators(nms, roi_align)  # for ONNX, which translates them: see onnx_translations
PLAIN = Operators(looped_nms, None)  # for files that PyTorch alone must be able to run


def onnx_translations() -> dict[Callable, Callable]:
    """The ``custom_translation_table`` of torch.onnx.export: our operators as operators of ONNX's standard domain."""
    from onnxscript import opset18

    op: Any = opset18  # its types do not know that Python values become constants

    def onnx_nms(boxes: Any, scores: Any, iou_threshold: float) -> Any:
        count = op.Shape(scores, start=1, end=2)
        # (kept, 3): index in the batch, class, box
        kept = op.NonMaxSuppression(
            boxes, op.Unsqueeze(scores, [1]), count, op.Constant(value_floats=[float(iou_threshold)])
        )
        at = op.Gather(kept, op.Constant(value_ints=[0, 2]), axis=1)
        ones = op.Expand(op.Constant(value_floats=[1.0]), op.Shape(kept, start=0, end=1))
        mask = op.ScatterND(op.Mul(scores, op.Constant(value_floats=[0.0])), at, ones)
        return op.Greater(mask, op.Constant(value_floats=[0.5]))

    def onnx_roi_align(features: Any, rois: Any, size: list[int], scale: float, samples: int, aligned: bool) -> Any:
        index = op.Cast(op.Squeeze(op.Slice(rois, [0], [1], [1]), [1]), to=7)  # int64
        return op.RoiAlign(
            features,
            op.Slice(rois, [1], [5], [1]),
            index,
            coordinate_transformation_mode='half_pixel' if aligned else 'output_half_pixel',
            mode='avg',
            output_height=size[0],
            output_width=size[1],
            sampling_ratio=samples,
            spatial_scale=scale,
        )

    return {torch.ops.swin_mm.nms.default: onnx_nms, torch.ops.swin_mm.roi_align.default: onnx_roi_align}


def suppress(
    operators: Operators,
    boxes: Tensor,
    scores: Tensor,
    groups: Tensor,
    iou_threshold: float,
    count: int,
    agnostic: bool = False,
) -> tuple[Tensor, Tensor, Tensor]:
    """Non-maximum suppression within groups, and the ``count`` best of what is kept.

    Args:
        operators: computes the suppression.
        boxes: (B, N, 4).
        scores: (B, N), above 0; 0 where there is no box.
        groups: (B, N) int64, such as classes; boxes of different groups do not suppress each other.
        iou_threshold: suppress above it.
        count: number of results; if there are fewer, the rest is zero.
        agnostic: treat all boxes as one group.

    Returns:
        Boxes (B, count, 4), scores (B, count) in descending order, and groups (B, count).
    """
    apart = boxes
    if not agnostic:
        span = boxes.amax((1, 2), keepdim=True) + 1
        apart = boxes + groups[..., None].to(boxes) * span
    scores = scores * operators.nms(apart, scores, iou_threshold).to(scores)
    return best(count, scores, boxes, groups)


def best(count: int, scores: Tensor, boxes: Tensor, groups: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The ``count`` highest scores (B, N), with boxes (B, N, 4) and groups (B, N); zeros where there are fewer."""
    scores, index = F.pad(scores, (0, count)).topk(count, dim=1)
    valid = scores > 0
    index = torch.where(valid, index, 0)
    boxes = boxes.gather(1, index[..., None].expand(-1, -1, 4)) * valid[..., None].to(boxes)
    return boxes, scores, groups.gather(1, index) * valid


def clip(boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Clip boxes to an image of (height, width), which may be symbolic."""
    one = boxes.new_ones(())
    limit = torch.stack((one * size[1], one * size[0]) * 2)
    return torch.minimum(boxes.clamp(min=0), limit)
