"""The host's time for one attention call, on a CPU, with the Triton kernels left out.

    python -m benchmarks.host_time

At batch 1 a GPU waits for the host. This is what PyTorch and this package do around the launches of a call; Triton's
own launcher is not in it. Plain calls and calls as operators, which compilers and dispatch modes see, take turns.
"""

import os
import statistics
import sys
import time
from collections.abc import Callable
from typing import Any

os.environ['TRITON_INTERPRET'] = '1'  # no GPU is needed

import torch

from swin_mm.ops import attention
from swin_mm.ops.attention import self_check, triton

ROUNDS, CALLS = 30, 100
WINDOW, SHIFT, HEADS, D = (7, 7), (3, 3), 3, 32


def make_calls(run: Callable[..., torch.Tensor]) -> dict[str, Callable[[], object]]:
    """One call in inference, and one with its backward pass in training."""
    N, C = WINDOW[0] * WINDOW[1], HEADS * D
    qkv, pad = torch.randn(1, 14, 14, 3 * C, dtype=torch.float16), torch.randn(3 * C, dtype=torch.float16)
    bias = torch.randn(HEADS, N, N)
    trained = [t.clone().requires_grad_() for t in (qkv, pad, bias)]
    grad = torch.randn(1, 14, 14, C, dtype=torch.float16)

    def infer() -> None:
        with torch.no_grad():
            run(qkv, pad, bias, WINDOW, SHIFT, D**-0.5)

    def train() -> None:
        torch.autograd.grad(run(*trained, WINDOW, SHIFT, D**-0.5), trained, grad)

    return {'inference': infer, 'forward and backward': train}


def as_operators(*args: Any) -> torch.Tensor:
    """The call as dispatch modes see it."""
    original = triton.operators_are_seen
    triton.operators_are_seen = lambda _: True
    try:
        return attention.auto(*args)
    finally:
        triton.operators_are_seen = original


def microseconds(call: Callable[[], object]) -> float:
    """Mean processor time of some calls, in which other load does not count."""
    begin = time.thread_time()
    for _ in range(CALLS):
        call()
    return (time.thread_time() - begin) / CALLS * 1e6


def main() -> int:
    """Print a table."""
    torch.set_num_threads(1)
    attention.PREFERRED['cpu'] = 'triton'
    triton.launch = lambda *_: None
    self_check.find_problem = lambda *_: ''  # else it would find that nothing is computed
    plain, operators = make_calls(attention.auto), make_calls(as_operators)
    print('| microseconds of the host a call | as operators | plain | ratio |\n| --- | --- | --- | --- |')
    for name in plain:
        rounds = [(microseconds(operators[name]), microseconds(plain[name])) for _ in range(ROUNDS)][ROUNDS // 5 :]
        before, after = (statistics.median(column) for column in zip(*rounds, strict=True))
        ratio = statistics.median(b / a for b, a in rounds)
        print(f'| {name} | {before:.0f} | {after:.0f} | {ratio:.2f} |')
    return 0


if __name__ == '__main__':
    sys.exit(main())
