"""Swin Transformer V1 and V2 backbones for OpenMMLab.

Importing this package registers its modules in mmengine's registries under the scope ``swin_mm``.
"""

from importlib.util import find_spec

from swin_mm.models.inference import optimize_for_inference
from swin_mm.version import __version__

__all__ = ['__version__', 'optimize_for_inference']

if find_spec('mmengine'):  # without it, the plain model in swin_mm.models.swin can still be imported
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
