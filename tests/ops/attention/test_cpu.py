"""The CPU kernel against the reference in fp64, for each instruction set that it is built for."""

import logging
import os
import subprocess
import sys

import pytest
import torch
from support.attention_cases import LAYOUTS, check, gradients, inputs

from swin_mm.ops import attention as kernels
from swin_mm.ops.attention import cpu, get_kernel, reference

CAPABILITIES = ['DEFAULT', 'AVX2', 'AVX512']
HERE = torch.backends.cpu.get_cpu_capability()
# Windows of one vector and of several blocks of vectors, and tokens whose last vector is nearly empty.
WINDOWS = [*LAYOUTS, ((15, 20), (7, 7), (3, 3)), ((13, 13), (12, 12), (6, 6)), ((8, 24), (8, 17), (0, 8))]


@pytest.fixture(params=CAPABILITIES)
def build(request, monkeypatch):
    """One of the builds that this processor can run."""
    if CAPABILITIES.index(request.param) > CAPABILITIES.index(HERE):
        pytest.skip(f'this processor supports {HERE} only')
    monkeypatch.setattr(torch.backends.cpu, 'get_cpu_capability', lambda: request.param)
    if cpu.unsupported_reason(torch.device('cpu'), torch.float32, 8, False):
        pytest.skip('not compiled')


