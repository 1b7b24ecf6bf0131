"""``attention='auto'`` uses the Triton kernel only where it has been found to be right, and says why it does not."""

import copy
import inspect
import logging
import subprocess
import sys

import pytest
import torch
from support.attention_cases import require_triton
from support.oracles import randomise
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from swin_mm.models.swin import SwinPyramid, SwinPyramidV2
from swin_mm.ops import attention as kernels
from swin_mm.ops import verification
from swin_mm.ops.attention import get_kernel, reference, sdpa, self_check
from swin_mm.ops.attention import triton as kernel
from swin_mm.ops.attention.self_check import Case, find_problem

require_triton()
triton = kernel.triton

DEVICE = torch.device('cuda', 0) if torch.cuda.is_available() else torch.device('cpu')
WINDOW, SHIFT, D = (3, 4), (1, 1), 16


def case(dtype=torch.float32, cosine=False, window=WINDOW, bias_dtype=torch.float32) -> Case:
    return Case(DEVICE, dtype, bias_dtype, window, D, cosine)


def arguments(dtype=torch.float32) -> tuple:
    qkv, pad, bias = torch.randn(1, 3, 5, 3 * D), torch.randn(3 * D), torch.randn(1, 12, 12)
    return qkv.to(DEVICE, dtype), pad.to(DEVICE, dtype), bias.to(DEVICE), WINDOW, SHIFT, 0.3


@pytest.fixture
def auto(monkeypatch):
    """``auto`` as on a GPU, before any check."""
    monkeypatch.setitem(kernels.PREFERRED, 'cpu', 'triton')
    for clear in (verification.forget, kernels.unsupported_reason.cache_clear):
        clear()
    yield get_kernel('auto')
    for clear in (verification.forget, kernels.unsupported_reason.cache_clear):
        clear()


@pytest.fixture
def warnings(caplog):
    """The messages that were logged."""
    with caplog.at_level(logging.WARNING, 'swin_mm'):
        yield lambda: [record.getMessage() for record in caplog.records]


@pytest.fixture
def checks(monkeypatch):
    """The cases that were checked; the check itself is left out."""
    seen = []
    monkeypatch.setattr(self_check, 'find_problem', lambda _, case: seen.append(case) or '')
    return seen


def plant(monkeypatch, change):
    """Change the arguments of each launch: ``change(name of the kernel, dict of arguments)``."""
    launch = kernel.launch

    def wrong(function, programs, values, constants):
        named = dict(zip(function.arg_names, values, strict=False))
        change(function.__name__, named)
        launch(function, programs, tuple(named.values()), constants)

    monkeypatch.setattr(kernel, 'launch', wrong)


@pytest.mark.parametrize(
    'dtype, bias, cosine',
    [
        (torch.float32, torch.float32, False),
        (torch.float16, torch.float16, True),
        (torch.bfloat16, torch.float32, False),
        (torch.bfloat16, torch.bfloat16, True),
    ],
)
def test_the_kernels_pass(dtype, bias, cosine):
    assert find_problem(kernel.attention, case(dtype, cosine, bias_dtype=bias)) == ''


@pytest.mark.slow
def test_windows_of_several_tiles_pass(monkeypatch):
    monkeypatch.setattr(kernel, 'TILE', 16)
    assert find_problem(kernel.attention, case(torch.bfloat16, window=(4, 5))) == ''


def test_other_kernels_pass():
    for attention in (reference.attention, sdpa.attention):
        assert find_problem(attention, case(window=(7, 7))) == ''


def swap(named, a, b):
    named[a], named[b] = named[b], named[a]


WRONG = {  # what to change, and what the check then finds wrong
    'rows taken for columns': (lambda name, n: swap(n, 'down', 'across'), 'output'),
    'shift in training only': (lambda name, n: 'lse' in n and len(n['lse']) and n.update(shift_x=0), 'in training'),
    'no shift in the backward': (lambda name, n: name == '_backward' and n.update(shift_y=0), 'gradient of qkv'),
    'keys of padding': (lambda name, n: name == '_backward' and n.update(pad=n['pad'] * 0), 'gradient'),
    'NaN': (lambda name, n: n.update(factor=torch.nan), 'nan'),
}


@pytest.mark.parametrize('change, found', WRONG.values(), ids=WRONG)
def test_wrong_kernels_are_found(change, found, monkeypatch):
    plant(monkeypatch, change)
    problem = find_problem(kernel.attention, case())
    assert 'differs from the definition' in problem and found in problem


