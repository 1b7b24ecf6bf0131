"""Check of an attention kernel against the definition, which ``attention='auto'`` makes before it trusts the kernel."""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

from swin_mm.ops import verification
from swin_mm.ops.attention import reference
from swin_mm.ops.windows import Size, tracing

HEADS = 2
WARNING = 'the triton attention kernel is not used for {key}: {problem}; sdpa is used instead'
INPUTS = ('qkv', 'padding', 'the bias', 'the scale')
NAMES = ('output', 'output in training', *(f'gradient of {name}' for name in INPUTS))


class Case(NamedTuple):
    """What a kernel is compiled for.

    Args:
        device: with its index.
        dtype: of q, k and v.
        bias_dtype: of the position bias.
        window: (Hw, Ww).
        head_size: d.
        cosine: cosine attention (V2).
    """

    device: torch.device
    dtype: torch.dtype
    bias_dtype: torch.dtype
    window: Size
    head_size: int
    cosine: bool

    def __str__(self) -> str:
        """The case in messages."""
        kind = 'cosine attention' if self.cosine else 'attention'
        size = f'{kind} in windows of {self.window[0]} x {self.window[1]}, {self.head_size} channels a head'
        return f'{size}, {self.dtype} with bias {self.bias_dtype}, on {self.device}'


def is_trusted(
    attention: Callable[..., Tensor], qkv: Tensor, bias: Tensor, window: Size, scale: float | Tensor
) -> bool:
    """Whether a kernel may be used for these inputs. The first use of each case in eager mode is checked.

    Nothing is checked in compilers, on tensors without data and while a CUDA graph is captured; a kernel of which no
    problem is known is trusted there. When the memory does not suffice for the check, the kernel is not used this time.
    """
    head_size = int(qkv.shape[3] // 3 // bias.shape[0])  # never symbolic
    if torch.compiler.is_compiling():
        return not _known_problem(qkv.device, qkv.dtype, head_size)
    case = Case(qkv.device, qkv.dtype, bias.dtype, window, head_size, isinstance(scale, Tensor))
    if case not in verification.problems and (type(qkv) is not Tensor or tracing()):
        return True
    return verification.checked(case, lambda: find_problem(attention, case), WARNING)


@torch.compiler.assume_constant_result
def _known_problem(device: torch.device, dtype: torch.dtype, head_size: int) -> str:
    """A problem that was found in such inputs in eager mode, or ''; the size of a compiled window may be symbolic."""
    found = ((case, problem) for case, problem in verification.problems.items() if isinstance(case, Case))
    same = (p for c, p in found if p and (c.device, c.dtype, c.head_size) == (device, dtype, head_size))
    return next(same, '')


def find_problem(attention: Callable[..., Tensor], case: Case) -> str:
    """Compare a kernel with the definition in float64: outputs and gradients on a small map with padding and shift.

    Args:
        attention: with the signature of :func:`swin_mm.ops.attention.reference.attention`.
        case: what to compare.

    Returns:
        What is wrong, in one line, or ''.

    Raises:
        torch.OutOfMemoryError: the memory does not suffice.
    """
    return verification.find_problem(
        lambda: _results(attention, case),
        lambda: _results(reference.attention, case, exact=True),
        verification.LIMITS[case.dtype],
        NAMES,
    )


def _results(attention: Callable[..., Tensor], case: Case, exact: bool = False) -> list[Tensor]:
    """Output in inference and in training, and gradients; in float64 if ``exact``."""
    inputs = _inputs(case)
    wide = [t.detach().double().requires_grad_() if isinstance(t, Tensor) else t for t in inputs]
    shift = ((case.window[0] - 1) // 2, (case.window[1] - 1) // 2)

    def apply(attention: Callable[..., Tensor], inputs: list) -> Tensor:
        return attention(*inputs[:3], case.window, shift, inputs[3])

    if exact:
        inputs = wide
    with torch.no_grad():
        frozen, expected = apply(attention, inputs), apply(reference.attention, wide)
    # With a gradient that is like the output, the sum that is the gradient of the scale does not cancel out.
    grad = (expected + 1.5 * verification.wave(expected.shape, 1.7, case.device)).to(case.dtype)
    out = apply(attention, inputs)
    return [frozen, out, *torch.autograd.grad(out, [t for t in inputs if isinstance(t, Tensor)], grad.to(out.dtype))]


def _inputs(case: Case) -> list:
    """Map, padding, bias and scale."""
    Hw, Ww = case.window
    # 2 x 3 windows; some tokens of each kind attend to padding, which is less than what the shift leaves of a window.
    size = (2 * Hw - (Hw + 2) // 4, 3 * Ww - (Ww + 2) // 4)
    C, N = HEADS * case.head_size, Hw * Ww
    shapes = (2, *size, 3 * C), (3 * C,), (HEADS, N, N)
    dtypes = case.dtype, case.dtype, case.bias_dtype
    tensors: list = [
        (1.5 * verification.wave(shape, step, case.device)).to(dtype).requires_grad_()
        for shape, step, dtype in zip(shapes, (2.3, 1.9, 1.3), dtypes, strict=True)
    ]
    if not case.cosine:
        return [*tensors, case.head_size**-0.5]
    return [*tensors, torch.tensor([4.0, 9.0], device=case.device, requires_grad=True)]
