"""The fused norms equal PyTorch's operators, forward and backward. Without a GPU they run in Triton's interpreter."""

import itertools
import logging

import pytest
import torch
import torch.nn.functional as F
from support.attention_cases import require_triton

from swin_mm.ops import fused_norm, verification

require_triton()

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
FP32, FP16, BF16 = torch.float32, torch.float16, torch.bfloat16
LIMITS = {FP32: 1e-6, FP16: 2e-3, BF16: 1.6e-2}
# Residual stream, branch, result: one type, and autocast's.
TYPES = [(FP32, FP32, FP32), (FP16, FP16, FP16), (BF16, BF16, BF16), (FP32, FP16, FP16), (FP32, BF16, BF16)]
IDS = ['fp32', 'fp16', 'bf16', 'AMP fp16', 'AMP bf16']
EPS = 1e-3  # large enough to matter


def random(*shape, seed, dtype=FP32, offset=0.0):
    values = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) + offset
    return values.to(DEVICE, dtype).requires_grad_()


def inputs(types, C, branch=True, shape=(3, 5, 7)):
    x = random(*shape, C, seed=0, dtype=types[0], offset=0.5)
    added = random(*shape, C, seed=1, dtype=types[1]) if branch else None
    return x, added, random(C, seed=2, offset=1), random(C, seed=3)


def exact(tensor):
    return None if tensor is None else tensor.detach().double().requires_grad_()


def by_hand(x, branch, weight, bias, post, keep):
    """In elementary operators and float64."""

    def norm(v):
        v = v - v.mean(-1, keepdim=True)
        return v / (v.square().mean(-1, keepdim=True) + EPS).sqrt() * weight + bias

    keep = 1.0 if keep is None else keep.double().view(-1, 1, 1, 1)
    if post:
        total = x + keep * norm(branch)
        return total, total
    total = x if branch is None else x + keep * branch
    return total, norm(total)


def with_gradients(results, tensors):
    loss = 0.0
    for i, result in enumerate(results):
        weight = torch.randn(result.shape, generator=torch.Generator().manual_seed(9 + i), dtype=torch.float64)
        loss = loss + (result * weight.to(DEVICE)).sum()
    return [*results, *torch.autograd.grad(loss, [t for t in tensors if t is not None])]


def assert_close(actual, expected, limit):
    for i, (a, e) in enumerate(zip(actual, expected, strict=True)):
        assert a.shape == e.shape, i
        error = (a.double() - e).abs().max() / e.abs().max()
        assert error <= limit, (i, error)


@pytest.mark.parametrize('types, C', [*((t, 96) for t in TYPES), (TYPES[0], 130)], ids=[*IDS, '130 channels'])
@pytest.mark.parametrize('form', ['x alone', 'add', 'add with drop path', 'nchw'])
def test_add_norm_equals_the_definition(types, form, C):
    tensors = inputs(types, C, branch=form != 'x alone', shape=(3, 5, 7))
    keep = torch.tensor([0.0, 1.25, 1.25], device=DEVICE, dtype=types[1]) if 'drop' in form else None
    results = fused_norm.add_norm(*tensors, EPS, types[2], keep, nchw=form == 'nchw')
    assert [r.dtype for r in results] == [
        torch.promote_types(*types[:2]) if tensors[1] is not None else types[0],
        types[2],
    ]
    twins = [exact(t) for t in tensors]
    total, norm = by_hand(*twins, False, keep)
    expected = with_gradients((total, norm.movedim(-1, 1) if form == 'nchw' else norm), twins)
    actual = with_gradients(results, tensors)
    assert [g.dtype for g in actual[2:]] == [t.dtype for t in tensors if t is not None]
    assert_close(actual, expected, LIMITS[types[2]])


@pytest.mark.parametrize('types', TYPES, ids=IDS)
@pytest.mark.parametrize('drop', [False, True])
def test_norm_add_equals_the_definition(types, drop):
    tensors = inputs(types, 96)
    keep = torch.tensor([0.0, 1.25, 1.25], device=DEVICE, dtype=types[1]) if drop else None
    total = torch.promote_types(*types[:2])
    results = fused_norm.norm_add(*tensors, EPS, total, types[2], keep)
    assert [r.dtype for r in results] == [total, types[2]]
    twins = [exact(t) for t in tensors]
    expected = with_gradients(by_hand(*twins, True, keep), twins)
    assert_close(with_gradients(results, tensors), expected, LIMITS[types[2]])


