"""Swin Transformer V1 and V2 for OpenMMLab. Importing this package registers its modules in scope ``swin_mm``."""

from swin_mm.backbone import SwinTransformer, SwinTransformerV2
from swin_mm.optim import LayerDecayOptimWrapperConstructor
from swin_mm.version import __version__

__all__ = ['LayerDecayOptimWrapperConstructor', 'SwinTransformer', 'SwinTransformerV2', '__version__']
