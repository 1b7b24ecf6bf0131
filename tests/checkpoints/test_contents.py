"""Recognising checkpoints, and converting them to any naming."""

import functools
import re

import pytest
import torch
from support.oracles import SMALL, randomise, relative_error
from support.reference_models import CLASSES, Reference, reference
from torch import Tensor

import swin_mm
from swin_mm.checkpoints import CheckpointError, convert, parse, unwrap
from swin_mm.checkpoints.namings import REBUILT, TARGETS

CLASSIFIERS = ('official', 'mmpretrain', 'timm', 'torchvision', 'transformers')
WINDOW, SIZE = {1: 7, 2: 8}, {1: 224, 2: 256}


@functools.cache
def classifier(library: str, version: int) -> Reference:
    """A classifier of a library."""
    return reference(library, version, 't', WINDOW[version], SIZE[version])


def parameters(state: dict[str, Tensor]) -> dict[str, Tensor]:
    return {k: v for k, v in state.items() if not re.fullmatch(REBUILT, k)}


def without_key_bias(state: dict[str, Tensor]) -> dict[str, Tensor]:
    """torchvision stores a bias for V2's keys that its forward takes for zero; conversions write zero."""
    result = dict(state)
    for key, value in state.items():
        if key.endswith('attn.qkv.bias'):
            q, k, v = value.chunk(3)
            result[key] = torch.cat([q, torch.zeros_like(k), v])
    return result


