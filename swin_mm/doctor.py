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
    """Print the table; 1 if something that is installed does not work, else 0."""
    problems = {module: find_problem(module) for module in FIXES}
    broken = {module for module, problem in problems.items() if problem and is_installed(module)}
    console = Console(highlight=False)

    versions = Table(title=f'swin_mm {__version__}', title_justify='left')
    for heading in ('library', 'version', 'state'):
        versions.add_column(heading)
    versions.add_row('python', platform.python_version(), '[green]works')
    versions.add_row('CUDA', torch.version.cuda or '-', _cuda_state())
    for module, problem in problems.items():
        state = '[red]broken' if module in broken else '[yellow]absent' if problem else '[green]works'
        found = sys.modules.get(module)
        versions.add_row(NAMES.get(module, module), getattr(found, '__version__', '-'), state)
    no_kernel = cpu.unsupported_reason(torch.device('cpu'), torch.float32, 32, False)
    capability = torch.backends.cpu.get_cpu_capability()
    versions.add_row('attention kernel for CPUs', capability, '[yellow]absent' if no_kernel else '[green]works')
    console.print(versions)

    works = Table(title='what works', title_justify='left')
    works.add_column('use')
    works.add_column('state')
    for use, modules in USES.items():
        lacking = [NAMES.get(module, module) for module in modules if problems[module]]
        works.add_row(use, f'[yellow]needs {", ".join(lacking)}' if lacking else '[green]works')
    console.print(works)

    for module, problem in problems.items():
        if problem:
            optional = 'optional: ' if module in OPTIONAL and module not in broken else ''
            console.print(f'- {optional}{problem}', soft_wrap=True, markup=False)
    if no_kernel:
        console.print(
            f'- optional: the attention kernel for CPUs cannot be used: {no_kernel}', soft_wrap=True, markup=False
        )
    return 1 if broken else 0


def _cuda_state() -> str:
    if torch.cuda.is_available():
        return f'[green]{torch.cuda.device_count()} x {torch.cuda.get_device_name()}'
    return '[yellow]no GPU that torch can use; everything runs on the CPU'


if __name__ == '__main__':
    sys.exit(main())
