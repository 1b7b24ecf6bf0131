"""Residual branches: stochastic depth, and the fused norms, which run in Triton's interpreter without a GPU."""

import copy

import pytest
import torch
from support.oracles import SMALL, randomise, relative_error
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from swin_mm import optimize_for_inference
from swin_mm.models import inference, residual, swin
from swin_mm.models.residual import DropPath, add_branch
from swin_mm.models.swin import SwinPyramid, SwinPyramidV2
from swin_mm.ops import fused_norm, verification

BOTH = pytest.mark.parametrize('pyramid', [SwinPyramid, SwinPyramidV2])
TINY = SMALL | dict(embed_dims=16, depths=(2, 1), num_heads=(1, 2), strides=(4, 2), window_size=4, out_indices=(0, 1))
IMAGE = torch.rand(2, 3, 36, 52, generator=torch.Generator().manual_seed(0))  # both maps are odd, and need padding


class Operators(TorchDispatchMode):
    """Counts operators of this package."""

    def __init__(self):
        super().__init__()
        self.names = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func.namespace == 'swin_mm':
            self.names.append(func.__name__.partition('.')[0])
        return func(*args, **(kwargs or {}))


@pytest.fixture
def interpreted(monkeypatch):
    """Take the paths for GPUs; Triton's interpreter runs the kernels."""
    if fused_norm.unsupported_reason(torch.device('cpu'), torch.float32, 16):
        pytest.skip('triton is not there to interpret the kernels')
    for module in (residual, swin, inference):
        monkeypatch.setattr(module, 'on_gpu', lambda x: True)
    verification.forget()


def used(model, image=IMAGE):
    with Operators() as operators:
        model(image)
    return {name: operators.names.count(name) for name in ('add_norm', 'norm_add', 'merge_norm')}


# Stochastic depth


def test_addition_and_stochastic_depth_in_one_pass():
    x, branch, drop = torch.randn(64, 3, 5), torch.randn(64, 3, 5), DropPath(0.25).train()
    torch.manual_seed(0)
    actual = add_branch(x, branch, drop)
    torch.manual_seed(0)
    torch.testing.assert_close(actual, x + drop(branch))
    dropped = (actual == x).all(2).all(1)
    assert 0 < dropped.sum() < 64
    torch.testing.assert_close(actual[~dropped], (x + branch / 0.75)[~dropped])
    assert torch.equal(add_branch(x, branch, drop.eval()), x + branch)


@pytest.mark.parametrize('kind', ['hook', 'replaced', 'subclass', 'types'])
def test_stochastic_depth_is_called_as_a_module_where_that_can_be_seen(kind):
    class Doubled(DropPath):
        def forward(self, x):
            return 2 * x

    x, branch = torch.randn(2, 3), torch.randn(2, 3)
    drop: nn.Module = {'replaced': nn.Tanh(), 'subclass': Doubled(0.5)}.get(kind, DropPath(0.5))
    if kind == 'hook':
        drop.eval().register_forward_hook(lambda module, inputs, output: 3 * output)
    if kind == 'types':
        out = add_branch(x.double(), branch, drop.eval())
        assert out.dtype == torch.float64
        return torch.testing.assert_close(out, x.double() + branch)
    expected = {'hook': x + 3 * branch, 'replaced': x + branch.tanh(), 'subclass': x + 2 * branch}
    torch.testing.assert_close(add_branch(x, branch, drop), expected[kind])


# Fused norms in training


def gradients(model, image=IMAGE):
    torch.manual_seed(1)  # the same samples are dropped
    maps = model(image)
    assert all(m.is_contiguous() for m in maps)
    sum((m**3).mean() for m in maps).backward()
    return [*(m.detach() for m in maps), *(p.grad for p in model.parameters())]


@BOTH
@pytest.mark.parametrize('rate', [0.0, 0.5])
def test_fused_training_equals_plain_training(pyramid, rate, interpreted):
    options = TINY | dict(drop_path_rate=rate, drop_rate=rate / 5)
    plain, fused = (randomise(pyramid(**options, fused_norm=on)).train() for on in (False, True))
    actual = gradients(fused)
    exact = gradients(copy.deepcopy(plain).double(), IMAGE.double()) if not rate else gradients(plain)
    assert relative_error(actual, [e.float() for e in exact]) < 1e-4
    counts = used(fused)
    assert sum(used(plain).values()) == 0
    # V1: two norms in each of 3 blocks, that of the patches, and those of both outputs.
    assert counts == dict(add_norm=3 * 2 + 3, norm_add=0, merge_norm=1) or pyramid is SwinPyramidV2
    assert counts == dict(add_norm=3, norm_add=3 * 2, merge_norm=0) or pyramid is SwinPyramid


