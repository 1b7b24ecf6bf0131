"""Every naming and wrapping of the same weights gives the same model, with an account of it."""

import pytest
import torch
from oracles import SMALL, mmdet_twin, randomise
from torch import Tensor

import swin_mm
from swin_mm.checkpoints import CheckpointError, adapt
from swin_mm.checkpoints.loading import unwrap


@pytest.fixture(scope='module')
def model() -> swin_mm.SwinTransformer:
    return randomise(swin_mm.SwinTransformer(**SMALL))


def classifier(model: torch.nn.Module) -> dict[str, Tensor]:
    """The state as the official classifier repository publishes it, with all that it holds beside parameters."""
    state = {k: v.clone() for k, v in model.state_dict().items() if not k.startswith('norm')}
    state |= {'norm.weight': torch.rand(256), 'norm.bias': torch.rand(256)}
    state |= {'head.weight': torch.rand(1000, 256), 'head.bias': torch.rand(1000)}
    for stage in range(4):
        for block in range(2):
            state[f'layers.{stage}.blocks.{block}.attn.relative_position_index'] = torch.zeros(49, 49).long()
        if stage < 3:
            state[f'layers.{stage}.blocks.1.attn_mask'] = torch.zeros(64, 49, 49)
    return state


def same(state: dict[str, Tensor], expected: dict[str, Tensor]) -> bool:
    return state.keys() == expected.keys() and all(torch.equal(state[k], v) for k, v in expected.items())


@pytest.mark.parametrize('prefix', ['', 'backbone.', 'module.', 'module.backbone.', 'encoder.', 'model.backbone.'])
@pytest.mark.parametrize('naming', ['official', 'mmdet / mmseg'])
def test_prefixes_and_namings_are_recognised(model, naming, prefix):
    if naming == 'official':
        state, expected = model.state_dict(), model.state_dict()
    else:
        theirs, ours = mmdet_twin(**SMALL)
        state, expected = theirs.state_dict(), ours.state_dict()
    state = {prefix + k: v for k, v in state.items()} | {'head.fc.weight': torch.rand(3)}
    ours, report = adapt(state, model)
    assert same(ours, expected)
    assert (report.naming, report.prefix) == (naming, prefix)
    assert len(report.fitting) == len(expected)
    assert 'head.fc.weight' in report.dropped


def test_classifier_loads_strictly_with_its_leftovers_accounted_for(model):
    other = swin_mm.SwinTransformer(**SMALL)
    other.load_state_dict(classifier(model))
    loaded = other.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in model.state_dict().items() if not k.startswith('norm'))
    _, report = adapt(classifier(model), model)
    assert report.kept == [f'norm{i}.{kind}' for i in range(4) for kind in ('weight', 'bias')]
    reasons = list(report.dropped.values())
    assert [reasons.count(why) for why in dict.fromkeys(reasons)] == [2, 2, 11]
    assert '2 x classification head' in str(report)
    assert 'norm0.weight' in str(report)


def test_output_norms_missing_from_a_detector_are_reported(model):
    state = model.state_dict()
    del state['norm2.weight']
    with pytest.raises(RuntimeError, match='Missing key.*norm2.weight'):
        swin_mm.SwinTransformer(**SMALL).load_state_dict(state)


def test_parts_that_no_output_reads_are_dropped(model):
    partial = swin_mm.SwinTransformer(**SMALL, out_indices=(0, 1))
    partial.load_state_dict(model.state_dict())
    _, report = adapt(model.state_dict(), partial)
    dropped = {key for key, why in report.dropped.items() if why == 'no output of this model reads it'}
    assert dropped == model.state_dict().keys() - partial.state_dict().keys()


def test_unknown_keys_of_the_backbone_stay_for_strict_loading(model):
    state = model.state_dict() | {'layers.0.blocks.0.attn.extra': torch.rand(2)}
    with pytest.raises(RuntimeError, match='Unexpected key.*attn.extra'):
        swin_mm.SwinTransformer(**SMALL).load_state_dict(state)


def test_some_of_our_own_keys_load_alone(model):
    other = swin_mm.SwinTransformer(**SMALL)
    other.load_state_dict({'norm1.bias': torch.full((64,), 7.0)}, strict=False)
    assert (other.norm1.bias == 7).all()


@pytest.mark.parametrize('wrap', [lambda s: s, lambda s: {'model': s}, lambda s: {'state_dict': s, 'meta': {}}])
def test_wrappers_are_taken_off(model, wrap):
    assert unwrap(wrap(model.state_dict())).keys() == model.state_dict().keys()


@pytest.mark.parametrize('content', [None, [], {}, {'meta': {'epoch': 1}}, {'state_dict': {}}, torch.rand(3)])
def test_files_without_a_state_dict_are_refused(content):
    with pytest.raises(CheckpointError, match='no state dict'):
        unwrap(content)


def test_other_architectures_are_refused_by_name(model):
    with pytest.raises(CheckpointError, match=r'nothing in the checkpoint fits.*patch_embed.proj.weight.*layer1.0'):
        adapt({'layer1.0.conv1.weight': torch.rand(3)}, model)
    wide = swin_mm.SwinTransformer(**(SMALL | {'embed_dims': 64})).state_dict()
    with pytest.raises(
        CheckpointError, match=r'patch_embed.proj.weight is \(64, 3, 4, 4\).*needs \(32, 3, 4, 4\).*more'
    ):
        adapt(wide, model)


def test_resized_tables_are_told_and_rectangles_are_resized_to(model):
    other = swin_mm.SwinTransformer(**SMALL, window_size=(5, 9))
    ours, report = adapt(model.state_dict(), other)
    key = 'layers.0.blocks.0.attn.relative_position_bias_table'
    assert report.resized[key] == '(169, 1) -> (153, 1)'
    expected = torch.nn.functional.interpolate(model.state_dict()[key].view(1, 1, 13, 13), size=(9, 17), mode='bicubic')
    assert torch.equal(ours[key], expected.view(153, 1))
