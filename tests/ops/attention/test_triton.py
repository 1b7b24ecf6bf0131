"""The Triton kernels equal the definition, forward and backward. Without a GPU they run in Triton's interpreter."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

from swin_mm.ops.attention import get_kernel, reference
from swin_mm.ops.attention import triton as kernel

pytest.importorskip('triton')

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
    monkeypatch.setattr(kernel, 'PROGRAMS', 4 * HEADS)  # so that a program serves several windows
    args = inputs(layout, dtype, cosine, D)
    if reason := refusal(*args[:3]):
        assert 'interpreter' in reason
        pytest.skip(reason)
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


def test_keys_of_padding_without_bias_have_no_direction(monkeypatch):
    """V2's keys have no bias: a key of length 0 stays 0 and does not turn anything into nan."""
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
def test_operators_keep_the_rules_of_torch(cosine):
    """Shapes and types without data are right, and inputs stay as they are."""
    qkv, pad, bias, window, shift, scale = inputs(LAYOUTS['window beyond the map'], torch.float32, cosine)
    factor = 1.0 if cosine else scale
    args = (qkv, pad, bias, scale if cosine else None, factor, list(window), list(shift))
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


def test_refusals_say_why(monkeypatch):
    args = inputs(LAYOUTS['no shift'])[:3]
    assert refusal(*args) is None
    assert refusal(*args, dropout=True) == 'it has no dropout'
    assert 'float64' in refusal(args[0].double(), *args[1:])
    assert '8 channels' in refusal(*inputs(LAYOUTS['no shift'], D=8)[:3])
    monkeypatch.setattr(kernel.triton.knobs.runtime, 'interpret', False)
    assert refusal(args[0].cpu(), *args[1:]) == 'it does not run on cpu'


def test_the_kernel_by_name_is_it_or_an_error():
    args = inputs(LAYOUTS['7x7'])
    assert torch.equal(get_kernel('triton')(*args), kernel.attention(*args))
    with pytest.raises(RuntimeError, match="float64; use attention='auto' or 'reference'"):
        get_kernel('triton')(args[0].double(), *args[1:])


# In a process of its own, as Triton decides between compiler and interpreter when it is imported.
COMPILE = """
import sys
sys.modules['triton'] = None
import torch
from swin_mm.ops.attention import triton as kernel
assert kernel.unsupported_reason(None, None, 0, False) == 'triton is not installed'
for name in ('triton', 'swin_mm.ops.attention.triton'):
    del sys.modules[name]
del sys.modules['swin_mm.ops.attention'].triton

from triton import compile
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from swin_mm.ops.attention import triton as kernel

launches = []
kernel._Call.launch = lambda call, kernel, blocks, *tensors: launches.append(
    (kernel, [*call.tensors, *tensors, *call.numbers, call.splits(blocks)], call.constants))
for side in (7, 16):
    qkv, bias = torch.zeros(1, 20, 20, 96, dtype=torch.bfloat16), torch.zeros(1, side**2, side**2)
    qkv, bias = qkv.requires_grad_(), bias.requires_grad_()
    kernel.attention(qkv, qkv[0, 0, 0], bias, (side, side), (3, 3), 0.3).sum().backward()
for kernel, values, constants in launches:
    options = {'num_warps': constants['num_warps']}
    types = {torch.bfloat16: '*bf16', torch.float32: '*fp32', float: 'fp32', int: 'i32'}
    signature = [types[v.dtype if isinstance(v, torch.Tensor) else type(v)] for v in values]
    aligned = {(n,): [['tt.divisibility', 16]] for n, v in enumerate(values) if isinstance(v, torch.Tensor)}
    constants = {name: constants[name] for name in kernel.arg_names[len(values):]}
    signature = dict(zip(kernel.arg_names, [*signature, *['constexpr'] * len(constants)]))
    binary = compile(ASTSource(kernel, signature, constants, aligned), GPUTarget('cuda', 90, 32), options)
    print(kernel.__name__, len(binary.asm['cubin']) > 0, binary.metadata.shared < 99 * 1024)
"""


def test_kernels_compile_for_gpus():
    """Neither needs a GPU: importing the module without Triton, and compiling what the interpreter may be lax about."""
    done = subprocess.run(
        [sys.executable, '-c', COMPILE],
        env=os.environ | {'TRITON_INTERPRET': '0'},
        cwd=Path(__file__).parents[2],
        capture_output=True,
        text=True,
    )
    names = ['_forward', '_backward', '_forward', '_backward_q', '_backward_kv', '_backward_bias']
    assert done.stdout.splitlines() == [f'{name} True True' for name in names], done.stderr