@BOTH
def test_hooks_and_replaced_modules_are_called(pyramid, interpreted):
    """What is not plain is called as in the ordinary model, and the rest stays fused."""
    fused, plain = (randomise(pyramid(**TINY, fused_norm=on)).eval() for on in (True, False))
    calls = []
    for model in (fused, plain):
        names = [n for n, _ in model.named_modules() if n.endswith(('norm1', 'drop_path1', 'mlp', 'blocks.0'))]
        for name in names:
            model.get_submodule(name).register_forward_hook(
                lambda module, inputs, output, name=name: calls.append(name) or output * 1.25
            )
        model.layers[1].blocks[0].norm2 = nn.Sequential(nn.LayerNorm(32), nn.Tanh())
        nn.utils.parametrizations.weight_norm(model.layers[0].blocks[1].norm2, dim=None)
        randomise(model)
    with torch.no_grad():
        actual = fused(IMAGE)
        seen, calls[:] = calls[:], []
        expected = plain(IMAGE)
    assert sorted(seen) == sorted(calls) and len(seen) > 8
    assert relative_error(actual, expected) < 1e-5


@BOTH
def test_with_checkpointing_blocks_are_not_chained(pyramid, interpreted):
    plain, fused = (randomise(pyramid(**TINY, with_cp=True, fused_norm=on)).train() for on in (False, True))
    assert relative_error(gradients(fused), gradients(plain)) < 1e-4


@BOTH
def test_float64_and_transforms_use_plain_operators(pyramid, interpreted):
    model = randomise(pyramid(**TINY, fused_norm=True)).double().eval()
    assert sum(used(model, IMAGE.double()).values()) == 0
    _, tangents = torch.func.jvp(model.float(), (IMAGE,), (IMAGE,))
    assert all(t.isfinite().all() for t in tangents)


def test_untrusted_kernels_are_not_used(interpreted, monkeypatch):
    monkeypatch.setattr(residual.fused_norm, 'is_trusted', lambda *_: False)
    plain, fused = (randomise(SwinPyramid(**TINY, fused_norm=on)).eval() for on in (False, True))
    with torch.no_grad():
        assert sum(used(fused).values()) == 0
        assert relative_error(fused(IMAGE), plain(IMAGE)) < 1e-6


def test_without_a_gpu_the_option_changes_nothing():
    model = randomise(SwinPyramid(**TINY, fused_norm=True))
    assert sum(used(model).values()) == 0


def test_lower_precision(interpreted):
    model = randomise(SwinPyramid(**TINY, fused_norm=True)).eval()
    with torch.no_grad():
        expected = randomise(SwinPyramid(**TINY)).eval()(IMAGE)
        assert relative_error(model.bfloat16()(IMAGE.bfloat16()), expected) < 6e-2


# Fused norms in the frozen form


@BOTH
@pytest.mark.parametrize('options', [{}, dict(out_indices=(1,)), dict(patch_norm=False), dict(use_abs_pos_embed=True)])
def test_frozen_form_equals_the_plain_model(pyramid, options, interpreted):
    model = randomise(pyramid(**TINY | options)).eval()
    frozen = optimize_for_inference(model)
    with torch.no_grad():
        assert relative_error(frozen(IMAGE), model(IMAGE)) < 2e-5
    counts = used(frozen)
    outputs = 1 if 'out_indices' in options else 2
    if pyramid is SwinPyramid:
        patches, merging = (0, 0) if 'patch_norm' in options else (1, 1)
        assert counts == dict(add_norm=3 * 2 + outputs + patches, norm_add=0, merge_norm=merging)
    else:
        assert counts == dict(add_norm=outputs + ('patch_norm' not in options), norm_add=3 * 2, merge_norm=0)


def test_frozen_form_with_unknown_blocks(interpreted):
    model = randomise(SwinPyramid(**TINY)).eval()
    model.layers[0].blocks[1].mlp = nn.Sequential(nn.Linear(16, 16), nn.Tanh())
    with torch.no_grad():
        assert relative_error(optimize_for_inference(model)(IMAGE), model(IMAGE)) < 1e-5


def test_gelu_in_the_epilogue_of_a_product(interpreted, monkeypatch):
    """The tanh approximation, in 16 bits only; without the private operator, the exact function."""
    monkeypatch.setattr(inference, '_onednn_supports', lambda *_: False)
    layer, x = nn.Linear(32, 64), torch.randn(2, 3, 5, 32)
    exact = nn.functional.gelu(layer(x).double())
    packed = inference.PackedLinear.of(layer)
    calls = []
    private = torch._addmm_activation
    monkeypatch.setattr(torch, '_addmm_activation', lambda *a, **k: calls.append(0) or private(*a, **k))
    with torch.no_grad():
        assert relative_error([packed(x, gelu=True)], [exact]) < 1e-6 and not calls
        assert relative_error([packed(x.bfloat16(), gelu=True)], [exact]) < 2e-2 and calls
        monkeypatch.delattr(torch, '_addmm_activation')
        assert relative_error([packed(x.bfloat16(), gelu=True)], [exact]) < 2e-2 and len(calls) == 1
