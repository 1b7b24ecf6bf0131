"""Counts of multiply-adds and saved bytes against closed formulas and a real training step."""

import pytest
import torch
from mmengine.config import Config
from torch import nn

from swin_mm.analysis import complexity
from swin_mm.models.swin import SwinPyramid, SwinPyramidV2
from swin_mm.ops.attention import reference
from swin_mm.ops.windows import window_partition
from swin_mm.utils.compat import CHECKPOINTS_ON_META
from swin_mm.utils.errors import InputError

WIDTH, HEIGHT = 90, 62  # 16 × 23 tokens, padded to 21 × 28


@pytest.fixture(scope='module')
def config(tiny):
    return Config.fromfile(tiny.config)


def test_parameters_and_multiply_adds_of_each_part(config):
    model, macs = complexity.build(config), complexity.multiply_adds(config, WIDTH, HEIGHT)
    C, tokens, windows, N = 16, 16 * 23, 3 * 4, 49
    assert macs['backbone.patch_embed'] == tokens * C * 3 * 4 * 4
    block = tokens * (3 + 1 + 4 + 4) * C * C + 2 * windows * N * N * C
    assert macs['backbone.layers.0'] == block + 8 * 12 * 4 * C * 2 * C
    heads = {'rpn_head', 'roi_head.bbox_head', 'roi_head.mask_head'} if hasattr(model, 'neck') else {'decode_head'}
    assert heads < set(+macs)
    assert not macs[complexity.ELSEWHERE]
    if heads == {'decode_head'}:
        assert not macs['auxiliary_head'], 'it is used in training only'

    parameters = complexity.count_parameters(model)
    assert sum(parameters.values()) == sum(p.numel() for p in model.parameters())
    assert parameters['backbone.norm*'] == 2 * (16 + 32 + 64 + 128) and not parameters[complexity.ELSEWHERE]


def test_hooks_are_removed_and_the_fast_path_is_restored(config):
    model = complexity.build(config)
    with complexity.attribute(model, lambda: 0):
        pass
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
    complexity.multiply_adds(config, WIDTH, HEIGHT)
    assert torch.backends.mha.get_fastpath_enabled()


def test_heads_that_need_values_are_counted_on_the_cpu(config, monkeypatch):
    expected, forward = complexity.multiply_adds(config, WIDTH, HEIGHT), nn.Conv2d.forward

    def needs_values(self, x):
        if self.kernel_size == (3, 3):
            bool(x.sum() > 0)  # impossible on the meta device
        return forward(self, x)

    monkeypatch.setattr(nn.Conv2d, 'forward', needs_values)
    assert complexity.multiply_adds(config, WIDTH, HEIGHT) == expected


class BackboneOnly(nn.Module):
    def __init__(self, backbone):
        super().__init__()
        self.backbone = backbone


@pytest.mark.parametrize('pyramid', [SwinPyramid, SwinPyramidV2])
@pytest.mark.parametrize('with_cp', [False, True])
def test_saved_bytes_are_those_of_a_real_training_step(pyramid, with_cp):
    options = dict(embed_dims=16, depths=(2, 1), num_heads=(1, 2), strides=(4, 2), out_indices=(0, 1), with_cp=with_cp)
    model = BackboneOnly(pyramid(**options, drop_path_rate=0.2, attention='reference')).double()
    weights, kept = {p.data_ptr() for p in model.parameters()}, {}

    def pack(tensor):
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage()  # kept alive: its address is not reused
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        model.train().backbone(torch.rand(2, 3, HEIGHT, WIDTH, dtype=torch.double))
    expected = sum(storage.nbytes() for address, storage in kept.items() if address not in weights)

    with torch.device('meta'):
        shapes = BackboneOnly(pyramid(**options, drop_path_rate=0.2, attention='reference')).double()
    image = torch.empty(2, 3, HEIGHT, WIDTH, device='meta', dtype=torch.double)
    if with_cp and not CHECKPOINTS_ON_META:
        with pytest.raises(InputError, match='torch 2.4'):
            complexity.saved_bytes(shapes, image)
        return
    found = complexity.saved_bytes(shapes, image)
    assert sum(found.values()) == expected > 2**18
    assert found[complexity.ELSEWHERE] == 0
    assert found['backbone.patch_embed'] >= image.nbytes, 'the image is saved'


def test_fused_attention_saves_no_scores(config):
    kept = {
        name: complexity.activation_bytes(config, WIDTH, HEIGHT, 2, kernel)
        for name, kernel in complexity.KERNELS.items()
    }
    scores = 2 * 3 * 4 * 1 * 49 * 49 * 4  # bytes of stage 0: images, windows, heads, pairs
    assert kept['reference']['backbone.layers.0'] - kept['Triton']['backbone.layers.0'] > scores
    one = complexity.activation_bytes(config, WIDTH, HEIGHT, 1, complexity.KERNELS['Triton'])
    assert 1.9 < sum(kept['Triton'].values()) / sum(one.values()) <= 2  # the part that does not grow is small


def test_stage_shapes_are_what_the_attention_gets(config):
    backbone = complexity.build(config, 'cpu').backbone
    found = []

    def record(qkv, pad, bias, window, shift, scale, dropout=0.0):
        windows = window_partition(qkv, window, shift, pad).shape[0]
        found.append((tuple(qkv.shape[1:3]), window, windows, bias.shape[0]))
        return reference.attention(qkv, pad, bias, window, shift, scale, dropout)

    for stage in backbone.layers:
        stage.blocks[-1].attn.attention_fn = record
    backbone(torch.rand(1, 3, HEIGHT, WIDTH))
    shapes = complexity.stage_shapes(complexity.build(config).backbone, WIDTH, HEIGHT)
    assert [(s.map_size, s.window, s.windows, s.heads) for s in shapes] == found
    assert shapes[0].padded_size == (21, 28)


def test_deformable_convolutions_count_as_plain_ones():
    ops = pytest.importorskip('mmcv.ops')
    from swin_mm.analysis.substitution import replace_modules

    model = nn.Sequential(nn.Sequential(ops.DeformConv2d(4, 6, 3, padding=1)), ops.DeformConv2dPack(6, 6, 3))
    assert replace_modules(model, ops.DeformConv2d, lambda old: nn.Conv2d(old.in_channels, old.out_channels, 3)) == 1
    assert type(model[0][0]) is nn.Conv2d and type(model[1]) is ops.DeformConv2dPack
