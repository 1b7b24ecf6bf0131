"""Check the installation: ``python -m swin_mm.doctor`` prints which libraries work and how to fix the others."""

import platform
import statistics
import sys
from collections.abc import Callable, Iterable

import torch
from torch import Tensor

from swin_mm.ops.attention import cpu, sdpa, self_check, triton
from swin_mm.ops.windows import Size
from swin_mm.utils.environment import (
    LINES,
    MODULES,
    NAMES,
    OPTIONAL,
    USES,
    find_distributions,
    find_problem,
    is_installed,
    openmmlab_line,
)
from swin_mm.version import __version__

# The attention that is checked on a GPU: window, and whether it is cosine attention.
KINDS = {'V1, 7 x 7': ((7, 7), False), 'V2, 8 x 8': ((8, 8), True)}
DTYPES = {'bf16': torch.bfloat16, 'fp16': torch.float16, 'fp32': torch.float32}
HEAD_SIZE, HEADS, MAP = 32, 3, (200, 320)  # what is timed: the first stage of Swin-T on an image of 800 x 1280


def main() -> int:
    """Print versions, what works, and how to fix the rest.

    Returns:
        1 if something that is installed does not work, else 0.
    """
    problems = {module: find_problem(module) for module in MODULES}
    broken = {module for module, problem in problems.items() if problem and is_installed(module)}
    no_kernel = cpu.unsupported_reason(torch.device('cpu'), torch.float32, head_size=32, dropout=False)
    notes = [
        f'optional: {problem}' if module in OPTIONAL and module not in broken else problem
        for module, problem in problems.items()
        if problem and (module != 'mmcv._ext' or is_installed('mmcv'))
    ]
    if no_kernel:
        notes.append(f'optional: the attention kernel for CPUs cannot be used: {no_kernel}')
    print(f'swin_mm {__version__}\n')
    print_table(('library', 'version', 'state'), *versions(problems, broken, bool(no_kernel)))
    print_table(('use', 'state'), *uses(problems))
    if torch.cuda.is_available():
        device = torch.device('cuda', torch.cuda.current_device())
        rows, kernel_notes = attention_kernels(device)
        print(f'attention on {device}: ms of forward and backward, one image')
        print_table(('attention', 'dtype', 'triton kernel', 'triton', 'sdpa'), *rows)
        notes += kernel_notes
    for note in notes:
        print(f'- {note}')
    return 1 if broken else 0


def versions(problems: dict[str, str], broken: set[str], no_kernel: bool) -> Iterable[tuple[str, str, str]]:
    """The version and the state of each library.

    Args:
        problems: what ``find_problem`` says about each library, '' if it works.
        broken: the libraries that are installed and do not work.
        no_kernel: whether the compiled attention kernel cannot be used.
    """
    yield 'python', platform.python_version(), 'works'
    yield 'CUDA', torch.version.cuda or '-', cuda_state()
    for module, problem in problems.items():
        state = 'broken' if module in broken else 'absent' if problem else 'works'
        distributions = find_distributions(module) if module in LINES['onedl'] else []
        version = ' '.join([getattr(sys.modules.get(module), '__version__', '-'), *distributions])
        yield NAMES.get(module, module), version, state
    yield 'OpenMMLab', openmmlab_line() or '-', line_state()
    yield 'attention kernel for CPUs', torch.backends.cpu.get_cpu_capability(), 'absent' if no_kernel else 'works'


def uses(problems: dict[str, str]) -> Iterable[tuple[str, str]]:
    """What the package can be used for, and what is missing for the rest."""
    for use, modules in USES.items():
        missing = [NAMES.get(module, module) for module in modules if problems[module]]
        yield use, f'needs {", ".join(missing)}' if missing else 'works'


def line_state() -> str:
    """What the installed line of OpenMMLab's distributions is."""
    return {
        'onedl': 'the maintained distributions',
        'original': 'the original distributions, for numpy < 2 and setuptools < 82',
        'mixed': 'distributions of both lines; install one of them',
        '': 'not installed: the plain models work, configs do not',
    }[openmmlab_line()]


def attention_kernels(device: torch.device) -> tuple[list[tuple[str, ...]], list[str]]:
    """What ``attention='auto'`` finds when it checks the Triton kernel, and the times of both kernels on a GPU.

    Args:
        device: with its index; a CPU only if Triton interprets its kernels.

    Returns:
        Rows of a table, and a note on each problem.
    """
    rows, notes = [], []
    for kind, (window, cosine) in KINDS.items():
        for name, dtype in DTYPES.items():
            case = self_check.Case(device, dtype, torch.float32, window, HEAD_SIZE, cosine)
            try:
                problem = triton.unsupported_reason(device, dtype, HEAD_SIZE, False)
                problem = problem or self_check.find_problem(triton.attention, case)
            except torch.OutOfMemoryError:
                problem = 'too little free memory to check it'
            if problem:
                notes.append(f'optional: the attention kernel for GPUs is not used for {case}: {problem}')
            times = ['-', '-']
            if device.type == 'cuda':
                kernels = [None if problem else triton.attention, sdpa.attention]
                times = ['-' if k is None else milliseconds(k, device, dtype, window, cosine) for k in kernels]
            rows.append((kind, name, 'not used' if problem else 'equals the definition', *times))
    return rows, notes


def milliseconds(
    attention: Callable[..., Tensor], device: torch.device, dtype: torch.dtype, window: Size, cosine: bool
) -> str:
    """Median time of forward and backward on a GPU."""
    C, N = HEADS * HEAD_SIZE, window[0] * window[1]
    sizes, dtypes = ((1, *MAP, 3 * C), (3 * C,), (HEADS, N, N)), (dtype, dtype, torch.float32)
    inputs = [
        torch.ones(size, device=device, dtype=d, requires_grad=True) for size, d in zip(sizes, dtypes, strict=True)
    ]
    scale = torch.ones(HEADS, device=device) if cosine else HEAD_SIZE**-0.5
    times = []
    try:
        for _ in range(13):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            out = attention(*inputs, window, (window[0] // 2, window[1] // 2), scale)
            torch.autograd.grad(out, inputs, torch.ones_like(out))
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end))
    except torch.OutOfMemoryError:
        return 'out of memory'
    return f'{statistics.median(times[3:]):.2f}'


def cuda_state() -> str:
    """The GPUs that torch can use."""
    if torch.cuda.is_available():
        return f'{torch.cuda.device_count()} x {torch.cuda.get_device_name()}'
    return 'no GPU that torch can use; everything runs on the CPU'


def print_table(*rows: tuple[str, ...]) -> None:
    """Print aligned columns and an empty line; the first row is the header."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    for row in rows:
        print('  '.join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())
    print()


if __name__ == '__main__':
    sys.exit(main())
