"""Replacements of heads that look at regions: every image has the same number of them, with scores of 0 for padding.

Shapes: B batch, P proposals of an image, R = B * P regions, C classes, N objects of an image.
"""

from typing import Any

import torch
from torch import Tensor, nn

from swin_mm.analysis.export.dense_heads import MAX_CANDIDATES, decode, suppression
from swin_mm.analysis.export.operators import Operators, suppress
from swin_mm.utils.errors import InputError


class RoIExtractor(nn.Module):
    """mmdet's ``SingleRoIExtractor`` without a choice that depends on data.

    Every region is pooled from every level; from the wrong ones as an empty box, which costs nothing.

    Args:
        extractor: mmdet's.
        operators: pool the regions.

    Raises:
        InputError: its pooling has no standard operator.
    """

    def __init__(self, extractor: Any, operators: Operators) -> None:
        super().__init__()
        self.num_inputs, self.finest_scale = extractor.num_inputs, extractor.finest_scale
        if operators.roi_align is None:
            raise InputError(
                'PyTorch has no operator for RoIAlign, and the file must not need a library: a two-stage detector can '
                'be exported with --to onnx or openvino'
            )
        self.roi_align = operators.roi_align
        for layer in extractor.roi_layers:
            if type(layer).__name__ != 'RoIAlign' or layer.pool_mode != 'avg':
                raise InputError(f'{layer} has no standard operator; expected RoIAlign with average pooling')
        self.layers = [
            (list(layer.output_size), layer.spatial_scale, layer.sampling_ratio, layer.aligned)
            for layer in extractor.roi_layers
        ]

    def forward(self, feats: tuple[Tensor, ...], rois: Tensor, roi_scale_factor: float | None = None) -> Tensor:
        """Maps and regions (R, 5) -> (R, C, height, width)."""
        size = (rois[:, 3:] - rois[:, 1:3]).prod(-1).sqrt()
        level = torch.log2(size / self.finest_scale + 1e-6).floor().clamp(0, len(feats) - 1)
        result: Tensor | None = None
        for i, (x, layer) in enumerate(zip(feats, self.layers, strict=True)):
            here = (level == i)[:, None]
            boxes = torch.cat((rois[:, :1], rois[:, 1:] * here.to(rois)), dim=1)
            pooled = self.roi_align(x, boxes, *layer)
            result = pooled if result is None else torch.where(here[..., None, None], pooled, result)
        assert result is not None
        return result


def to_rois(boxes: Tensor) -> Tensor:
    """(B, P, 4) -> (B * P, 5), with the index in the batch before the box."""
    index = torch.arange(boxes.shape[0], device=boxes.device).to(boxes)[:, None, None].expand(-1, boxes.shape[1], 1)
    return torch.cat((index, boxes), dim=-1).flatten(0, 1)


