"""Properties of attention that comparisons of whole models do not cover."""

import math

import torch

from swin_mm.models.window_attention import WindowAttention, WindowAttentionV2
from swin_mm.ops.attention.reference import split_heads
from swin_mm.ops.windows import log_spaced_offsets


def test_v2_clamps_its_scale_and_normalises_queries_and_keys():
    attention = WindowAttentionV2(64, (4, 4), 2)
    with torch.no_grad():
        attention.logit_scale.copy_(torch.tensor([math.log(7.0), 6.0]).view(2, 1, 1))
    windows = attention.qkv(torch.randn(3, 16, 64))
    q, k, _, factor = split_heads(windows, 2, attention.score_scale())
    assert factor == 1
    torch.testing.assert_close(q.norm(dim=-1)[:, 0], torch.full((3, 16), 7.0))
    torch.testing.assert_close(q.norm(dim=-1)[:, 1], torch.full((3, 16), 100.0))
    torch.testing.assert_close(k.norm(dim=-1), torch.ones(3, 2, 16))


def test_v2_bias_is_bounded_and_zero_offset_has_coordinate_zero():
    attention = WindowAttentionV2(64, (4, 6), 2)
    coordinates = log_spaced_offsets((4, 6), (4, 6))
    assert coordinates.shape == (7, 11, 2)
    assert coordinates[3, 5].tolist() == [0, 0]
    # The outermost offset is 8 of 8: log2(9) / log2(8).
    torch.testing.assert_close(coordinates[-1, -1], torch.full((2,), math.log(9, 8)))
    torch.testing.assert_close(coordinates.flip(0, 1), -coordinates)
    with torch.no_grad():
        attention.cpb_mlp[2].weight.fill_(100.0)
        bias = attention.position_bias((4, 6))
    assert bias.shape == (2, 24, 24)
    assert bias.min() >= 0 and bias.max() <= 16 and bias.max() > 15.9


def test_dropout_acts_in_training_only():
    for kind in (WindowAttention, WindowAttentionV2):
        attention = kind(64, (4, 4), 2, attn_drop=0.5, proj_drop=0.5)
        x = torch.randn(3, 8, 4, 64)
        assert not torch.equal(attention.train()(x, (4, 4)), attention(x, (4, 4)))
        assert torch.equal(attention.eval()(x, (4, 4)), attention(x, (4, 4)))
