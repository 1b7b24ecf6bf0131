"""Swin Transformer V1 and V2 backbones for OpenMMLab.

Importing this package registers its modules in mmengine's registries under the scope ``swin_mm``. Without mmengine, the
plain models and the checkpoint reader work.
"""

from importlib.util import find_spec
from typing import NoReturn

from swin_mm.models.inference import optimize_for_inference
from swin_mm.models.swin import SwinPyramid, SwinPyramidV2
from swin_mm.utils.environment import needs_mmengine
from swin_mm.version import __version__

__all__ = ['SwinPyramid', 'SwinPyramidV2', '__version__', 'optimize_for_inference']

if find_spec('mmengine'):
    from swin_mm.openmmlab.backbone import SwinTransformer, SwinTransformerV2
    from swin_mm.openmmlab.config import config_path
    from swin_mm.openmmlab.layer_decay import LayerDecayOptimWrapperConstructor
    from swin_mm.openmmlab.loading import CompleteBackboneHook

    __all__ += [
        'CompleteBackboneHook',
        'LayerDecayOptimWrapperConstructor',
        'SwinTransformer',
        'SwinTransformerV2',
        'config_path',
    ]
else:

    def __getattr__(name: str) -> NoReturn:
        """Say what the names above need."""
        if name in (
            'CompleteBackboneHook',
            'LayerDecayOptimWrapperConstructor',
            'SwinTransformer',
            'SwinTransformerV2',
            'config_path',
        ):
            raise needs_mmengine(f'{__name__}.{name}')
        raise AttributeError(f'module {__name__!r} has no attribute {name!r}')
