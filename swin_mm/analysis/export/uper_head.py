"""mmseg's UPerHead with its largest convolution computed at the resolution of its inputs.

The head upsamples all maps to the size of the first one, and applies a 3 x 3 convolution to their concatenation: 65 %
of the multiply-adds of UPerNet with Swin-T at 512 x 512. Mixing channels commutes with bilinear upsampling, which mixes
pixels of one channel. So each map is multiplied by the nine matrices of the kernel before it is upsampled, at 1/4, 1/16
and 1/64 of the pixels. Results differ by rounding only.

Shapes: B batch, C channels of a map, K of the result, h, w size of a map, H, W size of the first map.
"""

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swin_mm.analysis.export.operators import Operators


def uper_head(head: Any, operators: Operators | None = None) -> nn.Module:
    """The replacement of mmseg's head, or the head itself if its last convolution has another form or norm."""
    conv, norm = head.fpn_bottleneck.conv, head.fpn_bottleneck.norm
    plain = type(conv) is nn.Conv2d and conv.groups == 1 and conv.padding_mode == 'zeros'
    same = (conv.kernel_size, conv.stride, conv.padding, conv.dilation) == ((3, 3), (1, 1), (1, 1), (1, 1))
    known = norm is None or getattr(norm, 'running_var', None) is not None  # in evaluation, a factor and an offset
    first = head.fpn_bottleneck.order == ('conv', 'norm', 'act')
    return UPerHead(head) if plain and same and known and first else head


class UPerHead(nn.Module):
    """``UPerHead.predict``.

    Args:
        head: of mmseg.
    """

    def __init__(self, head: Any) -> None:
        super().__init__()
        self.head, self.threshold = head, head.threshold
        self.bottleneck = PyramidConv(head.fpn_bottleneck, head.channels, head.align_corners)

    def predict(self, feats: tuple[Tensor, ...], metas: list[dict], test_cfg: Any) -> Tensor:
        """Maps of the backbone -> logits, as mmseg calls it."""
        head = self.head
        feats = tuple(feats[i] for i in head.in_index)
        above = head.psp_forward(feats)
        maps = [above]  # coarse to fine
        for x, lateral, conv in zip(feats[-2::-1], head.lateral_convs[::-1], head.fpn_convs[::-1], strict=True):
            x = lateral(x)
            above = x + F.interpolate(above, x.shape[2:], mode='bilinear', align_corners=head.align_corners)
            maps.append(conv(above))
        x = self.bottleneck(maps[::-1])
        # Of the head: torch.export guards sizes for no reason if a module is registered twice.
        x = head.fpn_bottleneck.activate(x) if head.fpn_bottleneck.with_activation else x
        return head.predict_by_feat(head.cls_seg(x), metas)


class PyramidConv(nn.Module):
    """A 3 x 3 convolution of maps that are upsampled to the size of the first one and concatenated.

    Args:
        module: mmcv's ``ConvModule``, without a norm or with one that has running statistics. The caller activates.
        channels: of each map.
        align_corners: how maps are upsampled.
    """

    bias: Tensor

    def __init__(self, module: Any, channels: int, align_corners: bool) -> None:
        super().__init__()
        weight, bias, norm = module.conv.weight, module.conv.bias, module.norm
        bias = weight.new_zeros(len(weight)) if bias is None else bias
        if norm is not None:
            factor = (norm.running_var + norm.eps).rsqrt() * (1 if norm.weight is None else norm.weight)
            weight = weight * factor[:, None, None, None]
            bias = (bias - norm.running_mean) * factor + (0 if norm.bias is None else norm.bias)
        first, *others = weight.detach().split(channels, dim=1)
        self.align_corners = align_corners
        self.first = nn.Parameter(first.contiguous(), requires_grad=False)
        self.register_buffer('bias', bias.detach())
        # (K, C, ky, kx) -> (ky, kx, K, C): what is one convolution of 1 x 1 with 9 K results.
        self.others = nn.ParameterList(
            nn.Parameter(other.permute(2, 3, 0, 1).flatten(0, 2)[..., None, None].contiguous(), requires_grad=False)
            for other in others
        )

    def forward(self, maps: list[Tensor]) -> Tensor:
        """Maps (B, C, h, w), the largest first -> (B, K, H, W)."""
        batch, _, height, width = maps[0].shape
        parts: list[Tensor] = []
        matrices: list[Tensor] = []
        for x, weight in zip(maps[1:], self.others, strict=True):
            h, w = x.shape[2:]
            # Transposed, so that both products are of two-dimensional matrices, along the last axis.
            nine = F.conv2d(x.transpose(2, 3).contiguous(), weight).view(batch, 3, -1, w, h)  # (B, ky, kx K, w, h)
            rows = shifted_upsampling(h, height, self.align_corners, x)
            first, second, third = (nine[:, i].flatten(0, 2) @ rows[:, i].T for i in range(3))
            tall = first + second + third  # (B kx K w, H)
            parts += tall.view(batch, 3, -1, w, height).transpose(3, 4).unbind(1)  # three of (B, K, H, w)
            matrices += shifted_upsampling(w, width, self.align_corners, x).unbind(1)
        result = torch.cat(parts, dim=-1).flatten(0, 2) @ torch.cat(matrices, dim=1).T
        return F.conv2d(maps[0], self.first, self.bias, padding=1) + result.view(batch, -1, height, width)


def shifted_upsampling(small: int, large: int, align_corners: bool, like: Tensor) -> Tensor:
    """Linear upsampling from ``small`` to ``large``, shifted by -1, 0 and 1, as matrices (large, 3, small).

    What is shifted in from outside is zero, as the padding of a convolution.
    """
    to = torch.arange(large, device=like.device)[:, None] + torch.arange(-1, 2, device=like.device)  # (large, 3)
    inside = ((to >= 0) & (to < large)).to(like.dtype)
    at = to.to(like.dtype)
    at = at * (small - 1) / torch.sym_max(large - 1, 1) if align_corners else (at + 0.5) * small / large - 0.5
    distance = at.clamp(0, small - 1)[..., None] - torch.arange(small, device=like.device).to(like.dtype)
    return (1 - distance.abs()).clamp(min=0) * inside[..., None]
