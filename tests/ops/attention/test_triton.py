"""The Triton kernels equal the definition, forward and backward. Without a GPU they run in Triton's interpreter."""

import pytest
import torch
from support.attention_cases import require_triton
from torch._dynamo.testing import CompileCounterWithBackend
from torch.utils.flop_counter import FlopCounterMode

from swin_mm.ops.attention import get_kernel, reference
from swin_mm.ops.attention import triton as kernel

require_triton()

DEVICE = 'cuda' if torch.cuda.is_available() else 'cpu'
# Batch, map, window, shift, side of a tile: padding on both sides, one and none; shifts on both axes, one and none; one
# tile and several; rows of a tile that are as long as the window's and that are not.
LAYOUTS = {
    '7x7': (2, (14, 16), (7, 7), (3, 3), 64),
    '8x8': (1, (9, 16), (8, 8), (4, 0), 64),
    '12x12': (1, (11, 14), (12, 12), (6, 6), 64),
    'no padding': (1, (8, 4), (4, 4), (2, 2), 64),
    'no shift': (2, (3, 10), (3, 4), (0, 0), 64),
    'window beyond the map': (1, (3, 5), (4, 6), (2, 3), 64),
    '2 x 2 tiles': (2, (3, 9), (4, 5), (1, 2), 16),
    '3 x 3 tiles, one shift': (1, (6, 6), (7, 6), (0, 4), 16),
}
LARGE = {
    '16x16': (1, (16, 20), (16, 16), (0, 8), 64),
    '24x24': (1, (25, 24), (24, 24), (12, 12), 64),
}
HEADS = 2


def inputs(layout, dtype=torch.float32, cosine=False, D=16) -> tuple:
    B, size, window, shift, _ = layout
    generator = torch.Generator().manual_seed(0)

    def random(*shape, dtype=torch.float32):
        return torch.randn(shape, generator=generator).to(DEVICE, dtype).requires_grad_()

    C, N = HEADS * D, window[0] * window[1]
    scale = torch.tensor([4.0, 9.0], device=DEVICE, requires_grad=True) if cosine else 0.3
    # Under autocast the map is of lower precision than parameters.
    return random(B, *size, 3 * C, dtype=dtype), random(3 * C), random(HEADS, N, N), window, shift, scale


def gradients(attention, args: tuple) -> list[torch.Tensor]:
    """The output and the gradients of a weighted sum of it."""
    out = attention(*args)
    weight = torch.randn(out.shape, generator=torch.Generator().manual_seed(1)).to(out)
    tensors = [t for t in args if isinstance(t, torch.Tensor)]
    return [out, *torch.autograd.grad((out * weight).sum(), tensors, materialize_grads=True)]


def definition(qkv, pad, bias, window, shift, scale) -> torch.Tensor:
    scale = scale.double() if isinstance(scale, torch.Tensor) else scale
    return reference.attention(qkv.double(), pad.to(qkv.dtype).double(), bias.double(), window, shift, scale)


def refusal(qkv, pad, bias, dropout=False) -> str | None:
    return kernel.unsupported_reason(qkv.device, qkv.dtype, qkv.shape[3] // 3 // bias.shape[0], dropout)


def assert_equals_definition(layout, monkeypatch, limit, dtype, cosine, D=16) -> None:
    monkeypatch.setattr(kernel, 'TILE', layout[-1])
    monkeypatch.setattr(kernel, 'sm_count', lambda device: 3)  # so that several programs serve several windows each
    args = inputs(layout, dtype, cosine, D)
    names = ('out', 'qkv', 'pad', 'bias', 'scale')[: 5 if cosine else 4]
    pairs = zip(names, gradients(kernel.attention, args), gradients(definition, args), strict=True)
    for name, actual, expected in pairs:
        actual, expected = actual.double(), expected.double()
        assert (actual - expected).abs().max() <= limit * expected.abs().max(), name


@pytest.mark.parametrize('cosine', [False, True], ids=['V1', 'V2'])
@pytest.mark.parametrize('layout', LAYOUTS.values(), ids=LAYOUTS)
def test_kernel_equals_definition_forward_and_backward(layout, cosine, monkeypatch):
    assert_equals_definition(layout, monkeypatch, 1e-5, torch.float32, cosine)


@pytest.mark.slow
@pytest.mark.parametrize('cosine', [False, True], ids=['V1', 'V2'])
@pytest.mark.parametrize('layout', LARGE.values(), ids=LARGE)
def test_large_windows_equal_definition(layout, cosine, monkeypatch):
    assert_equals_definition(layout, monkeypatch, 1e-5, torch.float32, cosine, 32)


@pytest.mark.parametrize('cosine', [False, True], ids=['V1', 'V2'])
@pytest.mark.parametrize('dtype, limit', [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)], ids=['bf16', 'fp16'])
@pytest.mark.parametrize('name', ['window beyond the map', '2 x 2 tiles'])
def test_lower_precision(name, dtype, limit, cosine, monkeypatch):
    assert_equals_definition(LAYOUTS[name], monkeypatch, limit, dtype, cosine)


