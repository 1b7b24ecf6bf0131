"""The registries, in the module that mmengine imports by itself when a config names a type ``swin_mm.X``."""

from swin_mm.openmmlab.registry import HOOKS, MODELS, OPTIM_WRAPPER_CONSTRUCTORS

__all__ = ['HOOKS', 'MODELS', 'OPTIM_WRAPPER_CONSTRUCTORS']
