"""Every naming and wrapping of the same weights gives the same model, with an account of it."""

import pytest
import torch
from support.oracles import SMALL, mmdet_twin, randomise
from support.reference_models import reference
from torch import Tensor

import swin_mm
from swin_mm.checkpoints import CheckpointError, adapt, parse, unwrap


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
    state = {prefix + k: v for k, v in state.items()} | {'head.weight' if prefix else 'norm.weight': torch.rand(3)}
    ours, report = adapt(state, model)
    assert same(ours, expected)
    assert (report.naming, report.prefix) == (naming, prefix)
    assert set(report.loaded) == expected.keys()
    assert len(report.dropped) == 1


def test_classifier_loads_strictly_with_its_leftovers_accounted_for(model):
    other = swin_mm.SwinTransformer(**SMALL)
    other.load_state_dict(classifier(model))
    loaded = other.state_dict()
    assert all(torch.equal(loaded[k], v) for k, v in model.state_dict().items() if not k.startswith('norm'))
    report = other.load_report
    assert report.complete and not report.converted
    assert report.new == [f'norm{i}.{kind}' for i in range(4) for kind in ('weight', 'bias')]
    assert len(report.loaded) == len(loaded) - 8
    assert len(report.rebuilt) == 11
    assert list(report.dropped.items()) == [
        ('norm.weight', "classifier's last norm"),
        ('norm.bias', "classifier's last norm"),
        ('head.weight', 'classification head'),
        ('head.bias', 'classification head'),
    ]
    assert str(report).splitlines() == [
        'Swin weights, official naming:',
        '  loaded                              117',
        '  rebuilt                              11  index tables and masks, computed from the sizes',
        "  not needed: classifier's last norm    2",
        '  not needed: classification head       2',
        '  new                                   8  output norms, which classifiers lack; they stay as initialised',
    ]


def test_a_model_with_only_the_last_output_takes_a_classifiers_norm(model):
    state = classifier(model)
    last = swin_mm.SwinTransformer(**SMALL, out_indices=(3,))
    last.load_state_dict(state)
    assert torch.equal(last.norm3.weight, state['norm.weight'])
    assert not last.load_report.new and not last.load_report.missing
    # Two stages of it end elsewhere.
    early = swin_mm.SwinTransformer(**SMALL, out_indices=(1,))
    early.load_state_dict(state)
    assert early.load_report.new == ['norm1.weight', 'norm1.bias']


def test_output_norms_missing_from_a_detector_are_reported(model):
    state = model.state_dict()
    del state['norm2.weight']
    with pytest.raises(RuntimeError, match='Missing key.*"norm2.weight"'):
        swin_mm.SwinTransformer(**SMALL).load_state_dict(state)
    with pytest.raises(CheckpointError, match='norm2.weight is missing'):
        adapt(state, model)


def test_parts_that_no_output_reads_are_dropped(model):
    partial = swin_mm.SwinTransformer(**SMALL, out_indices=(0, 1))
    partial.load_state_dict(model.state_dict())
    _, report = adapt(model.state_dict(), partial)
    dropped = {key for key, why in report.dropped.items() if why == 'no output of this model reads it'}
    assert dropped == model.state_dict().keys() - partial.state_dict().keys()


def test_unknown_keys_of_the_backbone_are_refused(model):
    state = model.state_dict() | {'layers.0.blocks.0.attn.extra': torch.rand(2)}
    with pytest.raises(RuntimeError, match='Unexpected key.*"layers.0.blocks.0.attn.extra"'):
        swin_mm.SwinTransformer(**SMALL).load_state_dict(state)
    with pytest.raises(CheckpointError, match='layers.0.blocks.0.attn.extra is not in the model'):
        adapt(state, model)
    result = swin_mm.SwinTransformer(**SMALL).load_state_dict(state, strict=False)
    assert result.unexpected_keys == ['layers.0.blocks.0.attn.extra']


def test_query_without_key_and_value_counts_as_missing_qkv():
    state = {k.replace('qkv', 'query'): v for k, v in swin_mm.SwinTransformer(**SMALL).state_dict().items()}
    with pytest.raises(CheckpointError, match=r'layers.0.blocks.0.attn.qkv.weight is missing'):
        adapt(state, swin_mm.SwinTransformer(**SMALL))


def test_part_of_our_own_keys_loads(model):
    other = swin_mm.SwinTransformer(**SMALL)
    other.load_state_dict({'norm1.bias': torch.full((64,), 7.0)}, strict=False)
    assert (other.norm1.bias == 7).all()


@pytest.mark.parametrize('wrap', [lambda s: s, lambda s: {'model': s}, lambda s: {'state_dict': s, 'meta': {}}])
def test_state_dicts_are_unwrapped(model, wrap):
    assert unwrap(wrap(model.state_dict())).keys() == model.state_dict().keys()


