"""What all tests of attention kernels share."""

from importlib.util import find_spec

import pytest
import torch


@pytest.fixture(autouse=True)
def bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Without a GPU the Triton kernels run in the interpreter; let it compute in bfloat16."""
    if not torch.cuda.is_available() and find_spec('triton'):
        from support.interpreter import mend_bfloat16

        mend_bfloat16(monkeypatch)
