"""Replacement of DINO: its transformer with sizes of maps as integers, and its selection of boxes.

Shapes: B batch, C channels, K cells of all levels, L levels, Q queries.
"""

from typing import Any

import torch
from torch import Tensor, nn

from swin_mm.analysis.export.layers import cell_centres
from swin_mm.analysis.export.operators import Operators, clip
from swin_mm.utils.errors import InputError


class DinoTransformer(nn.Module):
    """``DINO.predict`` after the neck, for batches without padding.

    Args:
        detector: mmdet's ``DINO``, whose deformable attention is replaced.
        operators: not used.

    Raises:
        InputError: its loss is not one on sigmoids, from which the selection of boxes depends.
    """

    def __init__(self, detector: Any, operators: Operators | None = None) -> None:
        super().__init__()
        if not detector.bbox_head.loss_cls.use_sigmoid:
            raise InputError('DINO: expected a classification loss with use_sigmoid=True')
        self.detector = detector
        self.count = int(detector.bbox_head.test_cfg.get('max_per_img', detector.num_queries))

    def extract_feat(self, image: Tensor) -> tuple[Tensor, ...]:
        """The maps of the neck."""
        return self.detector.extract_feat(image)

    def forward(self, feats: tuple[Tensor, ...], size: tuple[int, int]) -> tuple[Tensor, Tensor, Tensor]:
        """Maps to boxes (B, count, 4), scores (B, count) and classes (B, count), in descending order of scores.

        Args:
            feats: the maps of the neck.
            size: (height, width) of the image.
        """
        detector, head = self.detector, self.detector.bbox_head
        batch, levels = feats[0].shape[0], len(feats)
        shapes = [(x.shape[2], x.shape[3]) for x in feats]
        positions = [
            detector.positional_encoding(None, input=x).flatten(2).transpose(1, 2) + detector.level_embed[i]
            for i, x in enumerate(feats)
        ]
        centres = [cell_centres(*shape, x) for shape, x in zip(shapes, feats, strict=True)]
        reference = torch.cat(centres)[None, :, None].expand(batch, -1, levels, -1)  # (B, K, L, 2)
        memory = torch.cat([x.flatten(2).transpose(1, 2) for x in feats], dim=1)  # (B, K, C)
        position = torch.cat(positions, dim=1)
        valid = memory.new_ones((batch, levels, 2))
        for layer in detector.encoder.layers:
            memory = layer(
                query=memory,
                query_pos=position,
                key_padding_mask=None,
                spatial_shapes=shapes,
                level_start_index=None,
                valid_ratios=valid,
                reference_points=reference,
            )
        hidden, references = detector.decoder(
            query=detector.query_embedding.weight[None].expand(batch, -1, -1),
            value=memory,
            key_padding_mask=None,
            self_attn_mask=None,
            reference_points=self.proposals(memory, centres),
            spatial_shapes=shapes,
            level_start_index=None,
            valid_ratios=valid,
            reg_branches=head.reg_branches,
        )
        logits, boxes = (output[-1] for output in head(hidden, references))
        classes = logits.shape[-1]
        scores, index = logits.sigmoid().flatten(1).topk(self.count, dim=1)
        boxes = boxes.gather(1, (index // classes)[..., None].expand(-1, -1, 4))
        centre, half = boxes[..., :2], boxes[..., 2:] / 2
        one = boxes.new_ones(())
        scale = torch.stack((one * size[1], one * size[0]) * 2)
        return clip(torch.cat((centre - half, centre + half), dim=-1) * scale, size), scores, index % classes

    def proposals(self, memory: Tensor, centres: list[Tensor]) -> Tensor:
        """The boxes of the best cells, (B, Q, 4), as centre and size from 0 to 1.

        Args:
            memory: output of the encoder, (B, K, C).
            centres: of the cells of each level, (H * W, 2), from 0 to 1.
        """
        detector, head, last = self.detector, self.detector.bbox_head, self.detector.decoder.num_layers
        sized = [torch.cat((xy, torch.full_like(xy, 0.05 * 2.0**level)), dim=-1) for level, xy in enumerate(centres)]
        boxes = torch.cat(sized)  # (K, 4)
        inside = ((boxes > 0.01) & (boxes < 0.99)).all(-1, keepdim=True)
        offsets = torch.log(boxes / (1 - boxes)).masked_fill(~inside, float('inf'))
        chosen = detector.memory_trans_norm(detector.memory_trans_fc(memory.masked_fill(~inside, 0.0)))
        best = head.cls_branches[last](chosen).amax(-1).topk(detector.num_queries, dim=1).indices
        moved = head.reg_branches[last](chosen) + offsets
        return moved.gather(1, best[..., None].expand(-1, -1, 4)).sigmoid()
