"""Check the installation: ``python -m swin_mm.doctor`` prints which libraries work and how to fix the others."""

import platform
import sys

import torch
from rich.console import Console
from rich.table import Table

from swin_mm.ops.attention import cpu
from swin_mm.utils.environment import FIXES, NAMES, OPTIONAL, USES, find_problem, is_installed
from swin_mm.version import __version__


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


def cuda_state() -> str:
    """The GPUs that torch can use."""
    if torch.cuda.is_available():
        return f'[green]{torch.cuda.device_count()} x {torch.cuda.get_device_name()}'
    return '[yellow]no GPU that torch can use; everything runs on the CPU'


if __name__ == '__main__':
    sys.exit(main())