@pytest.mark.parametrize('index, name', [(1, 'padding'), (2, 'the bias'), (3, 'the scale')])
def test_each_gradient_is_compared(index, name, monkeypatch):
    backward = kernel.backward

    def wrong(*args):
        gradients = list(backward(*args))
        gradients[index] = gradients[index] * 1.01
        return gradients

    monkeypatch.setattr(kernel, 'backward', wrong)
    assert f'gradient of {name} differs' in find_problem(kernel.attention, case(cosine=True))


def test_auto_uses_the_kernel_once_it_has_passed(auto, warnings, monkeypatch):
    args = arguments()
    assert torch.equal(auto(*args), kernel.attention(*args))
    monkeypatch.setattr(self_check, 'find_problem', None)  # a second check would fail
    auto(*args)
    assert not warnings()


def test_auto_falls_back_from_a_wrong_kernel_with_one_warning(auto, warnings, monkeypatch):
    plant(monkeypatch, WRONG['rows taken for columns'][0])
    args = arguments()
    assert all(torch.equal(auto(*args), sdpa.attention(*args)) for _ in range(2))
    (message,) = warnings()
    assert 'the triton attention kernel is not used for attention in windows of 3 x 4, 16 channels a head' in message
    assert 'output differs from the definition by' in message and message.endswith('sdpa is used instead')


def test_auto_falls_back_where_compiling_fails(auto, warnings, monkeypatch, tmp_path):
    """Triton builds its launcher with a C compiler; this is its own error where there is none."""
    from triton.runtime.build import _build

    monkeypatch.delenv('CC', raising=False)
    monkeypatch.setenv('PATH', str(tmp_path))
    needed = [p for p in inspect.signature(_build).parameters.values() if p.default is p.empty]
    lists = [[] for _ in needed[3:]]  # of folders and flags; versions of Triton have three or four
    monkeypatch.setattr(kernel, 'launch', lambda *_: _build('launcher', '', str(tmp_path), *lists))
    args = arguments()
    assert all(torch.equal(auto(*args), sdpa.attention(*args)) for _ in range(2))
    (message,) = warnings()
    assert 'it fails with RuntimeError: Failed to find C compiler' in message


@pytest.mark.parametrize('version', ['3.2.0', '3.3.1+git1', '2.1'])
def test_auto_falls_back_from_an_old_triton(auto, warnings, monkeypatch, version):
    monkeypatch.setattr(triton, '__version__', version)
    monkeypatch.delattr(triton, 'knobs')  # as there
    args = arguments()
    assert all(torch.equal(auto(*args), sdpa.attention(*args)) for _ in range(2))
    assert warnings() == [f'the triton attention kernel is not used: triton {version} is older than 3.4']


@pytest.mark.parametrize('version', ['3.4.0', '3.10.0', '4.0.0+cu130'])
def test_newer_versions_of_triton_are_accepted(monkeypatch, version):
    monkeypatch.setattr(triton, '__version__', version)
    assert 'older' not in (kernel.unsupported_reason(DEVICE, torch.float32, D, False) or '')


def test_auto_falls_back_without_triton(auto, warnings, monkeypatch):
    monkeypatch.setattr(kernel, 'triton', None)
    args = arguments()
    assert torch.equal(auto(*args), sdpa.attention(*args))
    assert warnings() == ['the triton attention kernel is not used: triton is not installed']


@pytest.mark.parametrize('error', [torch.OutOfMemoryError('CUDA out of memory'), RuntimeError('[CUDA]: out of memory')])
def test_running_out_of_memory_is_not_remembered(auto, warnings, monkeypatch, error):
    def full(*_):
        raise error

    args = arguments()
    with monkeypatch.context() as patch:
        patch.setattr(kernel, 'launch', full)
        assert torch.equal(auto(*args), sdpa.attention(*args))
    assert torch.equal(auto(*args), kernel.attention(*args))
    assert not warnings()


def test_each_case_is_checked_once(auto, checks):
    qkv, pad, bias, *rest = arguments()
    for _ in range(2):
        auto(qkv, pad, bias, *rest)
        auto(qkv, pad, bias.half(), *rest)
        auto(qkv.half(), pad.half(), bias, *rest)
        auto(qkv, pad, bias, *rest[:2], torch.ones(1, device=DEVICE))
    half, cosine = torch.float16, case(cosine=True)
    assert checks == [case(), case(bias_dtype=half), case(half), cosine]


