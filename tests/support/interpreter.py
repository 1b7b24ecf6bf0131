"""bfloat16 in Triton's interpreter, which keeps it as uint16, multiplies the bit patterns, and casts by truncation."""

import numpy as np
import pytest
import triton.language as tl
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle


def widen(data: np.ndarray) -> np.ndarray:
    """The float32 numbers of bfloat16 bit patterns."""
    return (data.astype(np.uint32) << 16).view(np.float32)


def round_to_bfloat16(data: np.ndarray) -> np.ndarray:
    """The bit patterns of the bfloat16 numbers that are nearest to float32 numbers, even ones at ties."""
    bits = np.ascontiguousarray(data).view(np.uint32)
    rounded = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
    return np.where(np.isnan(data), 0x7FC0, rounded).astype(np.uint16)


def mend_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    """Products of widened operands, and casts that round to nearest, as on GPUs."""
    create_dot, cast_impl = InterpreterBuilder.create_dot, InterpreterBuilder.cast_impl

    def widened(handle: TensorHandle) -> TensorHandle:
        return TensorHandle(widen(handle.data), tl.float32) if handle.dtype.scalar == tl.bfloat16 else handle

    def dot(self, a, b, *rest):
        return create_dot(self, widened(a), widened(b), *rest)

    def cast(self, source, to):
        if source.dtype.scalar == tl.float32 and to.scalar == tl.bfloat16:
            return TensorHandle(round_to_bfloat16(source.data), tl.bfloat16)
        return cast_impl(self, source, to)

    monkeypatch.setattr(InterpreterBuilder, 'create_dot', dot)
    monkeypatch.setattr(InterpreterBuilder, 'cast_impl', cast)
