"""The frozen copy equals the plain model, and changes that would make it outdated raise."""

import copy
import pickle

import pytest
import torch
from mmengine.registry import MODELS, init_default_scope
from support.oracles import SMALL, mmdet_twin, randomise, relative_error
from torch import nn
from torch.nn.utils import prune

import swin_mm
from swin_mm import optimize_for_inference
from swin_mm.models import inference
from swin_mm.models.inference import FrozenSwin, PackedLinear, TiledBlock, tiles
from swin_mm.models.swin import SwinPyramid, SwinPyramidV2

BOTH = pytest.mark.parametrize('pyramid', [SwinPyramid, SwinPyramidV2])


def small(pyramid=SwinPyramid, **options):
    return randomise(pyramid(**SMALL | options)).eval()


@BOTH
@pytest.mark.parametrize('pad_small_map', [True, False])
@pytest.mark.parametrize('size', [(130, 97), (64, 90), (30, 200), (12, 9)])
def test_equals_the_plain_model_in_float64(pyramid, pad_small_map, size, monkeypatch):
    monkeypatch.setattr(inference, 'TILE_TOKENS', 200)  # several tiles, also across images
    model = small(pyramid, pad_small_map=pad_small_map).double()
    image = torch.randn(5, 3, *size, dtype=torch.float64)
    with torch.no_grad():
        assert relative_error(optimize_for_inference(model)(image), model(image)) < 1e-12


@BOTH
@pytest.mark.parametrize('dtype, limit', [(torch.float32, 1e-5), (torch.bfloat16, 4e-2)])
def test_equals_the_definition(pyramid, dtype, limit):
    model = small(pyramid)
    exact = small(pyramid, attention='reference').double()
    image = torch.rand(2, 3, 250, 333)
    with torch.no_grad():
        expected = exact(image.double())
        frozen = optimize_for_inference(model.to(dtype))
        maps = frozen(image.to(dtype))
        assert all(m.dtype == dtype for m in maps)
        assert relative_error(maps, expected) < limit
        assert all(torch.equal(a, b) for a, b in zip(frozen(image.to(dtype)), maps, strict=True))


@BOTH
def test_autocast(pyramid):
    model = small(pyramid)
    image = torch.rand(1, 3, 130, 97)
    with torch.no_grad(), torch.autocast('cpu', torch.bfloat16):
        expected, actual = model(image), optimize_for_inference(model)(image)
    assert [m.dtype for m in actual] == [m.dtype for m in expected]
    assert relative_error(actual, expected) < 4e-2


def test_equals_mmdet():
    theirs, ours = mmdet_twin(**SMALL)
    image = torch.rand(1, 3, 250, 333)
    with torch.no_grad():
        assert relative_error(optimize_for_inference(ours)(image), theirs(image)) < 2e-5


def test_without_onednn_operators(monkeypatch):
    """They are private to PyTorch: if they are missing or have changed, F.linear is used."""
    model, image = small(), torch.rand(1, 3, 130, 97)
    with torch.no_grad():
        expected = model(image)
        monkeypatch.setattr(torch.ops, 'mkldnn', None)
        inference.find_mkldnn.cache_clear()
        frozen = optimize_for_inference(model)
        assert relative_error(frozen(image), expected) < 1e-5
        assert inference.find_mkldnn() is None
    monkeypatch.undo()
    inference.find_mkldnn.cache_clear()


def test_private_onednn_operators_exist():
    if not torch.backends.mkldnn.is_available():
        pytest.skip('this build of PyTorch has no oneDNN')
    assert inference.find_mkldnn() is not None


@BOTH
def test_the_original_model_is_not_changed(pyramid):
    model, image = small(pyramid).train(), torch.rand(1, 3, 60, 90)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    frozen = optimize_for_inference(model)
    with torch.no_grad():
        expected = frozen(image)
        assert model.training and all(p.requires_grad for p in model.parameters())
        randomise(model, seed=3)
        assert all(torch.equal(a, b) for a, b in zip(frozen(image), expected, strict=True))
    assert before.keys() == model.state_dict().keys()
    model(image)[0].sum().backward()


FORBIDDEN = {
    'train': lambda model: model.train(),
    'load_state_dict': lambda model: model.load_state_dict({}, strict=False),
    'state_dict': lambda model: model.state_dict(),
    'half': lambda model: model.half(),
    'to dtype': lambda model: model.to(torch.float64),
    'to device': lambda model: model.to('meta'),
}


@pytest.mark.parametrize('what', FORBIDDEN)
@pytest.mark.parametrize('whole', [False, True])
def test_changes_to_a_frozen_model_raise(what, whole):
    model = nn.Sequential(small(), nn.Identity()) if whole else small()
    frozen = optimize_for_inference(model)
    with pytest.raises(RuntimeError, match='from optimize_for_inference cannot .* call optimize_for_inference again'):
        FORBIDDEN[what](frozen)


def test_has_no_parameters_to_write_to_and_gives_no_gradients():
    frozen = optimize_for_inference(small())
    assert [*frozen.parameters()] == [*frozen.buffers()] == []
    with pytest.raises(RuntimeError, match='cannot give gradients'):
        frozen(torch.rand(1, 3, 60, 90, requires_grad=True))
    assert not frozen(torch.rand(1, 3, 60, 90))[0].requires_grad
    frozen.eval().to('cpu').float()  # nothing changes


