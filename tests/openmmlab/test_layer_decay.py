"""Layer-wise learning-rate decay: which parameter gets which learning rate and weight decay."""

import pytest
import torch
from mmengine.model import BaseModule
from mmengine.optim import build_optim_wrapper
from torch import nn

import swin_mm
from swin_mm.openmmlab.layer_decay import layer_id

DEPTHS = (1, 2, 1)
LR, DECAY, RATE = 1e-2, 0.05, 0.5


class Detector(BaseModule):
    """A model whose backbone is not called ``backbone``, with a head."""

    def __init__(self, backbone: nn.Module) -> None:
        super().__init__()
        self.student = nn.ModuleDict({'trunk': backbone})
        self.head = nn.Sequential(nn.Linear(4, 4), nn.LayerNorm(4))


def detector(version: type = swin_mm.SwinTransformer, **options) -> Detector:
    sizes = dict(embed_dims=8, depths=DEPTHS, num_heads=(1, 2, 4), window_size=4, strides=(4, 2, 2), out_indices=(1, 2))
    return Detector(version(**sizes, **options))


def groups(model: nn.Module, type='OptimWrapper', **paramwise) -> dict[str, tuple[float, float]]:
    """Return {parameter: (learning rate, weight decay)} from an optim wrapper built as from a config."""
    config = dict(
        type=type,
        constructor='swin_mm.LayerDecayOptimWrapperConstructor',
        optimizer=dict(type='AdamW', lr=LR, weight_decay=DECAY),
        paramwise_cfg=dict(decay_rate=RATE) | paramwise,
    )
    optimizer = build_optim_wrapper(model, config).optimizer
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    result = {names[id(p)]: (g['lr'], g['weight_decay']) for g in optimizer.param_groups for p in g['params']}
    assert result.keys() == dict(model.named_parameters()).keys()
    return result


@pytest.mark.parametrize('version', [swin_mm.SwinTransformer, swin_mm.SwinTransformerV2])
def test_learning_rate_shrinks_from_block_to_block(version):
    found = groups(detector(version, use_abs_pos_embed=True, pretrain_img_size=32))
    blocks = sum(DEPTHS)
    expected = {
        'absolute_pos_embed': 0,
        'patch_embed.proj.weight': 0,
        'patch_embed.norm.bias': 0,
        'layers.0.blocks.0.attn.qkv.weight': 1,
        'layers.0.downsample.reduction.weight': 1,  # with the last block of its stage
        'layers.0.downsample.norm.weight': 1,
        'layers.1.blocks.0.norm1.weight': 2,
        'layers.1.blocks.1.mlp.fc1.bias': 3,
        'layers.1.downsample.reduction.weight': 3,
        'layers.2.blocks.0.attn.proj.weight': 4,
        'norm1.weight': 5,
        'norm2.bias': 5,
    }
    for name, depth in expected.items():
        assert found[f'student.trunk.{name}'][0] == pytest.approx(LR * RATE ** (blocks + 1 - depth)), name
    assert {rate for name, (rate, _) in found.items() if name.startswith('head')} == {LR}
    # One rate per block, one for the embeddings and one for the output norms and the head.
    assert len({rate for rate, _ in found.values()}) == blocks + 2


def test_layer_ids_cover_all_blocks_of_swin_s():
    names = [
        name for name, _ in swin_mm.SwinTransformer(arch='s', embed_dims=32, num_heads=(1, 2, 4, 8)).named_parameters()
    ]
    ids = {name: layer_id(name, (2, 2, 18, 2)) for name in names}
    assert set(ids.values()) == set(range(26))
    assert ids['layers.2.blocks.17.norm2.weight'] == ids['layers.2.downsample.norm.bias'] == 22
    assert ids['layers.3.blocks.1.mlp.fc2.weight'] == 24


@pytest.mark.parametrize('version', [swin_mm.SwinTransformer, swin_mm.SwinTransformerV2])
def test_norms_and_positions_of_the_backbone_have_no_weight_decay(version):
    # mmengine prefers longer custom_keys; a longer key than 'norm' must not bring the decay back.
    model = detector(version, use_abs_pos_embed=True, pretrain_img_size=32)
    found = groups(model, custom_keys={'student.trunk': dict(lr_mult=0.1, decay_mult=1.0)})
    free = {'relative_position_bias_table', 'absolute_pos_embed', 'logit_scale'}
    for path, parameter in model.student['trunk'].named_parameters():
        owner = model.student['trunk'].get_submodule(path.rpartition('.')[0])
        expected = isinstance(owner, nn.LayerNorm) or path.rpartition('.')[2] in free or 'cpb_mlp' in path
        assert (found[f'student.trunk.{path}'][1] == 0) == expected, (path, parameter.shape)
    assert found['head.1.weight'][1] == DECAY  # weight decay of the head is up to the config


def test_other_options_keep_their_meaning():
    plain = groups(detector())
    found = groups(
        detector(), bias_decay_mult=0.0, custom_keys={'trunk': dict(lr_mult=0.1), 'head.1': dict(decay_mult=0.5)}
    )
    weight = 'student.trunk.layers.1.blocks.0.attn.qkv.weight'
    assert found[weight] == (pytest.approx(0.1 * plain[weight][0]), DECAY)
    assert found['head.0.bias'] == (LR, 0.0)
    assert found['head.1.weight'] == (LR, 0.5 * DECAY)


def test_frozen_stages_are_not_updated():
    model = detector(frozen_stages=1)
    before = {name: p.clone() for name, p in model.named_parameters()}
    config = dict(
        constructor='swin_mm.LayerDecayOptimWrapperConstructor',
        optimizer=dict(type='SGD', lr=1.0),
        paramwise_cfg=dict(decay_rate=RATE),
    )
    wrapper = build_optim_wrapper(model, config)
    maps = model.student['trunk'](torch.rand(1, 3, 32, 32))
    wrapper.update_params(sum(m.square().sum() for m in maps) + model.head(torch.rand(1, 4))[0, 0])
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert not any('patch_embed' in name or 'layers.0' in name for name in moved)
    assert any('layers.1.blocks.0' in name for name in moved)


def test_errors_name_the_bad_setting():
    for rate in (None, 0, 1.5, '0.9'):
        with pytest.raises(ValueError, match=r'must be in \(0, 1\], for example'):
            groups(detector(), decay_rate=rate)
    with pytest.raises(TypeError, match='Sequential has no Swin backbone of swin_mm'):
        groups(nn.Sequential(nn.Linear(2, 2)))
    with pytest.raises(ValueError, match='the optimizer has no lr; set one'):
        config = dict(constructor='swin_mm.LayerDecayOptimWrapperConstructor', optimizer=dict(type='AdamW'))
        build_optim_wrapper(detector(), config | dict(paramwise_cfg=dict(decay_rate=RATE)))
