"""Which of the libraries that swin_mm depends on work here, and the command that fixes each one that does not."""

import importlib.util
from contextlib import suppress
from functools import cache
from importlib import import_module
from importlib.metadata import PackageNotFoundError, distribution, packages_distributions

from swin_mm.utils.errors import DependencyError

# Distributions of OpenMMLab, by import name. There are two lines of them with the same import names: `onedl` is
# maintained and supports current versions of torch and numpy; `original` ended with these releases.
LINES = {
    'onedl': {
        'mmengine': 'onedl-mmengine',
        'mmcv': 'onedl-mmcv',
        'mmdet': 'onedl-mmdetection',
        'mmseg': 'onedl-mmsegmentation',
        'mmpretrain': 'onedl-mmpretrain',
    },
    'original': {
        'mmengine': 'mmengine==0.10.7',
        'mmcv': 'mmcv==2.1.0',
        'mmdet': 'mmdet==3.3.0',
        'mmseg': 'mmsegmentation==1.2.2',
        'mmpretrain': 'mmpretrain==1.2.0',
    },
}
# What mmcv is built with, besides torch. A newer opencv, which mmcv requires, would bring numpy 2.
BUILD_TOOLS = {
    'onedl': 'setuptools wheel ninja',
    'original': "'numpy<2' 'opencv-python<4.12' 'setuptools<82' wheel ninja",
}
# What the doctor reports on.
MODULES = ('torch', 'mmengine', 'mmcv', 'mmcv._ext', 'mmdet', 'mmseg', 'mmpretrain', 'triton')
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
    'the plain models': ('torch',),
    'the backbones': ('torch', 'mmengine'),
    'detection configs': SCOPES['mmdet'],
    'segmentation configs': SCOPES['mmseg'],
    'classification configs': SCOPES['mmpretrain'],
}


def is_installed(module: str) -> bool:
    """Whether the top-level package of ``module`` can be found (it may still be broken)."""
    return importlib.util.find_spec(module.partition('.')[0]) is not None


def openmmlab_line() -> str:
    """The line of OpenMMLab's distributions that is installed: a key of :data:`LINES`, 'mixed', or '' for neither."""
    owners = [owner for module in LINES['onedl'] for owner in find_distributions(module)]
    lines = {'onedl' if owner.startswith('onedl') else 'original' for owner in owners}
    return 'mixed' if len(lines) > 1 else ''.join(lines)


def install_command(module: str) -> str:
    """Return the command that installs a module, for OpenMMLab from the line that is installed."""
    package = module.partition('.')[0]
    line = 'original' if openmmlab_line() == 'original' else 'onedl'
    if package == 'mmcv':  # built with the torch that is installed
        again = '--force-reinstall --no-deps --no-cache-dir ' if module == 'mmcv._ext' else ''
        build = f'MMCV_WITH_OPS=1 pip install --no-build-isolation {again}{LINES[line]["mmcv"]}'
        return f'pip install {BUILD_TOOLS[line]} && {build}'
    if module == 'mmengine' and line == 'onedl':  # it imports cv2, and does not require it
        return f'pip install {LINES[line]["mmengine"]} {DISTRIBUTIONS["cv2"]}'
    return f'pip install {LINES[line].get(module) or DISTRIBUTIONS.get(module, module)}'


def find_problem(module: str) -> str:
    """Import a module. Return the problem and the command that fixes it in one sentence, or '' if it works."""
    package = module.partition('.')[0]
    name = NAMES.get(module, module)
    fix = install_command(module)
    if not is_installed(module):
        return f'{package} is not installed; install it with: {fix}'
    # Two distributions of one package overwrite each other's files, depending on the order of installation.
    owners = find_distributions(package)
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
    if module == 'mmengine' and openmmlab_line() == 'original' and not is_installed('pkg_resources'):
        return "the original mmengine needs pkg_resources, which setuptools 82 removed: pip install 'setuptools<82'"
    return ''


def needs_mmengine(name: str) -> DependencyError:
    """The error for a public name that exists with mmengine only."""
    return DependencyError(
        f"{name} needs mmengine, which is not installed; install the extra det, seg or all: pip install 'swin_mm[det]' "
        '(or the original mmengine, mmcv and mmdet). Without OpenMMLab, use swin_mm.SwinPyramid or SwinPyramidV2'
    )


def require(*modules: str) -> None:
    """Import what a program is about to use, for instance ``require(*SCOPES['mmdet'])``.

    Raises:
        DependencyError: the first of them that is missing or broken, with the command that fixes it.
    """
    for module in modules:
        if problem := find_problem(module):
            raise DependencyError(problem)


def find_distributions(module: str) -> list[str]:
    """Names of the installed distributions that contain a module; more than one overwrite each other's files."""
    package = module.partition('.')[0]
    found = {name.replace('_', '-') for name in distributions_by_module().get(package, [])}
    # Python 3.10 does not find the modules of distributions without top_level.txt, such as onedl-mmengine.
    for line in LINES.values():
        if package in line:
            with suppress(PackageNotFoundError):
                found.add(distribution(line[package].partition('==')[0]).metadata['Name'].replace('_', '-'))
    return sorted(found)


@cache
def distributions_by_module() -> dict[str, list[str]]:
    """The installed distributions by the top-level modules that they contain."""
    return dict(packages_distributions())
