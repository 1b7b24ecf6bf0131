"""Replacements of layers that exporters cannot express for any size of image.

Shapes: B batch, C channels, N queries, h heads, L levels, P points.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swin_mm.analysis.export.operators import Operators


class AdaptivePool(nn.Module):
    """Adaptive average pooling as matrix products: PyTorch's ONNX exporter gets it wrong for dynamic sizes."""

    def __init__(self, pool: nn.AdaptiveAvgPool2d, operators: Operators | None = None) -> None:
        super().__init__()
        self.output_size = pool.output_size if isinstance(pool.output_size, tuple) else (pool.output_size,) * 2

    def forward(self, x: Tensor) -> Tensor:
        """(B, C, H, W) -> (B, C, *output_size)."""
        for count in reversed(self.output_size):  # the last axis, then the one before it, transposed to be the last
            size = x.shape[3]
            count = size if count is None else count
            cell, at = torch.arange(count, device=x.device)[:, None], torch.arange(size, device=x.device)
            inside = ((at >= cell * size // count) & (at < ((cell + 1) * size + count - 1) // count)).to(x.dtype)
            rows = x.clone(memory_format=torch.contiguous_format).flatten(0, 2)
            x = (rows @ (inside / inside.sum(1, keepdim=True)).T).view(*x.shape[:3], count).transpose(2, 3)
        return x


class DeformableAttention(nn.Module):
    """Multi-scale deformable attention by ``grid_sample``, for maps whose sizes are integers, not a tensor.

    Args:
        attention: mmcv's ``MultiScaleDeformableAttention``.
        operators: not used.
    """

    def __init__(self, attention: Any, operators: Operators | None = None) -> None:
        super().__init__()
        self.heads, self.levels, self.points = attention.num_heads, attention.num_levels, attention.num_points
        self.batch_first = attention.batch_first
        self.sampling_offsets, self.attention_weights = attention.sampling_offsets, attention.attention_weights
        self.value_proj, self.output_proj = attention.value_proj, attention.output_proj

    def forward(
        self,
        query: Tensor,
        key: Tensor | None = None,
        value: Tensor | None = None,
        identity: Tensor | None = None,
        query_pos: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        reference_points: Tensor | None = None,
        spatial_shapes: Any = None,
        **kwargs: Any,
    ) -> Tensor:
        """As mmcv's, in evaluation; ``spatial_shapes`` are (height, width) of each level."""
        assert reference_points is not None
        value = query if value is None else value
        identity = query if identity is None else identity
        query = query if query_pos is None else query + query_pos
        if not self.batch_first:
            query, value = query.transpose(0, 1), value.transpose(0, 1)
        batch, count = query.shape[:2]
        value = self.value_proj(value)
        if key_padding_mask is not None:
            value = value.masked_fill(key_padding_mask[..., None], 0.0)
        offsets = self.sampling_offsets(query).view(batch, count, self.heads, self.levels, self.points, 2)
        weights = self.attention_weights(query).view(batch, count, self.heads, self.levels * self.points).softmax(-1)
        weights = weights.view(batch, count, self.heads, self.levels, self.points)

        start, result = 0, torch.zeros((), dtype=query.dtype, device=query.device)
        for level, (height, width) in enumerate(spatial_shapes):
            points = reference_points[:, :, None, level, None]  # (B, N, 1, 1, 2 or 4)
            if points.shape[-1] == 2:
                one = torch.ones((), dtype=query.dtype, device=query.device)
                at = points + offsets[:, :, :, level] / torch.stack((one * width, one * height))
            else:
                at = points[..., :2] + offsets[:, :, :, level] / self.points * points[..., 2:] * 0.5
            # (B, height * width, C) -> (B h, C / h, height, width)
            stop = start + height * width
            maps = value[:, start:stop].transpose(1, 2).reshape(batch * self.heads, -1, height, width)
            grid = (2 * at - 1).transpose(1, 2).flatten(0, 1)  # (B h, N, P, 2)
            sampled = F.grid_sample(maps, grid, mode='bilinear', padding_mode='zeros', align_corners=False)
            share = weights[:, :, :, level].transpose(1, 2).flatten(0, 1)[:, None]  # (B h, 1, N, P)
            result = result + (sampled * share).sum(-1)
            start = stop
        output = self.output_proj(result.view(batch, -1, count).transpose(1, 2))
        return (output if self.batch_first else output.transpose(0, 1)) + identity


def cell_centres(height: int, width: int, like: Tensor) -> Tensor:
    """The centre (x, y) of each cell of a map, from 0 to 1: (height * width, 2), of the type of ``like``."""
    ys = (torch.arange(height, device=like.device, dtype=like.dtype) + 0.5) / height
    xs = (torch.arange(width, device=like.device, dtype=like.dtype) + 0.5) / width
    return torch.stack((xs[None].expand(height, width), ys[:, None].expand(height, width)), dim=-1).reshape(-1, 2)


class PixelDecoder(nn.Module):
    """mmdet's ``MSDeformAttnPixelDecoder`` with sizes of maps as integers.

    Args:
        decoder: mmdet's.
        operators: not used.
    """

    def __init__(self, decoder: Any, operators: Operators | None = None) -> None:
        super().__init__()
        self.decoder = decoder

    def forward(self, feats: list[Tensor]) -> tuple[Tensor, list[Tensor]]:
        """Maps, fine to coarse -> the map for masks, and ``num_outs`` maps, coarse to fine."""
        decoder = self.decoder
        shapes, inputs, positions, references = [], [], [], []
        for i in range(decoder.num_encoder_levels):
            level = decoder.num_input_levels - i - 1
            x = feats[level]
            height, width = x.shape[-2:]
            padding = x.new_zeros((x.shape[0], height, width), dtype=torch.bool)
            position = decoder.postional_encoding(padding) + decoder.level_encoding.weight[i].view(1, -1, 1, 1)
            shapes.append((height, width))
            inputs.append(decoder.input_convs[i](x).flatten(2).transpose(1, 2))
            positions.append(position.flatten(2).transpose(1, 2))
            references.append(cell_centres(height, width, x))
        reference = torch.cat(references)[None, :, None].expand(feats[0].shape[0], -1, decoder.num_encoder_levels, -1)
        memory = decoder.encoder(
            query=torch.cat(inputs, dim=1),
            query_pos=torch.cat(positions, dim=1),
            key_padding_mask=None,  # the whole batch has one size
            spatial_shapes=shapes,
            level_start_index=None,
            valid_ratios=None,
            reference_points=reference,
        ).transpose(1, 2)
        outs, start = [], 0
        for height, width in shapes:
            outs.append(memory[..., start : start + height * width].reshape(*memory.shape[:2], height, width))
            start += height * width
        for i in range(decoder.num_input_levels - decoder.num_encoder_levels - 1, -1, -1):
            lateral = decoder.lateral_convs[i](feats[i])
            above = F.interpolate(outs[-1], size=lateral.shape[-2:], mode='bilinear', align_corners=False)
            outs.append(decoder.output_convs[i](lateral + above))
        return decoder.mask_feature(outs[-1]), outs[: decoder.num_outs]
