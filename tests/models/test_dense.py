"""Linear layers and MLPs: the same numbers as PyTorch's, whichever way they are computed."""

import pytest
import torch
from torch import nn

from swin_mm.models import dense
from swin_mm.models.dense import Linear, Mlp

TOKENS = 50
GRADS = pytest.mark.parametrize('grad', [True, False])
TYPES = pytest.mark.parametrize(
    'dtype, limit', [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 1e-2)]
)


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    monkeypatch.setattr(dense, 'CHUNK', 16)  # several, and a part of one


def error(actual, expected):
    return ((actual.double() - expected).abs().max() / expected.abs().max()).item()


@GRADS
@TYPES
@pytest.mark.parametrize('bias', [True, False])
def test_linear_equals_pytorch(dtype, limit, bias, grad):
    layer = Linear(24, 40, bias=bias).to(dtype).eval()
    x = torch.randn(2, 25, 24, dtype=dtype, requires_grad=grad)
    weights = [x, *layer.parameters()]
    double = [w.detach().double().requires_grad_() for w in weights]
    expected = nn.functional.linear(*double)
    with torch.set_grad_enabled(grad):
        out = layer(x)
    assert out.dtype == dtype and error(out, expected) < limit
    if grad:
        g = torch.randn_like(out)
        theirs = torch.autograd.grad(expected, double, g.double())
        for a, e in zip(torch.autograd.grad(out, weights, g), theirs, strict=True):
            assert error(a, e) < limit


@GRADS
@TYPES
def test_mlp_equals_pytorch(dtype, limit, grad):
    mlp = Mlp(24, 40, nn.GELU, drop=0.0).to(dtype).eval()
    x = torch.randn(2, TOKENS // 2, 24, dtype=dtype, requires_grad=True)
    weights = [x, *mlp.parameters()]
    double = [w.detach().double().requires_grad_() for w in weights]
    hidden = nn.functional.gelu(nn.functional.linear(*double[:3]))
    expected = nn.functional.linear(hidden, *double[3:])
    with torch.set_grad_enabled(grad):
        out = mlp(x)
    assert out.dtype == dtype and error(out, expected) < limit
    if grad:
        g = torch.randn_like(out)
        theirs = torch.autograd.grad(expected, double, g.double())
        for a, e in zip(torch.autograd.grad(out, weights, g), theirs, strict=True):
            assert error(a, e) < limit


def test_training_keeps_one_hidden_tensor():
    mlp, saved = Mlp(24, 96, nn.GELU, drop=0.0), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        mlp(torch.randn(TOKENS, 24, requires_grad=True))
    weights = {p.data_ptr() for p in mlp.parameters()}
    assert sum(t.numel() for t in saved if t.data_ptr() not in weights) == TOKENS * (24 + 96)


def test_frozen_layers_get_no_gradient_and_pass_it_on():
    mlp = Mlp(24, 40, nn.GELU, drop=0.0).requires_grad_(False)
    layer = Linear(24, 24).requires_grad_(False)
    x = torch.randn(TOKENS, 24, requires_grad=True)
    layer(mlp(x)).sum().backward()
    assert x.grad.abs().sum() > 0 and all(p.grad is None for p in [*mlp.parameters(), *layer.parameters()])


def test_dropout_acts_in_training_alone():
    mlp, x = Mlp(24, 40, nn.GELU, drop=0.5), torch.randn(TOKENS, 24)
    assert not torch.equal(mlp(x), mlp(x))
    mlp.eval()
    assert torch.equal(mlp(x), mlp(x))


@pytest.mark.parametrize('act', [nn.ReLU, lambda: nn.GELU(approximate='tanh')])
def test_another_activation_is_not_taken_for_gelu(act):
    mlp, x = Mlp(24, 40, act, drop=0.0).eval(), torch.randn(TOKENS, 24)
    expected = nn.functional.linear(mlp.act(nn.functional.linear(x, *mlp.fc1.parameters())), *mlp.fc2.parameters())
    with torch.no_grad():
        assert error(mlp(x), expected.double()) < 1e-5


def test_a_layer_put_in_place_is_called():
    """Adapters such as LoRA replace linear layers by modules of their own."""
    mlp, x = Mlp(24, 40, nn.GELU, drop=0.0).eval(), torch.randn(TOKENS, 24)
    mlp.fc2 = nn.Sequential(nn.Linear(40, 24), nn.Softmax(-1))
    with torch.no_grad():
        torch.testing.assert_close(mlp(x).sum(-1), torch.ones(TOKENS))


@GRADS
def test_autocast_computes_in_its_type(grad):
    layer, x = Linear(24, 40).eval(), torch.randn(TOKENS, 24)
    with torch.autocast('cpu', torch.bfloat16), torch.set_grad_enabled(grad):
        out = layer(x)
    assert out.dtype == torch.bfloat16
    assert error(out, nn.functional.linear(x, *layer.parameters()).double()) < 2e-2
