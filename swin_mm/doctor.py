"""Check the installation: ``python -m swin_mm.doctor`` prints which libraries work and how to fix the others."""

import platform
import statistics
import sys
from collections.abc import Callable

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor

from swin_mm.ops.attention import cpu, sdpa, self_check, triton
from swin_mm.ops.windows import Size
from swin_mm.utils.environment import FIXES, NAMES, OPTIONAL, USES, find_problem, is_installed
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
    problems = {module: find_problem(module) for module in FIXES}
    broken = {module for module, problem in problems.items() if problem and is_installed(module)}
    no_kernel = cpu.unsupported_reason(torch.device('cpu'), torch.float32, head_size=32, dropout=False)
    console = Console(highlight=False)
    console.print(versions_table(problems, broken, bool(no_kernel)))
    console.print(uses_table(problems))
    notes = [
        f'optional: {problem}' if module in OPTIONAL and module not in broken else problem
        for module, problem in problems.items()
        if problem
    ]
    if no_kernel:
        notes.append(f'optional: the attention kernel for CPUs cannot be used: {no_kernel}')
    if torch.cuda.is_available():
        table, kernel_notes = attention_table(torch.device('cuda', torch.cuda.current_device()))
        console.print(table)
        notes += kernel_notes
    for note in notes:
        console.print(f'- {note}', soft_wrap=True, markup=False)
    return 1 if broken else 0


def versions_table(problems: dict[str, str], broken: set[str], no_kernel: bool) -> Table:
    """The version and the state of each library.

    Args:
        problems: What ``find_problem`` says about each library, '' if it works.
        broken: The libraries that are installed and do not work.
        no_kernel: Whether the compiled attention kernel cannot be used.
    """
    table = Table('library', 'version', 'state', title=f'swin_mm {__version__}', title_justify='left')
    table.add_row('python', platform.python_version(), '[green]works')
    table.add_row('CUDA', torch.version.cuda or '-', cuda_state())
    for module, problem in problems.items():
        state = '[red]broken' if module in broken else '[yellow]absent' if problem else '[green]works'
        table.add_row(NAMES.get(module, module), getattr(sys.modules.get(module), '__version__', '-'), state)
    capability = torch.backends.cpu.get_cpu_capability()
    table.add_row('attention kernel for CPUs', capability, '[yellow]absent' if no_kernel else '[green]works')
    return table


def uses_table(problems: dict[str, str]) -> Table:
    """What the package can be used for, and what is missing for the rest."""
    table = Table('use', 'state', title='what works', title_justify='left')
    for use, modules in USES.items():
        missing = [NAMES.get(module, module) for module in modules if problems[module]]
        table.add_row(use, f'[yellow]needs {", ".join(missing)}' if missing else '[green]works')
    return table


def attention_table(device: torch.device) -> tuple[Table, list[str]]:
    """What ``attention='auto'`` finds when it checks the Triton kernel, and the times of both kernels on a GPU.

    Args:
        device: with its index; a CPU only if Triton interprets its kernels.

    Returns:
        The table, and a note on each problem.
    """
    title = f'attention on {device}: ms of forward and backward, one image'
    table = Table('attention', 'dtype', 'triton kernel', 'triton', 'sdpa', title=title, title_justify='left')
    notes = []
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
            table.add_row(kind, name, '[yellow]not used' if problem else '[green]equals the definition', *times)
    return table, notes


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
        return f'[green]{torch.cuda.device_count()} x {torch.cuda.get_device_name()}'
    return '[yellow]no GPU that torch can use; everything runs on the CPU'


if __name__ == '__main__':
    sys.exit(main())
