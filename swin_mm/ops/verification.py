"""A check of a kernel against its definition on the user's machine, made once before the kernel is trusted.

A kernel that is compiled on the user's machine may fail there for reasons that no test elsewhere can find: a missing
compiler, a version of Triton or a driver with a bug, a new GPU.
"""

import logging
from collections.abc import Callable, Hashable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial

import torch
from torch import Tensor

LIMITS = {torch.float32: 1e-4, torch.float16: 4e-3, torch.bfloat16: 3e-2}  # of the largest value of each tensor
problems: dict[Hashable, str] = {}  # what was found, or ''


def verified(
    key: Hashable,
    run: Callable[[], Sequence[Tensor]],
    definition: Callable[[], Sequence[Tensor]],
    limit: float,
) -> bool:
    """Whether a kernel gives the same tensors as its definition. Each key is checked once; a failure is logged.

    When the memory does not suffice for the check, the answer is no, and the next call checks again.

    Args:
        key: what the kernel is compiled for, as it should be named in the log.
        run: calls the kernel on small inputs, without random numbers.
        definition: computes the same in elementary operators.
        limit: allowed difference, in units of the largest value of each tensor.
    """
    find = partial(find_problem, run, definition, limit)
    return checked(key, find, 'the fused kernel for {key} is not used: {problem}')


def checked(key: Hashable, find: Callable[[], str], warning: str) -> bool:
    """Whether a check finds no problem. It runs once for each key; memory that does not suffice is not remembered.

    Args:
        key: what is checked.
        find: returns the problem, or ''; may raise ``torch.OutOfMemoryError``.
        warning: is logged, with ``{key}`` and ``{problem}`` filled in.
    """
    if key not in problems:
        try:
            problem = find()
        except torch.OutOfMemoryError:
            return False
        problems[key] = problem
        if problem:
            logging.getLogger('swin_mm').warning(warning.format(key=key, problem=problem))
    return not problems[key]


def forget() -> None:
    """Forget all results, so that the next use of each key is checked again."""
    problems.clear()


def wave(shape: Sequence[int], step: float, device: torch.device) -> Tensor:
    """Numbers that look random, in float64. Drawing random numbers would change those that a training draws."""
    shape = torch.Size(shape)
    return torch.arange(shape.numel(), dtype=torch.float64, device=device).mul_(step).sin_().view(shape)


def find_problem(
    run: Callable[[], Sequence[Tensor]], definition: Callable[[], Sequence[Tensor]], limit: float, names: Sequence = ()
) -> str:
    """Compare a kernel with its definition.

    Args:
        run: see :func:`verified`.
        definition: see :func:`verified`.
        limit: see :func:`verified`.
        names: what the tensors are.

    Returns:
        What is wrong, in one line, or ''.

    Raises:
        torch.OutOfMemoryError: the memory does not suffice.
    """
    # A thread of its own has no autocast, inference mode, dispatch modes, hooks on saved tensors and the like.
    with ThreadPoolExecutor(1) as pool:
        return pool.submit(_compare, run, definition, limit, names).result()


def _compare(
    run: Callable[[], Sequence[Tensor]], definition: Callable[[], Sequence[Tensor]], limit: float, names: Sequence
) -> str:
    try:
        for i, (actual, expected) in enumerate(zip(run(), definition(), strict=True)):
            error, largest = (actual.double() - expected.double()).abs().max().item(), expected.abs().max().item()
            if not error <= limit * largest:  # NaN is an error
                name = names[i] if names else f'result {i}'
                return f'its {name} differs from the definition by {error / largest:.2g} of the largest value'
    except Exception as error:
        if isinstance(error, torch.OutOfMemoryError | MemoryError) or 'out of memory' in str(error):
            raise torch.OutOfMemoryError(str(error)) from error
        return f'it fails with {type(error).__name__}: {" ".join(str(error).split())[:300]}'
    return ''