@pytest.mark.parametrize('content', [None, [], {}, {'meta': {'epoch': 1}}, {'state_dict': {}}, torch.rand(3)])
def test_files_without_a_state_dict_are_refused(content):
    with pytest.raises(CheckpointError, match='no state dict'):
        unwrap(content)


def test_other_architectures_are_refused_with_what_to_do(model):
    with pytest.raises(CheckpointError, match=r'nothing in the checkpoint fits.*patch_embed.proj.weight.*layer1.0'):
        adapt({'layer1.0.conv1.weight': torch.rand(3)}, model)
    vit = {'patch_embed.proj.weight': torch.rand(32, 3, 16, 16), 'blocks.0.attn.qkv.weight': torch.rand(96, 32)}
    with pytest.raises(CheckpointError, match='nothing in the checkpoint fits'):
        adapt(vit, model)
    wide = swin_mm.SwinTransformer(**(SMALL | {'embed_dims': 64})).state_dict()
    with pytest.raises(
        CheckpointError,
        match=r'of a Swin V1 with embed_dims=64.*model is a Swin V1 with embed_dims=32.*'
        r'patch_embed.proj.weight is \(64, 3, 4, 4\), the model has \(32, 3, 4, 4\).*more\).*its embed_dims',
    ):
        adapt(wide, model)


def test_unrelated_checkpoints_raise_even_with_strict_false(model):
    other = swin_mm.SwinTransformer(embed_dims=48, depths=(2, 2), num_heads=(3, 6), strides=(4, 2), out_indices=(0, 1))
    with pytest.raises(CheckpointError, match='of a Swin V1 with embed_dims=48'):
        model.load_state_dict(other.state_dict(), strict=False)


def test_published_sizes_are_distinguished():
    with torch.device('meta'):
        small, large = swin_mm.SwinTransformer(arch='t'), swin_mm.SwinTransformer(arch='s')
        second = swin_mm.SwinTransformerV2(arch='t')
    # Every tensor of a Swin-T fits a Swin-S and the other way round: what is left over tells.
    with pytest.raises(CheckpointError, match=r"is of a Swin-S V1, the model is a Swin-T V1: .*blocks.6.*arch='s'"):
        adapt(large.state_dict(), small)
    with pytest.raises(CheckpointError, match=r"is of a Swin-T V1, the model is a Swin-S V1: .*blocks.6.*arch='t'"):
        adapt(small.state_dict(), large)
    with pytest.raises(CheckpointError, match=r"is of a Swin-T V2.*a Swin-T V1: .*SwinTransformerV2' and arch='t'"):
        adapt(second.state_dict(), small)


def test_nothing_is_dropped_silently_with_strict_false(model):
    state = model.state_dict()
    del state['layers.1.blocks.0.mlp.fc1.bias']
    state['layers.1.blocks.0.mlp.fc2.bias'] = torch.rand(3)
    with pytest.raises(CheckpointError, match=r'fc2.bias is \(3,\), the model has \(64,\); .*fc1.bias is missing'):
        adapt(state, model)
    other = swin_mm.SwinTransformer(**SMALL)
    kept = other.state_dict()['layers.1.blocks.0.mlp.fc2.bias'].clone()
    result = other.load_state_dict(state, strict=False)
    assert set(result.missing_keys) == {f'layers.1.blocks.0.mlp.fc{i}.bias' for i in (1, 2)}
    report = other.load_report
    assert report.missing == ['layers.1.blocks.0.mlp.fc1.bias']
    assert report.wrong_shape == {'layers.1.blocks.0.mlp.fc2.bias': 'is (3,), the model has (64,)'}
    assert not report.complete and 'MISSING' in str(report) and 'WRONG SHAPE' in str(report)
    assert torch.equal(other.layers[1].blocks[0].mlp.fc2.bias, kept)
    assert torch.equal(other.layers[1].blocks[1].mlp.fc1.bias, model.layers[1].blocks[1].mlp.fc1.bias)


TABLE = 'layers.0.blocks.0.attn.relative_position_bias_table'


@pytest.mark.parametrize('window', [(5, 9), (12, 12)])
def test_tables_are_resized_bicubically_to_any_window(model, window):
    ours, report = adapt(model.state_dict(), swin_mm.SwinTransformer(**SMALL, window_size=window))
    size = (2 * window[0] - 1, 2 * window[1] - 1)
    assert report.resized[TABLE] == f'(169, 1) -> ({size[0] * size[1]}, 1)'
    table = model.state_dict()[TABLE].view(1, 1, 13, 13)
    expected = torch.nn.functional.interpolate(table, size=size, mode='bicubic')
    assert torch.equal(ours[TABLE], expected.view(-1, 1))


