"""The registry scope ``swin_mm``, and the entries that let configs name each other by library."""

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


def register_config_libraries() -> None:
    """Make ``_base_ = 'swin_mm::...'`` work, and ``'mmseg::...'`` whichever distribution provides mmseg.

    mmengine finds the configs of a library by the distribution that its table ``MODULE2PACKAGE`` gives for the import
    name, and offers no function to add one. Two things are changed in that table:

    - ``swin_mm`` is added, by the name of a module in its folder: mmengine 0.10.7 looks for the files of a distribution
      beside its metadata, where those of an editable installation are not.
    - mmseg's entry is ``mmsegmentation``. Where ``onedl-mmsegmentation`` is installed instead, mmengine reports that
      mmseg is missing. An entry whose distribution is not installed, although the module is, becomes the module's own
      name, which mmengine then looks up as a module. An entry that works is never touched.
    """
    MODULE2PACKAGE.setdefault('swin_mm', 'swin_mm.version')
    for module in ('mmdet', 'mmseg', 'mmpretrain'):
        try:
            distribution(MODULE2PACKAGE.get(module, module))
        except PackageNotFoundError:
            if importlib.util.find_spec(module) is not None:
                MODULE2PACKAGE[module] = module


register_config_libraries()