def test_nothing_is_checked_in_compiled_code(auto, checks, monkeypatch):
    args = arguments()
    compiled = torch.compile(auto, backend='aot_eager', fullgraph=True)
    assert torch.equal(compiled(*args), kernel.attention(*args)) and not checks
    # What eager mode has found holds for code that is compiled later.
    monkeypatch.setattr(self_check, 'find_problem', lambda *_: 'wrong')
    auto(*args)
    torch.compiler.reset()
    compiled = torch.compile(auto, backend='aot_eager', fullgraph=True)
    monkeypatch.setattr(kernel, 'launch', None)
    assert torch.equal(compiled(*args), sdpa.attention(*args))


def test_nothing_is_checked_on_fake_tensors_and_while_capturing(auto, checks, monkeypatch):
    args = arguments()
    with FakeTensorMode() as mode:
        fake = [mode.from_tensor(t) if isinstance(t, torch.Tensor) else t for t in args]
        assert auto(*fake).shape == (1, 3, 5, D) and not checks
    with monkeypatch.context() as patch:
        patch.setattr(torch.cuda, 'is_available', lambda: True)
        patch.setattr(torch.cuda, 'is_current_stream_capturing', lambda: True)
        auto(*args)
    assert not checks
    auto(*args)
    assert len(checks) == 1


def test_the_check_leaves_no_trace(auto):
    """It draws no random numbers, and is not seen by modes, autocast and the like of the code around it."""
    args, state = arguments(), torch.get_rng_state()
    with torch.inference_mode(), torch.autocast(DEVICE.type, torch.bfloat16), FlopCounterMode(display=False) as counter:
        out = auto(*args)
    first = counter.get_total_flops()
    with FlopCounterMode(display=False) as counter:
        assert torch.equal(auto(*args), out)
    assert torch.equal(torch.get_rng_state(), state)
    assert first == counter.get_total_flops() > 0


@pytest.mark.parametrize('pyramid', [SwinPyramid, SwinPyramidV2])
def test_whole_models_use_the_checked_kernel_under_autocast(auto, monkeypatch, pyramid):
    """As in training with mixed precision: map in lower precision, parameters in float32."""
    options = dict(embed_dims=16, depths=(2,), num_heads=(1,), strides=(4,), window_size=3, out_indices=(0,))
    model = randomise(pyramid(**options, drop_path_rate=0.0)).to(DEVICE)
    exact = copy.deepcopy(model).double()
    image = torch.rand(1, 3, 20, 28, device=DEVICE)
    launched, launch = set(), kernel.launch
    monkeypatch.setattr(kernel, 'launch', lambda f, *rest: launched.add(f.__name__) or launch(f, *rest))
    runs = []
    for twin, dtype in ((model, torch.float16), (model, torch.float16), (exact, None)):
        with torch.autocast(DEVICE.type, dtype or torch.bfloat16, enabled=dtype is not None):
            (out,) = twin(image.to(next(twin.parameters()).dtype))
        names, parameters = zip(*twin.named_parameters(), strict=True)
        runs.append([out, *torch.autograd.grad(out.double().square().sum(), parameters)])
    assert launched == {'_forward', '_backward'}
    assert all(torch.equal(a, b) for a, b in zip(runs[0], runs[1], strict=True))
    for name, actual, expected in zip(('out', *names), runs[0], runs[2], strict=True):
        assert (actual.double() - expected).abs().max() <= 2e-2 * expected.abs().max(), name


OLD = """
from . import language
__version__ = '3.2.0'
def jit(function=None, *, do_not_specialize=None):
    return function or jit
"""
LANGUAGE = """
class constexpr:
    def __init__(self, value):
        self.value = value
"""
IMPORT = """
import importlib, sys
import torch._dynamo  # torch itself is made for the Triton that is there

def reason():
    for name in [n for n in sys.modules if n.partition('.')[0] == 'triton' or n == 'swin_mm.ops.attention.triton']:
        if sys.modules[name]:
            del sys.modules[name]
    kernel = importlib.import_module('swin_mm.ops.attention.triton')
    return kernel.unsupported_reason(torch.device('cuda'), torch.half, 32, False)

sys.modules['triton'] = None
print(reason())
del sys.modules['triton']
sys.path.insert(0, sys.argv[1])
print(reason())
"""


def test_importing_works_without_triton_and_with_an_old_one(tmp_path):
    """In a process of its own; the old Triton is what the module uses of Triton 3.2."""
    (tmp_path / 'triton').mkdir()
    (tmp_path / 'triton/__init__.py').write_text(OLD)
    (tmp_path / 'triton/language.py').write_text(LANGUAGE)
    done = subprocess.run([sys.executable, '-c', IMPORT, str(tmp_path)], capture_output=True, text=True)
    assert done.stdout.splitlines() == ['triton is not installed', 'triton 3.2.0 is older than 3.4'], done.stderr