def test_rectangular_tables_fit_only_their_own_window():
    wide = randomise(swin_mm.SwinTransformer(**SMALL, window_size=(5, 9)))
    same_window = swin_mm.SwinTransformer(**SMALL, window_size=(5, 9))
    same_window.load_state_dict(wide.state_dict())
    assert torch.equal(same_window.state_dict()[TABLE], wide.state_dict()[TABLE])
    with pytest.raises(CheckpointError, match=r'table is \(153, 1\), the model has \(169, 1\)'):
        adapt(wide.state_dict(), swin_mm.SwinTransformer(**SMALL))


def test_position_embeddings_are_resized(model):
    options = SMALL | {'use_abs_pos_embed': True}
    old = randomise(swin_mm.SwinTransformer(**options, pretrain_img_size=64))
    ours, report = adapt(old.state_dict(), swin_mm.SwinTransformer(**options, pretrain_img_size=(96, 128)))
    assert report.resized == {'absolute_pos_embed': '(1, 32, 16, 16) -> (1, 32, 24, 32)'}
    expected = torch.nn.functional.interpolate(old.absolute_pos_embed, size=(24, 32), mode='bicubic')
    assert torch.equal(ours['absolute_pos_embed'], expected)
    # A file with the tokens in a row, as classifiers have it.
    state = old.state_dict() | {'absolute_pos_embed': old.absolute_pos_embed.detach().flatten(2).transpose(1, 2)}
    ours, report = adapt(state, old)
    assert torch.equal(ours['absolute_pos_embed'], old.absolute_pos_embed)
    assert not report.resized


def test_flat_position_embeddings_take_the_grid_of_the_model():
    """9 x 16 positions are as many as 12 x 12."""
    options = SMALL | {'use_abs_pos_embed': True}
    old = randomise(swin_mm.SwinTransformer(**options, pretrain_img_size=(36, 64)))
    flat = old.absolute_pos_embed.detach().flatten(2).transpose(1, 2)
    ours, report = adapt(old.state_dict() | {'absolute_pos_embed': flat}, old)
    assert torch.equal(ours['absolute_pos_embed'], old.absolute_pos_embed)
    assert not report.resized and 'absolute_pos_embed' in report.converted
    square = swin_mm.SwinTransformer(**options, pretrain_img_size=64)
    with pytest.raises(CheckpointError, match='120 positions, which is not a square number'):
        adapt(old.state_dict() | {'absolute_pos_embed': flat[:, :120]}, square)


def embedded(model: torch.nn.Module, image: Tensor) -> Tensor:
    with torch.no_grad():
        return model.patch_embed.proj(image)


def test_patches_of_other_channels_see_grey_images_alike(model):
    grey = torch.rand(2, 1, 16, 16)
    expected = embedded(model, grey.expand(-1, 3, -1, -1))
    for channels in (1, 3, 6):
        other = swin_mm.SwinTransformer(**SMALL, in_channels=channels)
        other.load_state_dict(model.state_dict())
        torch.testing.assert_close(embedded(other, grey.expand(-1, channels, -1, -1)), expected)
        assert ('patch_embed.proj.weight' in other.load_report.resized) == (channels != 3)
    other = swin_mm.SwinTransformer(**SMALL, in_channels=4)
    other.load_state_dict(model.state_dict())
    weight = model.patch_embed.proj.weight
    assert torch.equal(other.patch_embed.proj.weight, torch.cat([weight, weight[:, :1]], 1) * 0.75)


def test_larger_patches_embed_enlarged_patches_alike(model):
    image = torch.rand(2, 3, 4, 4)
    other = swin_mm.SwinTransformer(**SMALL, patch_size=8, strides=(8, 2, 2, 2))
    other.load_state_dict(model.state_dict())
    enlarged = torch.nn.functional.interpolate(image, size=(8, 8), mode='bicubic')
    torch.testing.assert_close(embedded(other, enlarged), embedded(model, image), rtol=1e-4, atol=1e-4)
    smaller = swin_mm.SwinTransformer(**SMALL, patch_size=2, strides=(2, 2, 2, 2))
    smaller.load_state_dict(model.state_dict())
    even = torch.ones(1, 3, 4, 4)
    torch.testing.assert_close(embedded(smaller, even[..., :2, :2]), embedded(model, even), rtol=0.1, atol=0.1)


