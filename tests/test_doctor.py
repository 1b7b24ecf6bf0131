"""The doctor's check of the attention kernel for GPUs. The rest of it is in tests/utils/test_environment.py."""

import pytest
import torch
from support.attention_cases import require_triton

from swin_mm import doctor
from swin_mm.ops.attention import triton as kernel

DEVICE = torch.device('cuda', 0) if torch.cuda.is_available() else torch.device('cpu')


@pytest.fixture
def small(monkeypatch):
    """One quick case; on a CPU Triton's interpreter runs it."""
    pytest.importorskip('triton')
    monkeypatch.setattr(doctor, 'KINDS', {'V1, 3 x 4': ((3, 4), False)})
    monkeypatch.setattr(doctor, 'DTYPES', {'fp32': torch.float32})


def test_kernel_that_equals_the_definition(small):
    require_triton()
    ((*_, state, _, _),), notes = doctor.attention_kernels(DEVICE)
    assert state == 'equals the definition' and not notes


def test_wrong_kernel_and_its_problem_are_shown(small, monkeypatch):
    require_triton()
    forward = kernel.forward
    monkeypatch.setattr(kernel, 'forward', lambda *args: [t * 1.1 for t in forward(*args)])
    ((*_, state, _, _),), (note,) = doctor.attention_kernels(DEVICE)
    assert state == 'not used'
    assert 'windows of 3 x 4' in note and 'its output differs from the definition by 0.1 of the largest value' in note


def test_old_triton_is_named(small, monkeypatch):
    monkeypatch.setattr(kernel.triton, '__version__', '3.2.0')
    ((*_, state, _, _),), (note,) = doctor.attention_kernels(DEVICE)
    assert state == 'not used' and 'triton 3.2.0 is older than 3.4' in note