def exact(state: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    state, expected = parameters(state), parameters(expected)
    return state.keys() == expected.keys() and all(torch.equal(state[key], value) for key, value in expected.items())


@pytest.mark.parametrize('target', TARGETS)
@pytest.mark.parametrize('source', CLASSIFIERS)
@pytest.mark.parametrize('version', [1, 2])
def test_converting_classifiers_there_and_back_is_exact(source, version, target):
    state = classifier(source, version).state
    if (source, version) == ('torchvision', 2):
        state = without_key_bias(state)
    if version == 2 and target in ('mmdet', 'mmseg'):
        with pytest.raises(CheckpointError, match=f'{target} has no Swin V2'):
            convert(parse(state), target)
        return
    there, dropped = convert(parse(state), target)
    assert not dropped
    back, dropped = convert(parse(unwrap(there)), source)
    assert not dropped
    assert exact(unwrap(back), state)


@pytest.mark.parametrize('target', ['official', 'mmseg', 'mmpretrain', 'transformers', 'swin_mm'])
def test_converting_dense_backbones_there_and_back_is_exact(target):
    state = {f'backbone.{k}': v for k, v in classifier('mmdet', 1).state.items()}
    there, _ = convert(parse(state), target)
    assert not any(key.startswith('norm.') for key in parse(unwrap(there)).state)
    back = unwrap(convert(parse(unwrap(there)), 'mmdet')[0])
    assert exact({f'backbone.{key.removeprefix("backbone.")}': value for key, value in back.items()}, state)


def test_detectors_keep_their_other_parts_if_the_target_has_detectors():
    state = {f'backbone.{k}': v for k, v in classifier('mmdet', 1).state.items()} | {'neck.w': torch.ones(2)}
    there, dropped = convert(parse(state), 'official')
    assert not dropped
    assert 'backbone.layers.0.blocks.0.attn.qkv.weight' in there['model']
    assert exact(convert(parse(there['model']), 'mmdet')[0]['state_dict'], state)
    there, dropped = convert(parse(state), 'timm')
    assert dropped == {f'backbone.norm{i}.{kind}': 'timm has no output norms' for i in range(4) for kind in KINDS} | {
        'neck.w': 'other part of the model'
    }
    assert 'neck.w' not in there


KINDS = ('weight', 'bias')


def test_position_embeddings_are_flat_where_the_library_has_them_flat():
    model = randomise(swin_mm.SwinTransformer(**SMALL, use_abs_pos_embed=True, pretrain_img_size=32))
    for target, name in {'mmdet': 'absolute_pos_embed', 'transformers': 'embeddings.position_embeddings'}.items():
        there = unwrap(convert(parse(model.state_dict()), target)[0])
        assert there[name].shape == (1, 64, 32)
        assert torch.equal(there[name][0, 9], model.absolute_pos_embed[0, :, 1, 1])
        back = unwrap(convert(parse(there), 'swin_mm')[0])
        assert torch.equal(back['absolute_pos_embed'], model.absolute_pos_embed)
    with pytest.raises(CheckpointError, match='torchvision has no absolute_pos_embed'):
        convert(parse(model.state_dict()), 'torchvision')


@pytest.mark.parametrize('target', ['mmdet', 'mmpretrain', 'timm', 'torchvision', 'transformers'])
@pytest.mark.parametrize('source', CLASSIFIERS)
@pytest.mark.parametrize('version', [1, 2])
@torch.no_grad()
def test_converted_checkpoints_load_in_the_target_library(source, target, version):
    if (target, version) == ('mmdet', 2):
        return
    theirs, other = classifier(source, version), classifier(target, version)
    image = torch.rand(1, 3, SIZE[version], SIZE[version])
    expected = theirs.features(image)
    written = unwrap(convert(parse(theirs.state), target, [WINDOW[version]] * 4 if version == 2 else None)[0])
    model, features = other.model, other.features
    before = {key: value.clone() for key, value in model.state_dict().items()}
    for parameter in model.parameters():
        parameter.zero_()
    if target == 'transformers':  # names differ in files and in memory: its own loader knows
        written = type(model).from_pretrained(None, config=model.config, state_dict=written).state_dict()
    result = model.load_state_dict(written, strict=False)
    found = features(image)
    for key, value in model.state_dict().items():
        value.copy_(before[key])
    # mmdet's classifier weights go without output norms, and mmpretrain's V2 throws its own buffers away.
    allowed = r'norm\d\..*' if target == 'mmdet' else REBUILT if (target, version) == ('mmpretrain', 2) else '-'
    assert all(re.fullmatch(allowed, key) for key in result.missing_keys), result.missing_keys
    assert target == 'mmdet' or not result.unexpected_keys
    stages = 3 if target == 'mmdet' else 4  # mmdet shifts on the smallest map too
    assert relative_error(found[:stages], expected[:stages]) < 1e-5


@pytest.mark.parametrize('version, window, size', [(1, 7, 224), (1, 12, 384), (2, 8, 256), (2, 16, 256)])
def test_official_classifiers_get_every_buffer_for_strict_loading(version, window, size):
    """The masks are those that timm's model computes, block by block."""
    official = reference('official', version, 't', window, size)
    theirs = reference('timm', version, 't', window, size)
    windows = [min(window, size // 4 >> i) for i in range(4)] if version == 2 else None
    written = unwrap(convert(parse(theirs.state), 'official', windows)[0])
    assert {k: v.shape for k, v in written.items()} == {k: v.shape for k, v in official.state.items()}
    masks = {
        f'layers.{i}.blocks.{j}.attn_mask': block.attn_mask
        for i, stage in enumerate(theirs.model.layers)
        for j, block in enumerate(stage.blocks)
        if block.attn_mask is not None
    }
    assert len(masks) == (2 if window == 16 else 5)
    assert all(torch.equal(written[key], mask) for key, mask in masks.items())
    detector = {f'backbone.{k}': v for k, v in written.items() if 'head' not in k}
    assert not any('attn_mask' in key for key in convert(parse(detector), 'official')[0]['model'])


@pytest.mark.parametrize('version', [1, 2])
def test_version_size_and_windows_are_recognised(version):
    for library in ('official', 'timm', 'transformers'):
        contents = parse(classifier(library, version).state)
        told = version == 1 or library == 'official'
        assert str(contents.variant) == f'Swin-T V{version}'
        assert (contents.variant.in_channels, contents.variant.patch) == (3, 4)
        assert contents.windows() == ([(WINDOW[version],) * 2] * 4 if told else [None] * 4)
        assert contents.state['head.weight'].shape == (CLASSES, 768)
    small = swin_mm.SwinTransformer(**SMALL).state_dict()
    assert 'embed_dims=32, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8)' in str(parse(small).variant)


@pytest.mark.parametrize('windows', [(16, 16, 16, 8), (24, 24, 24, 12)])
@pytest.mark.parametrize('pretrained', [(0, 0, 0, 0), (12, 12, 12, 6)])
def test_pretraining_windows_are_read_from_v2_coordinate_tables(windows, pretrained):
    state = dict(classifier('timm', 2).state)
    for i, (w, p) in enumerate(zip(windows, pretrained, strict=True)):
        axis = torch.arange(1 - w, w) / ((p or w) - 1) * 8
        axis = axis.sign() * (axis.abs() + 1).log2() / 3
        table = torch.stack(torch.meshgrid(axis, axis, indexing='ij'), -1)[None]
        state[f'layers.{i}.blocks.0.attn.relative_coords_table'] = table
    assert parse(state).windows() == [(w, p or w) for w, p in zip(windows, pretrained, strict=True)]


RELATIVES = {
    'mixture of experts': {'layers.0.blocks.1.mlp._moe_layer.gates.0.wg.weight': torch.ones(1)},
    'Swin-Mixer': {'layers.0.blocks.0.spatial_mlp.weight': torch.ones(1)},
    'swinv2_cr': {'stages.0.blocks.0.attn.meta_mlp.fc1.weight': torch.ones(1)},
    'Video Swin': {'patch_embed.proj.weight': torch.ones(96, 3, 2, 4, 4)},
}


@pytest.mark.parametrize('relative', RELATIVES)
def test_related_architectures_are_rejected_by_name(relative):
    with pytest.raises(CheckpointError, match=relative):
        parse(swin_mm.SwinTransformer(**SMALL).state_dict() | RELATIVES[relative])