def test_differing_v2_windows_give_a_note():
    theirs = reference('official', 2, 't', 8, 256)
    other = swin_mm.SwinTransformerV2(arch='t', window_size=16)
    other.load_state_dict(theirs.state)
    (note,) = other.load_report.notes
    assert 'trained with windows [(8, 8), (8, 8), (8, 8), (8, 8)], this model uses it as of windows [(16, 16),' in note
    assert 'set pretrained_window_sizes=(8, 8, 8, 8)' in note
    told = swin_mm.SwinTransformerV2(arch='t', window_size=16, pretrained_window_sizes=(8, 8, 8, 8))
    told.load_state_dict(theirs.state)
    assert not told.load_report.notes


def test_heads_with_a_scale_of_their_own_do_not_make_a_version_2():
    theirs, ours = mmdet_twin(**SMALL)
    state = {f'backbone.{key}': value for key, value in theirs.state_dict().items()}
    state |= {'bbox_head.logit_scale': torch.ones(1), 'other.layers.0.blocks.0.x': torch.ones(1)}
    adapted, report = adapt(state, ours)
    assert same(adapted, ours.state_dict())
    assert len(report.dropped) == 2


def test_files_that_give_one_parameter_twice_are_refused(model):
    state = {f'backbone.{key}': value for key, value in mmdet_twin(**SMALL)[0].state_dict().items()}
    state['backbone.layers.0.blocks.0.norm1.weight'] = torch.ones(32)
    with pytest.raises(CheckpointError, match='both name layers.0.blocks.0.norm1.weight: the file mixes namings'):
        adapt(state, model)


def test_state_of_a_model_with_one_output_loads_into_one_with_four(model):
    last = randomise(swin_mm.SwinTransformer(**SMALL, out_indices=(3,)))
    ours, report = adapt(last.state_dict(), model)
    assert torch.equal(ours['norm3.weight'], last.norm3.weight)
    assert len(report.new) == 6


@pytest.mark.parametrize('state', [{}, {'layers.0.blocks.0.norm1.bias': torch.full((32,), 7.0)}])
def test_partial_states_load_with_strict_false(model, state):
    other = swin_mm.SwinTransformer(**SMALL)
    result = other.load_state_dict(state, strict=False)
    assert len(result.missing_keys) == len(model.state_dict()) - len(state)
    assert not result.unexpected_keys
    assert (other.layers[0].blocks[0].norm1.bias == 7).all() == bool(state)
    with pytest.raises(RuntimeError):
        other.load_state_dict(state)


@pytest.mark.parametrize('dtype', [torch.float16, torch.bfloat16])
def test_low_precision_weights_are_resized_in_fp32(model, dtype):
    state = {key: value.to(dtype) for key, value in model.state_dict().items()}
    larger = swin_mm.SwinTransformer(**SMALL, window_size=12)
    low, _ = adapt(state, larger)
    full, _ = adapt({key: value.float() for key, value in state.items()}, larger)
    assert torch.equal(low[TABLE], full[TABLE])


def test_malformed_states_raise_one_clear_error(model):
    around: dict = {'w': torch.ones(1)}
    around['model'] = around
    assert unwrap(around).keys() == {'w', 'model'}
    for state in (
        {'patch_embed.proj.weight': torch.rand(32, 3, 4, 4), 'decoder.layers.0.blocks.0.x': torch.ones(1)},
        {key: value.numpy() for key, value in model.state_dict().items()},
    ):
        with pytest.raises(CheckpointError):
            adapt(state, model)
    # Without numbers (a file inspected on the meta device), or with useless ones, V2's tables tell nothing.
    theirs = dict(reference('official', 2, 't', 8, 256).state)
    key = 'layers.0.blocks.0.attn.relative_coords_table'
    for table in (torch.zeros_like(theirs[key]), theirs[key].to('meta')):
        assert parse(theirs | {key: table}).windows()[0] == (8, 8)


@pytest.mark.parametrize('dtype', [torch.int8, torch.bool, torch.int64, torch.complex64])
def test_weights_must_be_floating_point(model, dtype):
    """Quantised or damaged files would load as numbers without meaning."""
    state = {key: value.to(dtype) for key, value in model.state_dict().items()}
    name = str(dtype).removeprefix('torch.')
    with pytest.raises(CheckpointError, match=f'patch_embed.proj.weight is {name}, expected floating point'):
        swin_mm.SwinTransformer(**SMALL).load_state_dict(state, strict=False)
    one = model.state_dict() | {'norm1.weight': state['norm1.weight']}
    ours, report = adapt(one, model, strict=False)
    assert 'norm1.weight' not in ours and not report.complete and 'UNUSABLE' in str(report)


@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_non_finite_weights_give_a_warning(model, value):
    state = model.state_dict() | {'norm1.weight': torch.full((64,), value)}
    _, report = adapt(state, model)
    assert report.notes == ['WARNING: 1 of the parameters have NaN or infinite values: norm1.weight']
    assert 'NaN' in str(report)
