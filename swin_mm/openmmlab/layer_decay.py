"""Layer-wise learning-rate decay: the learning rate shrinks from block to block, from the head towards the image."""

from collections.abc import Iterator, Sequence
from typing import Any

from mmengine.logging import print_log
from mmengine.optim import DefaultOptimWrapperConstructor
from torch import nn

from swin_mm.models.swin import SwinPyramid
from swin_mm.openmmlab.registry import OPTIM_WRAPPER_CONSTRUCTORS

# Substrings of the names of parameters without weight decay, as in the published recipes. The configs state those of V1
# in configs/_base_/schedules/no_decay.py.
NO_DECAY = ('absolute_pos_embed', 'relative_position_bias_table', 'norm')
NO_DECAY_V2 = (*NO_DECAY, 'cpb_mlp', 'logit_scale')


def layer_id(name: str, depths: Sequence[int]) -> int:
    """Return the depth of a parameter in blocks: 0 for the embeddings, 1 to ``sum(depths)`` for the blocks.

    The patch merging after a stage counts as part of the stage's last block, as in the authors' SimMIM. The output
    norms count as the layer after the last block, ``sum(depths) + 1``.

    Args:
        name: name of the parameter in the backbone.
        depths: number of blocks per stage.
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
    """Optimizer constructor with layer-wise learning-rate decay.

    Works for every model that contains a Swin backbone of this package (V1 or V2), wherever it is. A parameter ``k``
    blocks below the head gets the learning rate times ``decay_rate ** k``; parameters outside the backbone keep the
    full learning rate. The other keys of ``paramwise_cfg`` keep their meaning; the ``lr_mult`` of ``custom_keys``
    multiplies with the decay. The backbone's norms, relative position tables and MLPs, logit scales and absolute
    position embedding get no weight decay.

    Args:
        optim_wrapper_cfg: config of the optim wrapper; its ``optimizer`` needs an ``lr``.
        paramwise_cfg: ``dict(decay_rate=0.95)`` plus any argument of
            :class:`mmengine.optim.DefaultOptimWrapperConstructor`.

    Raises:
        ValueError: ``decay_rate`` is missing or outside (0, 1], or the optimizer has no ``lr``.
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
                f'paramwise_cfg has decay_rate={self.decay_rate!r}; it must be in (0, 1], for example '
                'paramwise_cfg=dict(decay_rate=0.95)'
            )
        # With an empty paramwise_cfg the default constructor would put all parameters into one group.
        super().__init__(optim_wrapper_cfg, {'custom_keys': {}} | paramwise_cfg)
        if self.base_lr is None:
            raise ValueError('the optimizer has no lr; set one, for example optimizer=dict(lr=1e-4)')

    def add_params(self, params: list[dict], module: nn.Module, prefix: str = '', **options: Any) -> None:
        """Add one parameter group per parameter of ``module`` to ``params``."""
        super().add_params(params, module, prefix, **options)
        if prefix:  # super() recurses into submodules through this method; act once, on the whole model
            return
        base_lr: float | None = self.base_lr
        assert base_lr is not None  # checked in __init__
        backbone = dict(_backbone_parameters(module))
        for group in params:
            (parameter,) = group['params']
            if not parameter.requires_grad or id(parameter) not in backbone:
                continue
            name, distance = backbone[id(parameter)]
            group['lr'] = group.get('lr', base_lr) * self.decay_rate**distance
            if any(part in name for part in NO_DECAY_V2):
                group['weight_decay'] = 0.0
        rates = [group.get('lr', base_lr) for group in params]
        print_log(f'layer-wise learning-rate decay: from {min(rates):.3g} to {max(rates):.3g}', 'current')


def _backbone_parameters(model: nn.Module) -> Iterator[tuple[int, tuple[str, int]]]:
    """Yield (id, (name in the backbone, number of blocks below the head)) of every parameter of a Swin backbone."""
    backbones = [part for part in model.modules() if isinstance(part, SwinPyramid)]
    if not backbones:
        raise TypeError(
            f'{type(model).__name__} has no Swin backbone of swin_mm; use '
            "backbone=dict(type='swin_mm.SwinTransformer') or remove this constructor from optim_wrapper"
        )
    for backbone in backbones:
        depths = [len(list(stage.get_submodule('blocks').children())) for stage in backbone.layers]
        for name, parameter in backbone.named_parameters():
            yield id(parameter), (name, sum(depths) + 1 - layer_id(name, depths))