class StandardRoI(nn.Module):
    """``StandardRoIHead.predict``: boxes, and masks inside them if there is a mask head.

    Args:
        head: of mmdet, whose RoI extractors are replaced.
        operators: compute the suppression.

    Raises:
        InputError: something in it has no standard operator.
    """

    def __init__(self, head: Any, operators: Operators) -> None:
        super().__init__()
        self.head, self.operators = head, operators
        self.iou_threshold, self.agnostic = suppression(type(head).__name__, head.test_cfg)
        self.count, self.score_thr = int(head.test_cfg.max_per_img), head.test_cfg.score_thr
        for part in self.box_heads():
            if getattr(part, 'custom_activation', False) or not (part.with_cls and part.with_reg):
                raise InputError(f'{type(part).__name__}: expected a softmax over classes and box offsets')
        for part in self.mask_heads():
            if type(part).__name__ != 'FCNMaskHead':
                raise InputError(f'{type(part).__name__} is not supported; expected FCNMaskHead')

    def box_heads(self) -> list[Any]:
        """The box heads of all stages."""
        return [self.head.bbox_head]

    def mask_heads(self) -> list[Any]:
        """The mask heads of all stages."""
        return [self.head.mask_head] if self.head.with_mask else []

    def box_forward(self, stage: int, feats: tuple[Tensor, ...], boxes: Tensor) -> tuple[Tensor, Tensor]:
        """Logits (B, P, C + 1), and offsets (B, P, 4 or C * 4)."""
        extractor, part = self.of_stage(self.head.bbox_roi_extractor, stage), self.box_heads()[stage]
        pooled = extractor(feats[: extractor.num_inputs], to_rois(boxes))
        logits, deltas = part(self.head.shared_head(pooled) if self.head.with_shared_head else pooled)[:2]
        return logits.view(*boxes.shape[:2], -1), deltas.view(*boxes.shape[:2], -1)

    @staticmethod
    def of_stage(parts: Any, stage: int) -> Any:
        """The part of a stage, where there are several."""
        return parts[stage] if isinstance(parts, nn.ModuleList) else parts

    def refine(self, feats: tuple[Tensor, ...], boxes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits, offsets, and the boxes that they refer to."""
        return *self.box_forward(0, feats, boxes), boxes

    def forward(
        self, feats: tuple[Tensor, ...], proposals: Tensor, validity: Tensor, size: tuple[int, int]
    ) -> tuple[Tensor, ...]:
        """Objects of each image.

        Args:
            feats: the maps of the neck.
            proposals: boxes (B, P, 4).
            validity: (B, P), 0 where there is no proposal.
            size: (height, width) of the image without padding.

        Returns:
            Boxes (B, N, 4), scores (B, N), classes (B, N), and probabilities (B, N, h, w) inside the box with masks.
        """
        logits, deltas, proposals = self.refine(feats, proposals, size)
        scores = logits.softmax(-1)[..., :-1]
        batch, count, classes = scores.shape
        scores = scores * ((scores > self.score_thr) & (validity > 0)[..., None]).to(scores)
        scores, index = scores.flatten(1).topk(min(count * classes, MAX_CANDIDATES), dim=1)
        at, labels = index // classes, index % classes
        priors = proposals.gather(1, at[..., None].expand(-1, -1, 4))
        part = self.box_heads()[-1]
        which = at if part.reg_class_agnostic else index
        deltas = deltas.reshape(batch, -1, 4).gather(1, which[..., None].expand(-1, -1, 4))
        boxes = decode(part.bbox_coder, priors, deltas, size)
        objects = suppress(self.operators, boxes, scores, labels, self.iou_threshold, self.count, self.agnostic)
        return (*objects, self.masks(feats, objects[0], objects[2])) if self.mask_heads() else objects

    def masks(self, feats: tuple[Tensor, ...], boxes: Tensor, labels: Tensor) -> Tensor:
        """Probabilities inside the boxes (B, N, h, w), averaged over the stages."""
        results = []
        for stage, part in enumerate(self.mask_heads()):
            extractor = self.of_stage(self.head.mask_roi_extractor, stage)
            pooled = extractor(feats[: extractor.num_inputs], to_rois(boxes))
            logits = part(self.head.shared_head(pooled) if self.head.with_shared_head else pooled)
            height, width = logits.shape[-2:]
            if part.class_agnostic:
                logits = logits[:, 0]
            else:
                index = labels.flatten()[:, None, None, None].expand(-1, 1, height, width)
                logits = logits.gather(1, index)[:, 0]
            results.append(logits.sigmoid().view(*boxes.shape[:2], height, width))
        return torch.stack(results).mean(0)


class CascadeRoI(StandardRoI):
    """``CascadeRoIHead.predict``: stages refine the boxes, and their logits are averaged."""

    def box_heads(self) -> list[Any]:
        """The box heads of all stages."""
        return list(self.head.bbox_head)

    def mask_heads(self) -> list[Any]:
        """The mask heads of all stages."""
        return list(self.head.mask_head) if self.head.with_mask else []

    def refine(self, feats: tuple[Tensor, ...], boxes: Tensor, size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Logits averaged over the stages, offsets of the last one, and the boxes that these refer to."""
        all_logits = []
        for stage, part in enumerate(self.box_heads()):
            logits, deltas = self.box_forward(stage, feats, boxes)
            all_logits.append(logits)
            if stage + 1 < len(self.box_heads()):
                if not part.reg_class_agnostic:
                    label = logits[..., :-1].argmax(-1)[..., None, None].expand(-1, -1, 1, 4)
                    deltas = deltas.view(*boxes.shape[:2], -1, 4).gather(2, label)[:, :, 0]
                boxes = decode(part.bbox_coder, boxes, deltas, size)
        return torch.stack(all_logits).mean(0), deltas, boxes