def test_zero_length_padding_keys_give_no_nan(monkeypatch):
    """V2's keys have no bias: a key of length 0 is normalised to 0 and gives no NaN."""
    args = inputs(LAYOUTS['window beyond the map'], torch.float32, True)
    with torch.no_grad():
        args[1].view(3, -1)[1] = 0
    for actual, expected in zip(gradients(kernel.attention, args), gradients(definition, args), strict=True):
        torch.testing.assert_close(actual.double(), expected.double(), rtol=1e-4, atol=1e-5)


def test_scores_beyond_fp16_stay_finite():
    qkv, *rest = inputs(LAYOUTS['no padding'], torch.float16)
    with torch.no_grad():
        qkv *= 200
    assert (qkv.double().square().mean() * 16 * 0.3) > 65504
    assert all(t.isfinite().all() for t in gradients(kernel.attention, (qkv, *rest)))


@pytest.mark.parametrize('name', ['7x7', '3 x 3 tiles, one shift'])
def test_runs_repeat_bit_for_bit(name, monkeypatch):
    monkeypatch.setattr(kernel, 'TILE', LAYOUTS[name][-1])
    args = inputs(LAYOUTS[name], torch.float16)
    for a, b in zip(gradients(kernel.attention, args), gradients(kernel.attention, args), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize('cosine', [False, True], ids=['V1', 'V2'])
def test_operators_pass_opcheck(cosine):
    """Fake tensors have the right shapes and dtypes, and inputs are not changed."""
    qkv, pad, bias, window, shift, scale = inputs(LAYOUTS['window beyond the map'], torch.float32, cosine)
    factor = 1.0 if cosine else scale
    args = (qkv, pad, bias, scale if cosine else None, factor, True, list(window), list(shift))
    torch.library.opcheck(torch.ops.swin_mm.window_attention.default, args)


def test_compiles_in_one_graph_for_all_sizes():
    counter = CompileCounterWithBackend('aot_eager')
    compiled = torch.compile(kernel.attention, backend=counter, fullgraph=True, dynamic=True)
    graphs = []
    for size in [(3, 7), (5, 4)]:
        args = inputs((1, size, (3, 4), (1, 2), 64))
        for actual, expected in zip(gradients(compiled, args), gradients(kernel.attention, args), strict=True):
            assert torch.equal(actual, expected)
        graphs.append(counter.frame_count)
    assert graphs[0] == graphs[1]


def test_unsupported_inputs_give_a_reason(monkeypatch):
    args = inputs(LAYOUTS['no shift'])[:3]
    assert refusal(*args) is None
    assert refusal(*args, dropout=True) == 'it has no dropout'
    assert 'float64' in refusal(args[0].double(), *args[1:])
    assert '8 channels' in refusal(*inputs(LAYOUTS['no shift'], D=8)[:3])
    monkeypatch.setattr(kernel.triton.knobs.runtime, 'interpret', False)
    assert refusal(args[0].cpu(), *args[1:]) == 'it does not run on cpu'


def test_a_kernel_chosen_by_name_runs_or_raises():
    args = inputs(LAYOUTS['7x7'])
    assert torch.equal(get_kernel('triton')(*args), kernel.attention(*args))
    with pytest.raises(RuntimeError, match="float64; use attention='auto' or 'reference'"):
        get_kernel('triton')(args[0].double(), *args[1:])


def test_modes_that_look_at_operators_see_the_kernels(monkeypatch):
    """FlopCounterMode counts 2 products in the forward and 5 in the backward, as for the other kernels."""
    args = inputs(LAYOUTS['no padding'])
    with FlopCounterMode(display=False) as counter:
        out = kernel.attention(*args)
        forward = counter.get_total_flops()
        out.sum().backward()
    assert forward == 2 * 2 * 2 * HEADS * 16 * 16 * 16  # 2 windows, 2 heads, N = 16, d = 16, two for a multiply-add
    assert counter.get_total_flops() == forward * 7 // 2
    # If the private function that tells whether there is a mode disappears, the operators are used always.
    assert torch._C._len_torch_dispatch_stack() == 0
    monkeypatch.delattr(torch._C, '_len_torch_dispatch_stack')
    assert kernel.operators_are_seen(args[0])


@pytest.mark.parametrize('seen', [False, True], ids=['plain', 'operators'])
def test_second_derivatives_raise(seen, monkeypatch):
    monkeypatch.setattr(kernel, 'operators_are_seen', lambda _: seen)
    qkv, *rest = inputs(LAYOUTS['no padding'])
    (gradient,) = torch.autograd.grad(kernel.attention(qkv, *rest).pow(2).sum(), qkv, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative; build the model with attention='reference'"):
        gradient.sum().backward()


@pytest.mark.parametrize('cosine', [False, True], ids=['V1', 'V2'])
def test_operators_and_plain_calls_are_equal(cosine, monkeypatch):
    args = inputs(LAYOUTS['window beyond the map'], torch.float16, cosine)
    runs = []
    for seen in (False, True):
        monkeypatch.setattr(kernel, 'operators_are_seen', lambda _, seen=seen: seen)
        with torch.no_grad():
            runs.append([kernel.attention(*args)])
        runs[-1] += gradients(kernel.attention, args)
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_inference_stores_nothing_for_a_backward(monkeypatch):
    """The log-sum-exp is neither allocated nor written, and the output is that of training, bit for bit."""
    saved, launch = [], kernel.launch

    def record(function, programs, arguments, constants):
        saved.append((constants['SAVE'], arguments[5].numel()))
        launch(function, programs, arguments, constants)

    monkeypatch.setattr(kernel, 'launch', record)
    args = inputs(LAYOUTS['no padding'])
    outs = [kernel.attention(*args)]
    with torch.no_grad():
        outs.append(kernel.attention(*args))
    outs.append(kernel.attention(*(t.detach() if isinstance(t, torch.Tensor) else t for t in args)))
    assert saved == [(True, 2 * HEADS * 16), (False, 0), (False, 0)]
    assert torch.equal(outs[0], outs[1]) and torch.equal(outs[0], outs[2])


@pytest.mark.parametrize('processors', [1, 2, 1000])
def test_any_number_of_programs_covers_every_window_once(processors, monkeypatch):
    monkeypatch.setattr(kernel, 'sm_count', lambda device: processors)
    args = inputs((1, (10, 8), (4, 4), (1, 1), 64))
    for actual, expected in zip(gradients(kernel.attention, args), gradients(definition, args), strict=True):
        assert (actual.double() - expected).abs().max() <= 1e-5 * expected.abs().max()


def test_views_that_are_not_aligned_are_copied():
    qkv, pad, bias, *rest = inputs(LAYOUTS['no padding'])
    shifted = torch.cat([torch.zeros_like(pad[:1]), pad])[1:]  # 4 bytes into its memory
    strided = torch.cat([bias, bias], 2)[..., : bias.shape[2]]
    assert shifted.data_ptr() % 16 and not strided.is_contiguous()
    args, views = (qkv, pad, bias, *rest), (qkv, shifted, strided, *rest)
    for actual, expected in zip(gradients(kernel.attention, views), gradients(kernel.attention, args), strict=True):
        assert torch.equal(actual, expected)