@pytest.mark.parametrize('unused', [0, 1])
@pytest.mark.parametrize('post', [False, True])
def test_results_that_nobody_uses(post, unused):
    """The last norm of a stage, or its sum, may have no gradient; a gradient of None is not an error."""
    tensors = inputs((FP32, BF16, BF16), 24)
    twins = [exact(t) for t in tensors]
    if post:
        result = fused_norm.norm_add(*tensors, EPS, FP32, BF16)[1 - unused]
    else:
        result = fused_norm.add_norm(*tensors, EPS, BF16)[1 - unused]
    expected = by_hand(*twins, post, None)[1 - unused]
    actual = torch.autograd.grad((result.double() ** 2).sum(), tensors, materialize_grads=True)
    expected = torch.autograd.grad((expected**2).sum(), twins, materialize_grads=True)
    for a, e in zip(actual, expected, strict=True):
        assert (a.double() - e).abs().max() <= 2e-2 * e.abs().max().clamp(min=1e-9)


@pytest.mark.parametrize('size', [(4, 6), (5, 6), (3, 7)])
@pytest.mark.parametrize('types', [TYPES[0], TYPES[2], TYPES[4]], ids=['fp32', 'bf16', 'AMP bf16'])
def test_merge_norm_equals_the_definition(types, size, monkeypatch):
    C = 24
    tensors = random(2, *size, C, seed=0, dtype=types[0]), random(4 * C, seed=1), random(4 * C, seed=2)
    x, weight, bias = twins = [exact(t) for t in tensors]
    padded = F.pad(x, (0, 0, 0, size[1] % 2, 0, size[0] % 2))
    stacked = [padded[:, 0::2, 0::2], padded[:, 1::2, 0::2], padded[:, 0::2, 1::2], padded[:, 1::2, 1::2]]
    norm = F.layer_norm(torch.cat(stacked, -1), (4 * C,), weight, bias, EPS)
    monkeypatch.setattr(fused_norm, 'PROGRAMS', 2)
    monkeypatch.setattr(fused_norm, 'TILE', 64)  # several rounds
    actual = fused_norm.merge_norm(*tensors, EPS, types[2])
    assert_close(with_gradients([actual], tensors), with_gradients([norm], twins), LIMITS[types[2]])
    with torch.no_grad():
        assert torch.equal(fused_norm.merge_norm(*tensors, EPS, types[2]), actual)


def test_several_rounds_and_non_contiguous_maps(monkeypatch):
    """Programs of the backward pass take several tiles each; inputs may be views, gradients expanded."""
    monkeypatch.setattr(fused_norm, 'PROGRAMS', 3)
    monkeypatch.setattr(fused_norm, 'TILE', 64)
    tensors = inputs((FP32, FP32, FP32), 24)
    views = [tensors[0].transpose(1, 2), tensors[1].flip(1).transpose(1, 2), *tensors[2:]]
    twins = [exact(t) for t in tensors]
    theirs = [twins[0].transpose(1, 2), twins[1].flip(1).transpose(1, 2), *twins[2:]]
    actual = [r.sum() * 2 + (r**2).mean() for r in fused_norm.add_norm(*views, EPS, FP32)]
    expected = [r.sum() * 2 + (r**2).mean() for r in by_hand(*theirs, False, None)]
    assert_close(torch.autograd.grad(sum(actual), tensors), torch.autograd.grad(sum(expected), twins), 1e-5)


def test_runs_repeat_bit_for_bit(monkeypatch):
    monkeypatch.setattr(fused_norm, 'TILE', 64)
    runs = []
    for _ in range(2):
        tensors = inputs((FP32, FP16, FP16), 24)
        runs.append(with_gradients(fused_norm.add_norm(*tensors, EPS, FP16), tensors))
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_an_empty_batch():
    tensors = inputs((FP32, BF16, BF16), 24, shape=(0, 5, 7))
    results = fused_norm.add_norm(*tensors, EPS, BF16)
    assert all(r.shape == (0, 5, 7, 24) for r in results)
    grads = torch.autograd.grad(sum(r.sum() for r in results), tensors)
    assert grads[0].shape == (0, 5, 7, 24) and not grads[2].any() and not grads[3].any()


def test_large_offsets_do_not_cancel():
    """The variance is that of centred values, not a difference of large numbers."""
    x = random(1, 2, 2, 96, seed=0, offset=1000.0)
    weight, bias = random(96, seed=1, offset=1), random(96, seed=2)
    _, norm = fused_norm.add_norm(x, None, weight, bias, 1e-5, FP32)
    assert_close([norm], [F.layer_norm(x.double(), (96,), weight.double(), bias.double(), 1e-5)], 1e-3)


def test_second_derivatives_raise():
    tensors = inputs((FP32, FP32, FP32), 24)
    _, norm = fused_norm.add_norm(*tensors, EPS, FP32)
    (grad,) = torch.autograd.grad((norm**2).sum(), tensors[0], create_graph=True)
    with pytest.raises(RuntimeError, match='no second derivative; .* without fused_norm'):
        grad.sum().backward()


