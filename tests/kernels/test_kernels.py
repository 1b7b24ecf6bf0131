"""Every kernel equals the definition, forward and backward."""

import pytest
import torch

from swin_mm.kernels import KERNELS, get_kernel, reference


def inputs(dtype: torch.dtype, masked: bool) -> list[torch.Tensor | None]:
    generator = torch.Generator().manual_seed(0)

    def random(*shape):
        return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()

    windows, per_map, heads, tokens, size = 6, 3, 2, 12, 8
    mask = (torch.rand(per_map, tokens, tokens, generator=generator) > 0.7) * -100.0 if masked else None
    return [*(random(windows, heads, tokens, size) for _ in 'qkv'), random(heads, tokens, tokens), mask]


def by_hand(q, k, v, bias, mask, scale):
    """One window and head after the other, in float64."""
    out = torch.zeros_like(v, dtype=torch.float64)
    for window in range(q.shape[0]):
        for head in range(q.shape[1]):
            scores = scale * q[window, head].double() @ k[window, head].double().T + bias[head].double()
            if mask is not None:
                scores = scores + mask[window % mask.shape[0]]
            out[window, head] = scores.exp() / scores.exp().sum(-1, keepdim=True) @ v[window, head].double()
    return out


@pytest.mark.parametrize('masked', [False, True])
@pytest.mark.parametrize('name', KERNELS)
@pytest.mark.parametrize(
    'dtype, limit', [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 5e-2), (torch.float16, 1e-2)]
)
def test_kernel_equals_definition_forward_and_backward(name, dtype, limit, masked):
    tensors = inputs(dtype, masked)
    out = get_kernel(name)(*tensors, 0.3)
    assert out.dtype == dtype
    expected = by_hand(*tensors, 0.3)
    torch.testing.assert_close(out.double(), expected, rtol=limit, atol=limit)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    actual = torch.autograd.grad((out * weight).sum(), tensors[:4])
    for a, e in zip(actual, torch.autograd.grad((expected * weight).sum(), tensors[:4]), strict=True):
        torch.testing.assert_close(a.double(), e.double(), rtol=limit, atol=limit * e.abs().max().item())


@pytest.mark.parametrize('name', KERNELS)
def test_scores_beyond_fp16_stay_finite(name):
    q, k, v, bias, mask = inputs(torch.float16, True)
    assert (reference.scores(q.float() * 300, k.float() * 300, bias, mask, 0.3).abs() > 65504).any()
    assert get_kernel(name)(q * 300, k * 300, v, bias, mask, 0.3).isfinite().all()


@pytest.mark.parametrize('name', KERNELS)
def test_dropout_drops_weights_and_keeps_the_expectation(name):
    torch.manual_seed(0)
    q, k, v, bias, mask = inputs(torch.float32, False)
    kernel = get_kernel(name)
    with torch.no_grad():
        mean = torch.stack([kernel(q, k, v, bias, mask, 0.3, 0.5) for _ in range(2000)]).mean(0)
        assert not torch.equal(kernel(q, k, v, bias, mask, 0.3, 0.5), kernel(q, k, v, bias, mask, 0.3, 0.5))
        assert (mean - kernel(q, k, v, bias, mask, 0.3)).abs().max() < 0.15


def test_unknown_kernel_is_named_with_the_choices():
    with pytest.raises(ValueError, match=r"'flash'.*auto, reference, sdpa"):
        get_kernel('flash')
