"""The exported form of UPerHead against mmseg's."""

import pytest
import torch
from torch import nn

from swin_mm.analysis.export.uper_head import UPerHead, shifted_upsampling, uper_head

heads = pytest.importorskip('mmseg.models.decode_heads')


def build(**more):
    """mmseg's head with 4 x 8 channels, in fp64, with statistics and affine parameters that matter."""
    torch.manual_seed(0)
    settings = dict(in_channels=[4, 6, 8, 10], in_index=[0, 1, 2, 3], pool_scales=(1, 2), channels=8, num_classes=5)
    head = heads.UPerHead(**settings | dict(norm_cfg=dict(type='SyncBN'), align_corners=False) | more).eval().double()
    for module in head.modules():
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            module.running_mean.normal_()
            module.running_var.uniform_(0.5, 2)
            nn.init.normal_(module.weight)
            nn.init.normal_(module.bias)
    return head


def predict(head, height, width):
    """Logits for maps of an image of 4 * height x 4 * width, of sizes that are rounded up from level to level."""
    generator = torch.Generator().manual_seed(1)
    feats = []
    for channels in (4, 6, 8, 10):
        feats.append(torch.randn(2, channels, height, width, generator=generator, dtype=torch.float64))
        height, width = (height + 1) // 2, (width + 1) // 2
    with torch.no_grad():
        return head.predict(feats, [dict(img_shape=(4 * feats[0].shape[2], 4 * feats[0].shape[3]))] * 2, None)


@pytest.mark.parametrize('more', [{}, dict(align_corners=True), dict(norm_cfg=None), dict(act_cfg=None)], ids=str)
@pytest.mark.parametrize('size', [(17, 22), (16, 8), (1, 5)], ids=str)
def test_logits_are_mmsegs(more, size):
    head = build(**more)
    ours = uper_head(head)
    assert isinstance(ours, UPerHead)
    torch.testing.assert_close(predict(ours, *size), predict(head, *size), rtol=1e-10, atol=1e-10)


def test_other_norms_keep_the_head():
    head = build(norm_cfg=dict(type='GN', num_groups=2))
    assert uper_head(head) is head


@pytest.mark.parametrize('align_corners', [False, True])
def test_upsampling_is_that_of_pytorch(align_corners):
    like = torch.zeros((), dtype=torch.float64)
    x = torch.randn(1, 1, 5, dtype=torch.float64)
    expected = nn.functional.interpolate(x, 13, mode='linear', align_corners=align_corners)
    found = shifted_upsampling(5, 13, align_corners, like) @ x[0, 0]  # (13, 3)
    torch.testing.assert_close(found, nn.functional.pad(expected, (1, 1)).unfold(2, 3, 1)[0, 0])
