"""Which of the libraries that swin_mm depends on work here, and the command that fixes each one that does not."""

import importlib.util
from functools import cache
from importlib import import_module
from importlib.metadata import packages_distributions

from swin_mm.utils.errors import DependencyError

_BUILD = 'pip install setuptools wheel ninja && MMCV_WITH_OPS=1 pip install --no-build-isolation'
# Import name -> the command that installs it. The original distributions (mmdet, mmsegmentation, ...) work, too.
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
# Distributions that have another name than the module that they install.
DISTRIBUTIONS = {
    'cv2': 'opencv-python-headless',
    'modelindex': 'model-index',
    'PIL': 'pillow',
    'skimage': 'scikit-image',
    'sklearn': 'scikit-learn',
    'yaml': 'pyyaml',
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


def is_installed(module: str) -> bool:
    """Whether the top-level package of ``module`` can be found (it may still be broken)."""
    return importlib.util.find_spec(module.partition('.')[0]) is not None


def install_command(module: str) -> str:
    """Return the command that installs a module."""
    return FIXES.get(module, f'pip install {DISTRIBUTIONS.get(module, module)}')


def find_problem(module: str) -> str:
    """Import a module. Return the problem and the command that fixes it in one sentence, or '' if it works."""
    package = module.partition('.')[0]
    name = NAMES.get(module, module)
    fix = FIXES[module]
    if not is_installed(module):
        return f'{package} is not installed; install it with: {fix}'
    # Two distributions of one package overwrite each other's files, depending on the order of installation.
    owners = _owners(package)
    if len(owners) > 1:
        return f'{" and ".join(owners)} both install {package}; keep one: pip uninstall -y {" ".join(owners)} && {fix}'
    try:
        import_module(module)
    except ModuleNotFoundError as error:
        if error.name == module:
            return f'{name} are not there (a build without them, or mmcv-lite); build them with: {fix}'
        return f'{name} does not import: {error}; install that with: {install_command(error.name or "")}'
    except Exception as error:  # a broken binary or a check of versions may raise anything
        return f'{name} does not import ({" ".join(str(error).split())}); reinstall it with: {fix}'
    return ''


def require(*modules: str) -> None:
    """Import what a program is about to use, for instance ``require(*SCOPES['mmdet'])``.

    Raises:
        DependencyError: the first of them that is missing or broken, with the command that fixes it.
    """
    for module in modules:
        if problem := find_problem(module):
            raise DependencyError(problem)


@cache
def _distributions() -> dict[str, list[str]]:
    return dict(packages_distributions())


def _owners(package: str) -> list[str]:
    return sorted(set(_distributions().get(package, [])))