@pytest.mark.parametrize('name', ['add_norm', 'norm_add', 'merge_norm'])
def test_operators_pass_opcheck(name):
    """Fake tensors have the right shapes and types, and inputs are not changed."""
    x, branch, weight, bias = (t.detach() for t in inputs((FP32, BF16, BF16), 24))
    args = {
        'add_norm': (x, branch, None, weight, bias, EPS, BF16, True, True),
        'norm_add': (x, branch, None, weight, bias, EPS, FP32, BF16, True),
        'merge_norm': (x, weight.repeat(4), bias.repeat(4), EPS, BF16, True),
    }
    torch.library.opcheck(getattr(torch.ops.swin_mm, name).default, args[name])


def test_backward_operators_pass_opcheck():
    x, branch, weight, _ = (t.detach() for t in inputs((FP32, BF16, BF16), 24))
    sums = x.new_ones(105), x.new_ones(105)
    args = (x, branch, x, *sums, None, weight, FP32, BF16, False)
    torch.library.opcheck(torch.ops.swin_mm.add_norm_backward.default, args, test_utils='test_faketensor')
    args = (x, branch, branch, *sums, None, weight, FP32)
    torch.library.opcheck(torch.ops.swin_mm.norm_add_backward.default, args, test_utils='test_faketensor')
    merged, sums = x.new_ones(3, 3, 4, 96), (x.new_ones(36), x.new_ones(36))
    args = (merged, x, *sums, weight.repeat(4))
    torch.library.opcheck(torch.ops.swin_mm.merge_norm_backward.default, args, test_utils='test_faketensor')


# Trust


@pytest.fixture
def log(caplog):
    verification.forget()
    caplog.set_level(logging.WARNING, 'swin_mm')
    yield caplog
    verification.forget()


KINDS = ['add', 'nchw', 'post', 'merge']


def is_trusted(kind, dtype=BF16):
    x, branch, weight, _ = inputs((FP32, dtype, dtype), 24)
    return fused_norm.is_trusted(kind, x, None if kind == 'merge' else branch, weight, dtype)


@pytest.mark.parametrize('training', [False, True])
@pytest.mark.parametrize('kind, dtype', itertools.product(KINDS, [FP32, FP16, BF16]))
def test_right_kernels_are_trusted(kind, dtype, training, log):
    state = torch.get_rng_state()
    with torch.set_grad_enabled(training):
        assert is_trusted(kind, dtype) and not log.messages
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize('kind', KINDS)
def test_wrong_kernels_are_not_trusted(kind, log, monkeypatch):
    right = fused_norm.reference

    def wrong(kind, x, *rest, **options):
        return right(kind, x, *rest, **options)[0].mul(1.1), *right(kind, x, *rest, **options)[1:]

    monkeypatch.setattr(fused_norm, 'reference', wrong)
    assert not is_trusted(kind) and not is_trusted(kind)
    assert (
        len(log.messages) == 1 and 'differs from the definition' in log.messages[0] and '24 channels' in log.messages[0]
    )


def test_kernels_that_fail_are_not_trusted(log, monkeypatch):
    def fail(*args, **options):
        raise OSError('no C compiler')

    monkeypatch.setattr(fused_norm.triton, 'next_power_of_2', fail)
    assert not is_trusted('add') and not is_trusted('add')
    assert len(log.messages) == 1 and 'OSError: no C compiler' in log.messages[0]


def test_lack_of_memory_is_not_remembered(log, monkeypatch):
    def fail(*args, **options):
        raise torch.OutOfMemoryError('out of memory')

    with monkeypatch.context() as patch:
        patch.setattr(fused_norm.triton, 'next_power_of_2', fail)
        assert not is_trusted('add')
    assert is_trusted('add') and not log.messages


def test_unsupported_inputs_give_a_reason(monkeypatch):
    device = torch.device(DEVICE)
    assert fused_norm.unsupported_reason(device, BF16, 96) is None
    assert 'float64' in fused_norm.unsupported_reason(device, torch.float64, 96)
    assert '5000 channels' in fused_norm.unsupported_reason(device, BF16, 5000)
    monkeypatch.setattr(fused_norm.triton.knobs.runtime, 'interpret', False)
    assert 'do not run on cpu' in fused_norm.unsupported_reason(torch.device('cpu'), BF16, 96)
    monkeypatch.setattr(fused_norm.triton, '__version__', '3.3.1')
    assert 'older than 3.4' in fused_norm.unsupported_reason(device, BF16, 96)
    monkeypatch.setattr(fused_norm, 'triton', None)
    assert 'triton' in fused_norm.unsupported_reason(device, BF16, 96)
