"""Every kernel equals the reference, forward and backward."""

import copy
import pickle

import pytest
import torch
from support.attention_cases import DIM, HEADS, LAYOUTS, by_hand, check, gradients, inputs

from swin_mm.ops.attention import KERNELS, get_kernel, reference


@pytest.mark.parametrize('cosine', [False, True])
@pytest.mark.parametrize('size, window, shift', LAYOUTS[:4])
def test_reference_equals_a_token_by_token_computation(size, window, shift, cosine):
    qkv, pad, bias, scale = inputs(torch.float64, size, window, cosine)
    out = reference.attention(qkv, pad, bias, window, shift, scale)
    check([out], [by_hand(qkv, pad, bias, window, shift, scale)], 1e-12)


@pytest.mark.parametrize('cosine', [False, True])
@pytest.mark.parametrize('size, window, shift', LAYOUTS)
@pytest.mark.parametrize('name', ['auto', 'sdpa'])
@pytest.mark.parametrize(
    'dtype, limit', [(torch.float64, 1e-12), (torch.float32, 1e-5), (torch.bfloat16, 3e-2), (torch.float16, 1e-2)]
)
def test_kernel_equals_the_definition_forward_and_backward(name, dtype, limit, size, window, shift, cosine):
    tensors = inputs(dtype, size, window, cosine)
    exact = [t.detach().double().requires_grad_() if isinstance(t, torch.Tensor) else t for t in tensors]
    out = get_kernel(name)(*tensors[:3], window, shift, tensors[3])
    expected = reference.attention(*exact[:3], window, shift, exact[3])
    assert out.dtype == dtype
    check([out], [expected], limit)
    check(gradients(out, tensors), gradients(expected, exact), limit)


@pytest.mark.parametrize('name', ['reference', 'sdpa'])
def test_scores_beyond_fp16_stay_finite(name):
    qkv, pad, bias, scale = inputs(torch.float16, (5, 7), (2, 3))
    qkv = qkv.detach() * torch.tensor([300.0, 300.0, 1.0]).repeat_interleave(HEADS * DIM).half()
    q, k, _ = qkv.float().chunk(3, -1)
    assert ((q * k).sum(-1) * scale).abs().max() > 65504
    assert get_kernel(name)(qkv, pad, bias, (2, 3), (1, 1), scale).isfinite().all()


@pytest.mark.parametrize('name', ['reference', 'sdpa'])
def test_dropout_drops_weights_and_keeps_the_expectation(name):
    torch.manual_seed(0)
    qkv, pad, bias, scale = inputs(torch.float32, (4, 6), (2, 3))
    arguments = qkv, pad, bias, (2, 3), (0, 0), scale
    kernel = get_kernel(name)
    with torch.no_grad():
        mean = torch.stack([kernel(*arguments, 0.5) for _ in range(2000)]).mean(0)
        assert not torch.equal(kernel(*arguments, 0.5), kernel(*arguments, 0.5))
        assert (mean - kernel(*arguments)).abs().max() < 0.2
    assert not torch.equal(kernel(*arguments, 0.5), kernel(*arguments, 0.5))


@pytest.mark.parametrize('name', ['auto', *KERNELS])
def test_models_that_hold_a_kernel_can_be_copied_and_pickled(name):
    layer = torch.nn.Identity()
    layer.attention_fn = get_kernel(name)
    tensors = [t.detach() if isinstance(t, torch.Tensor) else t for t in inputs(torch.float32, (4, 6), (2, 3))]
    for twin in (copy.deepcopy(layer), pickle.loads(pickle.dumps(layer))):
        if name != 'triton':
            arguments = *tensors[:3], (2, 3), (0, 0), tensors[3]
            assert torch.equal(twin.attention_fn(*arguments), layer.attention_fn(*arguments))


def test_unknown_kernel_is_named_with_the_choices():
    with pytest.raises(ValueError, match=r"'flash'.*auto, reference, sdpa, cpu, triton"):
        get_kernel('flash')
