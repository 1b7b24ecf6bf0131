"""Swin Transformer V1 and V2 for OpenMMLab. Importing this package registers its modules in scope ``swin_mm``."""

from importlib.util import find_spec

from swin_mm.models.inference import optimize_for_inference
from swin_mm.version import __version__

__all__ = ['__version__', 'optimize_for_inference']

if find_spec('mmengine'):  # without it there is the plain model, swin_mm.models.swin
    from swin_mm.openmmlab.backbone import SwinTransformer, SwinTransformerV2
    from swin_mm.openmmlab.layer_decay import LayerDecayOptimWrapperConstructor
    from swin_mm.openmmlab.loading import CompleteBackboneHook

    __all__ += [
        'CompleteBackboneHook',
        'LayerDecayOptimWrapperConstructor',
        'SwinTransformer',
        'SwinTransformerV2',
    ]