def test_whole_models_keep_their_other_parts():
    init_default_scope('mmdet')
    backbone = dict(type='swin_mm.SwinTransformer', **SMALL, out_indices=(1, 2, 3))
    neck = dict(type='FPN', in_channels=[64, 128, 256], out_channels=16, num_outs=4)
    head = dict(type='RetinaHead', num_classes=3, in_channels=16, feat_channels=16, stacked_convs=1)
    head |= dict(anchor_generator=dict(type='AnchorGenerator', ratios=[1.0], scales=[8], strides=[8, 16, 32, 64]))
    model = MODELS.build(dict(type='RetinaNet', backbone=backbone, neck=neck, bbox_head=head)).eval()
    frozen = optimize_for_inference(model)
    assert isinstance(frozen.backbone, FrozenSwin) and isinstance(model.backbone, swin_mm.SwinTransformer)
    assert not frozen.training and not any(p.requires_grad for p in frozen.parameters())
    image = torch.rand(1, 3, 120, 150)
    with torch.no_grad():
        for actual, expected in zip(frozen(image), model(image), strict=True):
            assert relative_error(actual, expected) < 1e-5


def test_models_without_our_backbone_are_refused():
    with pytest.raises(TypeError, match='Linear contains no Swin backbone'):
        optimize_for_inference(nn.Linear(2, 2))


def test_hooks_are_refused():
    model = small()
    handle = model.layers[0].blocks[1].mlp.fc1.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match=r'layers.0.blocks.1.mlp.fc1 has hooks'):
        optimize_for_inference(nn.Sequential(model))
    handle.remove()
    optimize_for_inference(model)
    prune.l1_unstructured(model.layers[1].blocks[0].attn.qkv, 'weight', 0.3)
    with pytest.raises(ValueError, match=r'layers.1.blocks.0.attn.qkv has hooks'):
        optimize_for_inference(model)


def test_unknown_parts_are_not_optimised():
    """Replaced layers are called; a block is optimised only if all of its parts are known."""

    class Mean(nn.Module):  # looks across tokens: tiles would change the result
        def forward(self, x):
            return x.mean((1, 2), keepdim=True).expand_as(x)

    model = small()
    model.layers[0].blocks[0].mlp = Mean()
    model.layers[0].blocks[1].norm1 = nn.Sequential(nn.LayerNorm(32), nn.Tanh())
    model = torch.ao.quantization.quantize_dynamic(model, {'layers.1.blocks.0.mlp.fc1'})
    nn.utils.parametrizations.weight_norm(model.layers[2].blocks[0].attn.qkv)
    image = torch.rand(1, 3, 512, 400)
    with torch.no_grad():
        assert relative_error(optimize_for_inference(model)(image), model(image)) < 1e-5


@pytest.mark.parametrize('act', [nn.ReLU, lambda: nn.GELU(approximate='tanh')])
def test_other_activations_are_not_taken_for_gelu(act):
    model, image = small(act=act), torch.rand(1, 3, 60, 90)
    with torch.no_grad():
        assert relative_error(optimize_for_inference(model)(image), model(image)) < 1e-5


def test_copies_and_pickles():
    frozen, image = optimize_for_inference(small()), torch.rand(1, 3, 60, 90)
    expected = frozen(image)
    for twin in (copy.deepcopy(frozen), pickle.loads(pickle.dumps(frozen))):
        assert all(torch.equal(a, b) for a, b in zip(twin(image), expected, strict=True))


def test_traced_and_compiled_code_uses_plain_operators():
    frozen, image = optimize_for_inference(small()), torch.rand(1, 3, 60, 90)
    expected = frozen(image)
    compiled = torch.compile(frozen, backend='aot_eager')
    assert relative_error(compiled(image), expected) < 1e-5
    traced = torch.jit.trace(frozen, image, check_trace=False)
    assert relative_error(traced(image), expected) < 1e-5


@pytest.mark.parametrize('height', [3, 7, 14, 15, 20, 41])
@pytest.mark.parametrize('window, shift', [(7, 0), (7, 3), (4, 2), (1, 0)])
def test_tiles_cover_each_row_once_in_whole_windows(height, window, shift):
    for count in (1, 2, 100):
        parts = [rows for rows, _ in tiles(height, window, shift, count)]
        assert sorted(i for rows in parts for r in rows for i in range(r.start, r.stop)) == list(range(height))
        assert all(sum(r.stop - r.start for r in rows) <= max(count, 2) * window for rows in parts)


def test_every_linear_layer_of_an_ordinary_model_is_packed():
    frozen = optimize_for_inference(small())
    blocks = [block for stage in frozen.backbone.layers for block in stage.blocks]
    assert all(type(block) is TiledBlock for block in blocks)
    assert not any(isinstance(m, nn.Linear) for m in frozen.backbone.modules())
    assert sum(isinstance(m, PackedLinear) for m in frozen.backbone.modules()) == 4 * 8 + 3 + 1
