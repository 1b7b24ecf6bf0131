"""Replacements of heads that predict boxes in every cell of a map: decoding and suppression of fixed size.

Shapes: B batch, A priors of a cell, C classes, k candidates of a level, N candidates of an image.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swin_mm.analysis.export.operators import Operators, best, clip, suppress
from swin_mm.utils.errors import InputError

MAX_CANDIDATES = 5000  # boxes of an image that suppression compares; the rest, of lower scores, is left out


def suppression(name: str, test_cfg: Any) -> tuple[float, bool]:
    """IoU threshold and whether classes are ignored, from ``test_cfg.nms``.

    Raises:
        InputError: another kind of suppression than plain NMS.
    """
    settings = dict(test_cfg.get('nms') or {})
    threshold, agnostic = settings.pop('iou_threshold', None), settings.pop('class_agnostic', False)
    kind = settings.pop('type', 'nms')
    settings.pop('split_thr', None)  # only changes the order of the computation
    if kind != 'nms' or threshold is None or settings:
        raise InputError(
            f'{name}: test_cfg.nms={dict(test_cfg.get("nms") or {})} has no standard operator; expected '
            "dict(type='nms', iou_threshold=...)"
        )
    return float(threshold), bool(agnostic)


def decode(coder: Any, priors: Tensor, deltas: Tensor, size: tuple[int, int]) -> Tensor:
    """Decode boxes by mmdet's coder: (B, N, 2 or 4), (B, N, 4) -> (B, N, 4)."""
    boxes = coder.decode(priors.flatten(0, 1), deltas.flatten(0, 1)).view(deltas.shape[0], -1, 4)
    return clip(boxes, size) if getattr(coder, 'clip_border', True) else boxes


class DenseHead(nn.Module):
    """Decoding and suppression of ``BaseDenseHead.predict``, for heads that inherit it.

    Args:
        head: of mmdet.
        operators: compute the suppression.

    Raises:
        InputError: its suppression has no standard operator.
    """

    by_level = False  # the groups of suppression are levels, not classes

    def __init__(self, head: Any, operators: Operators) -> None:
        super().__init__()
        self.head, self.operators = head, operators
        name = type(head).__name__
        self.iou_threshold, self.agnostic = suppression(name, head.test_cfg)
        self.count = int(head.test_cfg.get('max_per_img', -1))
        if self.count < 1:
            raise InputError(f'{name}: test_cfg.max_per_img={self.count}: a file needs a fixed number of boxes')
        if getattr(head.loss_cls, 'custom_cls_channels', False):
            raise InputError(f'{name}: {type(head.loss_cls).__name__} with classes of its own is not supported')

    def forward(self, feats: tuple[Tensor, ...], size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Maps to boxes (B, count, 4), scores (B, count) and classes (B, count).

        Args:
            feats: the maps of the neck.
            size: (height, width) of the image without padding.
        """
        maps = self.head(feats)
        factors = maps[2] if len(maps) > 2 else [None] * len(maps[0])
        priors = self.head.prior_generator.grid_priors(
            [scores.shape[-2:] for scores in maps[0]], dtype=maps[0][0].dtype, device=maps[0][0].device
        )
        levels = [
            self.candidates(*level, i) for i, level in enumerate(zip(maps[0], maps[1], factors, priors, strict=True))
        ]
        scores, groups, deltas, points = (torch.cat(parts, dim=1) for parts in zip(*levels, strict=True))
        boxes = decode(self.head.bbox_coder, points, deltas, size)
        least = self.head.test_cfg.get('min_bbox_size', -1)
        if least >= 0:
            scores = scores * ((boxes[..., 2:] - boxes[..., :2]) > least).all(-1).to(scores)
        if scores.shape[1] > MAX_CANDIDATES:
            boxes, scores, groups = best(MAX_CANDIDATES, scores, boxes, groups)
        return suppress(self.operators, boxes, scores, groups, self.iou_threshold, self.count, self.agnostic)

    def candidates(
        self, scores: Tensor, deltas: Tensor, factor: Tensor | None, priors: Tensor, level: int
    ) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """The best boxes of a level: scores (B, k), groups (B, k), deltas (B, k, 4) and priors (B, k, 2 or 4).

        Args:
            scores: logits (B, A * C, H, W).
            deltas: (B, A * 4, H, W).
            factor: logits (B, A, H, W), by which scores are multiplied after the choice; None without.
            priors: (H * W * A, 2 or 4).
            level: its index.
        """
        test_cfg, batch = self.head.test_cfg, scores.shape[0]
        scores = scores.permute(0, 2, 3, 1).reshape(batch, -1, self.head.cls_out_channels)
        scores = scores.sigmoid() if self.head.use_sigmoid_cls else scores.softmax(-1)[..., :-1]
        classes = scores.shape[-1]
        scores = scores.flatten(1)
        scores = scores * (scores > test_cfg.get('score_thr', 0)).to(scores)
        count = test_cfg.get('nms_pre', -1)
        count = min(count, MAX_CANDIDATES) if count > 0 else MAX_CANDIDATES
        scores, index = F.pad(scores, (0, count)).topk(count, dim=1)
        index = torch.where(scores > 0, index, 0)
        at, label = index // classes, index % classes
        deltas = deltas.permute(0, 2, 3, 1).reshape(batch, -1, 4).gather(1, at[..., None].expand(-1, -1, 4))
        if factor is not None:
            scores = scores * factor.permute(0, 2, 3, 1).reshape(batch, -1).sigmoid().gather(1, at)
        return scores, label + level if self.by_level else label, deltas, priors[at]


class ProposalHead(DenseHead):
    """Decoding and suppression of ``RPNHead.predict``: the levels are suppressed separately."""

    by_level = True
