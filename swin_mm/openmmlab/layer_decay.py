"""Layer-wise learning-rate decay: the nearer a block is to the image, the slower it learns."""

from collections.abc import Iterator, Sequence
from typing import Any

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from swin_mm.models.swin import SwinPyramid
from swin_mm.openmmlab.registry import OPTIM_WRAPPER_CONSTRUCTORS

# Parts of the names of a backbone's parameters that are never decayed.
NO_DECAY = ('norm', 'relative_position_bias_table', 'absolute_pos_embed', 'cpb_mlp', 'logit_scale')


def layer_id(name: str, depths: Sequence[int]) -> int:
    """How many blocks deep a parameter is: 0 for the embedding, 1 to ``sum(depths)`` for the blocks.

    The merging after a stage counts as part of that stage's last block, as in the authors' SimMIM. The norms of the
    outputs belong to what comes after the backbone: ``sum(depths) + 1``.

    Args:
        name: of a parameter, as the backbone names it.
        depths: blocks per stage.
    """
    part, *rest = name.split('.')
    if part in ('patch_embed', 'absolute_pos_embed'):
        return 0
    if part != 'layers':
        return sum(depths) + 1
    stage, kind, *rest = rest
    before = sum(depths[: int(stage)])
    return before + (int(rest[0]) + 1 if kind == 'blocks' else depths[int(stage)])


@OPTIM_WRAPPER_CONSTRUCTORS.register_module()
class LayerDecayOptimWrapperConstructor(DefaultOptimWrapperConstructor):
    """Learning rates that shrink by ``decay_rate`` from block to block, away from the head.

    For any model with a Swin backbone of this package, V1 or V2, at any place in it. A parameter ``k`` blocks below
    the head gets the learning rate times ``decay_rate ** k``; everything outside the backbone gets the whole one.
    All other keys of ``paramwise_cfg`` keep their meaning, ``custom_keys`` too: their ``lr_mult`` multiplies. The
    backbone's norms, position tables and networks, logit scales and absolute embedding have no weight decay.

    Args:
        optim_wrapper_cfg: the optim wrapper, with its ``optimizer``, which needs ``lr``.
        paramwise_cfg: ``dict(decay_rate=0.95)``, and what :class:`mmengine.optim.DefaultOptimWrapperConstructor` takes.

    Raises:
        ValueError: there is no ``decay_rate`` in (0, 1], or no ``lr``.
        TypeError: the model has no Swin backbone of this package.

    Example:
        >>> optim_wrapper = dict(
        ...     constructor='swin_mm.LayerDecayOptimWrapperConstructor',
        ...     optimizer=dict(type='AdamW', lr=1e-4, weight_decay=0.05),
        ...     paramwise_cfg=dict(decay_rate=0.95),
        ... )
    """

    def __init__(self, optim_wrapper_cfg: dict, paramwise_cfg: dict | None = None) -> None:
        paramwise_cfg = dict(paramwise_cfg or {})
        self.decay_rate = paramwise_cfg.pop('decay_rate', None)
        if not isinstance(self.decay_rate, int | float) or not 0 < self.decay_rate <= 1:
            raise ValueError(
                f'paramwise_cfg has decay_rate={self.decay_rate!r}; give a number above 0 and up to 1: '
                'paramwise_cfg=dict(decay_rate=0.95)'
            )
        # Without any key the default constructor would not ask for parameters one by one.
        super().__init__(optim_wrapper_cfg, {'custom_keys': {}} | paramwise_cfg)
        if self.base_lr is None:
            raise ValueError('the optimizer has no lr to decay; give one: optimizer=dict(lr=1e-4)')

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '', **options: Any) -> None:
        """Add one group per parameter of ``module``, the whole model, to ``params``."""
        super().add_params(params, module, prefix, **options)
        if prefix:  # called for a part of the model by the line above
            return
        backbone = dict(_backbone_parameters(module))
        for group in params:
            (parameter,) = group['params']
            if not parameter.requires_grad or id(parameter) not in backbone:
                continue
            name, distance = backbone[id(parameter)]
            group['lr'] = group.get('lr', self.base_lr) * self.decay_rate**distance
            if any(part in name for part in NO_DECAY):
                group['weight_decay'] = 0.0
        rates = [group.get('lr', self.base_lr) for group in params]
        print_log(f'layer-wise decay: learning rates from {min(rates):.3g} to {max(rates):.3g}', 'current')


def _backbone_parameters(model: nn.Module) -> Iterator[tuple[int, tuple[str, int]]]:
    """Every parameter of a Swin backbone in the model, by id: its name there and the blocks between it and the head."""
    backbones = [part for part in model.modules() if isinstance(part, SwinPyramid)]
    if not backbones:
        raise TypeError(
            f'{type(model).__name__} has no Swin backbone of swin_mm, whose blocks could be counted; give it '
            "backbone=dict(type='swin_mm.SwinTransformer') or leave out the constructor"
        )
    for backbone in backbones:
        depths = [len(stage.blocks) for stage in backbone.layers]
        for name, parameter in backbone.named_parameters():
            yield id(parameter), (name, sum(depths) + 1 - layer_id(name, depths))
