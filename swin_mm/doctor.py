"""Which of the libraries under swin_mm work here, and the command that mends each one that does not.

``python -m swin_mm.doctor`` prints a table; ``require`` is the same check for programs.
"""

import importlib.util
import platform
import sys
from functools import cache
from importlib import import_module
from importlib.metadata import packages_distributions

import torch
from rich.console import Console
from rich.table import Table

from swin_mm.kernels import cpu
from swin_mm.version import __version__

_BUILD = 'pip install setuptools wheel ninja && MMCV_WITH_OPS=1 pip install --no-build-isolation'
# Import name -> what installs it. The original distributions (mmdet, mmsegmentation, ...) serve as well.
FIXES = {
    'torch': 'pip install torch',
    'mmengine': 'pip install onedl-mmengine',
    'mmcv': f'{_BUILD} onedl-mmcv',
    'mmcv._ext': f'{_BUILD} --force-reinstall --no-deps --no-cache-dir onedl-mmcv',
    'mmdet': 'pip install onedl-mmdetection',
    'mmseg': 'pip install onedl-mmsegmentation',
    'mmpretrain': 'pip install onedl-mmpretrain',
    'triton': 'pip install triton',
}
OPTIONAL = ('mmpretrain', 'triton')
NAMES = {'mmcv._ext': 'compiled ops of mmcv'}
# What a config needs, by its `default_scope`.
SCOPES = {
    'mmdet': ('mmcv', 'mmcv._ext', 'mmdet'),
    'mmseg': ('mmcv', 'mmseg'),
    'mmpretrain': ('mmcv', 'mmpretrain'),
}
USES = {
    'the backbones': ('torch', 'mmengine'),
    'detection configs': SCOPES['mmdet'],
    'segmentation configs': SCOPES['mmseg'],
    'classification configs': SCOPES['mmpretrain'],
}


class DependencyError(ImportError):
    """A library that is needed is absent or broken; the message names it and the command that mends it."""


def is_installed(module: str) -> bool:
    """Whether the top-level package of ``module`` can be found (it may still be broken)."""
    return importlib.util.find_spec(module.partition('.')[0]) is not None


def find_problem(module: str) -> str:
    """Import a module; what is wrong and the command that mends it in one sentence, or '' if it works."""
    package = module.partition('.')[0]
    name = NAMES.get(module, module)
    fix = FIXES[module]
    if not is_installed(module):
        return f'{package} is not installed; install it with: {fix}'
    # Two distributions of one package overwrite each other's files in an order that nobody chose.
    owners = _owners(package)
    if len(owners) > 1:
        return f'{" and ".join(owners)} both install {package}; keep one: pip uninstall -y {" ".join(owners)} && {fix}'
    try:
        import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module:
            return f'{name} are not there (a build without them, or mmcv-lite); build them with: {fix}'
        return f'{name} does not import: {error}; install that with: pip install {error.name}'
    except Exception as error:  # a broken binary or a check of versions may raise anything
        return f'{name} does not import ({" ".join(str(error).split())}); reinstall it with: {fix}'
    return ''


def require(*modules: str) -> None:
    """Import what a program is about to use, for instance ``require(*SCOPES['mmdet'])``.

    Raises:
        DependencyError: the first of them that is absent or broken, with the command that mends it.
    """
    for module in modules:
        if problem := find_problem(module):
            raise DependencyError(problem)


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
    no_kernel = cpu.refuses(torch.device('cpu'), torch.float32, 32, False)
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


@cache
def _distributions() -> dict[str, list[str]]:
    return dict(packages_distributions())


def _owners(package: str) -> list[str]:
    return sorted(set(_distributions().get(package, [])))


def _cuda_state() -> str:
    if torch.cuda.is_available():
        return f'[green]{torch.cuda.device_count()} x {torch.cuda.get_device_name()}'
    return '[yellow]no GPU that torch can use; everything runs on the CPU'


if __name__ == '__main__':
    sys.exit(main())
