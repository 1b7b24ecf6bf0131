"""The scope ``swin_mm``: a registry below mmengine's, and configs that find each other by library."""

import importlib.util
from importlib.metadata import PackageNotFoundError, distribution

from mmengine.config.utils import MODULE2PACKAGE
from mmengine.registry import HOOKS as ROOT_HOOKS
from mmengine.registry import MODELS as ROOT_MODELS
from mmengine.registry import OPTIM_WRAPPER_CONSTRUCTORS as ROOT_CONSTRUCTORS
from mmengine.registry import Registry

HOOKS = Registry('hook', parent=ROOT_HOOKS, scope='swin_mm', locations=['swin_mm.openmmlab.loading'])
MODELS = Registry('model', parent=ROOT_MODELS, scope='swin_mm', locations=['swin_mm.openmmlab.backbone'])
OPTIM_WRAPPER_CONSTRUCTORS = Registry(
    'optim wrapper constructor', parent=ROOT_CONSTRUCTORS, scope='swin_mm', locations=['swin_mm.openmmlab.layer_decay']
)


def _find_configs_by_module() -> None:
    """Let ``_base_ = 'mmseg::...'`` find mmseg whichever distribution brought it, and ``'swin_mm::...'`` find ours.

    mmengine looks such a base up by the name of the original distribution (``mmsegmentation`` for mmseg), so it
    reports mmseg as missing when ``onedl-mmsegmentation`` provides it. Where no distribution of the original name is
    installed but the module is, its own name leads mmengine to the same files.
    """
    MODULE2PACKAGE['swin_mm'] = 'swin_mm'
    for module, package in MODULE2PACKAGE.items():
        try:
            distribution(package)
        except PackageNotFoundError:
            if importlib.util.find_spec(module) is not None:
                MODULE2PACKAGE[module] = module


_find_configs_by_module()
