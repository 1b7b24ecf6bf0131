"""Replacements of heads that predict masks by queries: MaskFormer and Mask2Former, of mmdet and mmseg.

Shapes: B batch, Q queries, C classes, N objects of an image.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swin_mm.analysis.export.operators import Operators
from swin_mm.utils.errors import InputError

Size = tuple[int, int]  # (height, width)


class Mask2FormerQueries(nn.Module):
    """The classes and masks of the last decoder layer.

    Args:
        head: ``Mask2FormerHead`` of mmdet or mmseg.
        operators: not used.
    """

    def __init__(self, head: Any, operators: Operators | None = None) -> None:
        super().__init__()
        self.head = head

    def queries(self, feats: tuple[Tensor, ...], size: Size, padded: Size) -> tuple[Tensor, Tensor]:
        """Maps to logits of classes (B, Q, C + 1) and of masks (B, Q, h, w)."""
        logits, masks = self.head(feats, None)  # its decoders do not use the second argument
        return logits[-1], masks[-1]

    def forward(self, feats: tuple[Tensor, ...], size: Size, padded: Size) -> tuple[Tensor, Tensor]:
        """Logits of classes and masks.

        Args:
            feats: maps of the backbone.
            size: of the image.
            padded: of the image with padding, from which the maps were computed.

        Returns:
            Logits of classes (B, Q, C + 1), and of masks (B, Q, *size).
        """
        logits, masks = self.queries(feats, size, padded)
        masks = F.interpolate(masks, size=padded, mode='bilinear', align_corners=False)
        return logits, masks[..., : size[0], : size[1]]


class MaskFormerQueries(Mask2FormerQueries):
    """``MaskFormerHead``, whose own forward marks the padding of each image in turn: here the batch has one size."""

    def __init__(self, head: Any, operators: Operators | None = None) -> None:
        super().__init__(head)
        if type(head.pixel_decoder).__name__ != 'PixelDecoder':
            raise InputError(f'{type(head.pixel_decoder).__name__} is not supported; expected PixelDecoder')

    def queries(self, feats: tuple[Tensor, ...], size: Size, padded: Size) -> tuple[Tensor, Tensor]:
        """Maps to logits of classes (B, Q, C + 1) and of masks (B, Q, h, w)."""
        head = self.head
        features, memory = head.pixel_decoder(feats, None)
        height, width = memory.shape[-2:]
        # nearest pixels of the cells, as the original head interpolates
        below = torch.arange(height, device=memory.device) * padded[0] // height >= size[0]
        right = torch.arange(width, device=memory.device) * padded[1] // width >= size[1]
        padding = (below[:, None] | right).expand(memory.shape[0], -1, -1)
        query_embed = head.query_embed.weight[None].expand(memory.shape[0], -1, -1)
        memory = head.decoder_input_proj(memory).flatten(2).transpose(1, 2)
        decoded = head.transformer_decoder(
            query=torch.zeros_like(query_embed),
            key=memory,
            value=memory,
            query_pos=query_embed,
            key_pos=head.decoder_pe(padding).flatten(2).transpose(1, 2),
            key_padding_mask=padding.flatten(1),
        )[-1]
        return head.cls_embed(decoded), torch.einsum('bqc,bchw->bqhw', head.mask_embed(decoded), features)


class SemanticQueries(nn.Module):
    """``predict`` of mmseg's mask heads: logits of a segmentor, (B, C, height, width).

    Args:
        head: of mmseg.
        operators: not used.
    """

    queries_type: type[Mask2FormerQueries] = Mask2FormerQueries

    def __init__(self, head: Any, operators: Operators | None = None) -> None:
        super().__init__()
        self.queries = self.queries_type(head)

    def predict(self, feats: tuple[Tensor, ...], metas: list[dict], test_cfg: Any) -> Tensor:
        """As mmseg calls it; ``img_shape`` is that of the whole batch."""
        size = tuple(metas[0]['img_shape'])
        logits, masks = self.queries(feats, size, size)
        return torch.einsum('bqc,bqhw->bchw', logits.softmax(-1)[..., :-1], masks.sigmoid())


class SemanticMaskFormerQueries(SemanticQueries):
    """:class:`SemanticQueries` of MaskFormer."""

    queries_type = MaskFormerQueries


class InstanceFusion(nn.Module):
    """``MaskFormerFusionHead.instance_postprocess``: the best pairs of query and class.

    Args:
        head: of mmdet.
        operators: not used.
    """

    def __init__(self, head: Any, operators: Operators | None = None) -> None:
        super().__init__()
        self.count = int(head.test_cfg.get('max_per_image', 100))
        self.things = head.num_things_classes

    def forward(self, logits: Tensor, masks: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Objects of each image, in descending order of scores.

        Args:
            logits: of classes, (B, Q, C + 1).
            masks: logits (B, Q, height, width), without padding.

        Returns:
            Boxes (B, N, 4), scores (B, N), classes (B, N) and probabilities (B, N, height, width).
        """
        classes = logits.shape[-1] - 1
        scores, index = logits.softmax(-1)[..., :-1].flatten(1).topk(self.count, dim=1)
        at, labels = index // classes, index % classes
        masks = masks.gather(1, at[..., None, None].expand(-1, -1, *masks.shape[-2:]))
        inside = masks > 0
        probabilities = masks.sigmoid()
        weight = inside.to(masks)
        confidence = (probabilities * weight).sum((2, 3)) / (weight.sum((2, 3)) + 1e-6)
        scores = scores * confidence * (labels < self.things).to(scores)
        boxes = torch.stack((*edges(inside.any(2)), *edges(inside.any(3))), dim=-1)[..., [0, 2, 1, 3]]
        scores, order = scores.topk(self.count, dim=1)
        boxes = boxes.gather(1, order[..., None].expand(-1, -1, 4))
        probabilities = probabilities.gather(1, order[..., None, None].expand(-1, -1, *masks.shape[-2:]))
        return boxes, scores, labels.gather(1, order), probabilities


def edges(there: Tensor) -> tuple[Tensor, Tensor]:
    """The first true position, and one after the last: (B, N, L) bool -> two of (B, N); both 0 where there is none."""
    at = torch.arange(there.shape[-1], device=there.device, dtype=torch.float32)
    last = ((at + 1) * there).amax(-1)
    first = torch.where(there, at, last.new_full((), torch.finfo(torch.float32).max)).amin(-1)
    return torch.minimum(first, last), last