@pytest.mark.parametrize('cosine', [False, True])
@pytest.mark.parametrize('size, window, shift', WINDOWS)
@pytest.mark.parametrize('dtype, limit', [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_equals_the_definition_forward_and_backward(build, dtype, limit, size, window, shift, cosine):
    tensors = inputs(dtype, size, window, cosine)
    exact = [t.detach().double().requires_grad_() if isinstance(t, torch.Tensor) else t for t in tensors]
    out = cpu.attention(*tensors[:3], window, shift, tensors[3])
    expected = reference.attention(*exact[:3], window, shift, exact[3])
    assert out.dtype == dtype
    check([out], [expected], limit)
    check(gradients(out, tensors), gradients(expected, exact), limit)


@pytest.mark.parametrize('heads, dim', [(3, 32), (1, 5), (2, 50)])
def test_any_head_size(build, heads, dim):
    qkv, pad, bias = (torch.randn(s) for s in ((2, 9, 10, 3 * heads * dim), (3 * heads * dim,), (heads, 12, 12)))
    arguments = qkv, pad, bias, (3, 4), (1, 2), 0.3
    check(
        [cpu.attention(*arguments)], [reference.attention(*(t.double() for t in arguments[:3]), *arguments[3:])], 1e-5
    )


def test_extreme_scores(build):
    """As in reference.py: one key gets all of the weight, others underflow, and nothing is infinite."""
    qkv, pad, bias, scale = inputs(torch.float32, (5, 7), (2, 3))
    qkv = qkv.detach() * torch.tensor([3e3, 3e3, 1.0]).repeat_interleave(16)
    arguments = qkv, pad, bias, (2, 3), (1, 1), scale
    check([cpu.attention(*arguments)], [reference.attention(*arguments)], 1e-5)


def test_bfloat16_is_rounded_once_to_the_nearest(build):
    tensors = inputs(torch.bfloat16, (15, 20), (7, 7), True)
    wide = [t.detach().float().requires_grad_() for t in tensors]
    runs = []
    for qkv, pad, bias, scale in (tensors, wide):
        out = cpu.attention(qkv, pad, bias, (7, 7), (3, 3), scale)
        weight = torch.ones(out.shape).bfloat16().to(out.dtype)
        runs.append([out, *torch.autograd.grad(out, qkv, weight)])
    assert all(torch.equal(narrow, full.bfloat16()) for narrow, full in zip(*runs, strict=True))


@pytest.mark.parametrize('dtype', cpu.DTYPES)
def test_nan_and_inf_propagate_within_their_window(build, dtype):
    qkv, pad, bias, scale = inputs(dtype, (4, 6), (2, 3))
    qkv = qkv.detach().clone()
    qkv[0, 0, 0, 0] = torch.nan  # a query
    qkv[0, 0, 3, 16] = torch.nan  # a key
    qkv[0, 2, 0, -1], qkv[0, 2, 0, -2] = torch.nan, torch.inf  # values
    bias = bias.detach().float()
    bias[1, 2, 3] = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(
        torch.float32
    )  # rounding would carry into its sign
    out, expected = (k.attention(qkv, pad, bias, (2, 3), (0, 0), scale).detach() for k in (cpu, reference))
    assert torch.equal(out.isnan(), expected.isnan()) and torch.equal(out.isinf(), expected.isinf())


def test_runs_repeat_bit_for_bit():
    tensors = inputs(torch.float32, (40, 61), (3, 4), True)
    runs = []
    for _ in range(2):
        out = cpu.attention(*tensors[:3], (3, 4), (1, 2), tensors[3])
        runs.append([out, *gradients(out, tensors)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_result_does_not_depend_on_the_number_of_threads():
    tensors = inputs(torch.float32, (40, 61), (3, 4), True)
    runs, threads = [], torch.get_num_threads()
    try:
        for number in (1, 5):
            torch.set_num_threads(number)
            out = cpu.attention(*tensors[:3], (3, 4), (1, 2), tensors[3])
            runs.append([out, *gradients(out, tensors)])
    finally:
        torch.set_num_threads(threads)
    check(runs[0], [t.double() for t in runs[1]], 1e-5)


@pytest.mark.parametrize('cosine', [False, True])
def test_operator_passes_opcheck(cosine):
    qkv, pad, bias, scale = inputs(torch.float32, (5, 7), (2, 3), cosine)
    torch.library.opcheck(
        torch.ops.swin_mm.window_attention_cpu, (qkv, pad, bias, scale if cosine else None, 0.3, [2, 3], [1, 1])
    )


def test_auto_chooses_the_cpu_kernel_where_it_is_supported(monkeypatch, caplog):
    tensors = inputs(torch.float32, (5, 7), (2, 3))
    arguments = *tensors[:3], (2, 3), (1, 1), tensors[3]
    assert torch.equal(get_kernel('auto')(*arguments), cpu.attention(*arguments))
    with pytest.raises(RuntimeError, match="attention='cpu' .*float64; use attention='auto' or 'reference'"):
        get_kernel('cpu')(tensors[0].double(), *arguments[1:])

    monkeypatch.setattr(cpu, 'find_library', lambda _: None)
    kernels.unsupported_reason.cache_clear()
    caplog.clear()
    with caplog.at_level(logging.WARNING, 'swin_mm'):
        outs = [get_kernel('auto')(*arguments) for _ in range(2)]
    kernels.unsupported_reason.cache_clear()
    assert torch.equal(outs[0], kernels.sdpa.attention(*arguments))
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 1 and 'not compiled' in messages[0] and 'C++ compiler' in messages[0]


def test_next_build_is_used_where_the_best_is_missing(monkeypatch):
    find, tried = cpu.find_spec, []
    monkeypatch.setattr(cpu, 'find_spec', lambda name: tried.append(name) or (None if 'avx512' in name else find(name)))
    library = cpu.find_library.__wrapped__('AVX512')
    assert [name.rpartition('_')[2] for name in tried] == ['avx512', 'avx2'] and 'avx2' in library._name


def test_exported_code_does_not_use_the_cpu_kernel():
    qkv, pad, bias, scale = (
        t if not isinstance(t, torch.Tensor) else t.detach() for t in inputs(torch.float32, (4, 6), (2, 3))
    )
    traced = torch.jit.trace(lambda x: get_kernel('auto')(x, pad, bias, (2, 3), (1, 1), scale), qkv, check_trace=False)
    assert 'swin_mm::' not in str(traced.graph)
    check([traced(qkv)], [cpu.attention(qkv, pad, bias, (2, 3), (1, 1), scale)], 1e-5)


SHORTAGE = """
import resource, sys, torch
from swin_mm.ops.attention import cpu
torch.set_num_threads(2)
torch.ones(1 << 20).sum()  # start the threads before memory becomes short
window = (48, 48)
qkv = torch.randn(1, 48, 48, 3 * 64, requires_grad=True)
pad, bias = torch.randn(3 * 64), torch.randn(2, 2304, 2304)
arguments = pad, bias, window, (0, 0), 0.2
out = cpu.attention(qkv, *arguments)
with open('/proc/self/statm') as file:
    used = int(file.read().split()[0]) * resource.getpagesize()
succeeded, megabytes = set(), 1
while len(succeeded) < 2 and megabytes < 4096:  # how much the calls need differs between processors
    resource.setrlimit(resource.RLIMIT_AS, (used + (megabytes << 20), resource.RLIM_INFINITY))
    for name, call in {'forward': lambda: cpu.attention(qkv, *arguments),
                       'backward': lambda: torch.autograd.grad(out.sum(), qkv, retain_graph=True)}.items():
        try:
            call()
            succeeded.add(name)
            print(name, 'ok')
        except (MemoryError, RuntimeError) as error:
            print(name, type(error).__name__, str(error)[:60])
    megabytes += 10
resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
assert torch.equal(cpu.attention(qkv, *arguments), out)
print('survived')
"""


@pytest.mark.skipif(not sys.platform.startswith('linux'), reason='limits the address space by RLIMIT_AS')
def test_running_out_of_memory_raises():
    """Forward and backward at rising limits: each call either succeeds or raises, and the process survives."""
    if cpu.unsupported_reason(torch.device('cpu'), torch.float32, 32, False):
        pytest.skip('not compiled')
    environment = {**os.environ, 'MALLOC_ARENA_MAX': '1'}
    run = subprocess.run([sys.executable, '-c', SHORTAGE], capture_output=True, text=True, env=environment)
    assert run.returncode == 0, run.stderr[-2000:]
    assert run.stdout.strip().endswith('survived')
    for name in ('forward', 'backward'):
        assert f'{name} MemoryError the cpu attention kernel could not allocate' in run.stdout, run.stdout
        assert f'{name} ok' in run.stdout, run.stdout
