"""The registered backbones: Swin with OpenMMLab's arguments, frozen stages and ``init_cfg``."""

import copy
import inspect
import logging
import os
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

import torch
from mmengine.logging import print_log
from mmengine.model import BaseModule
from mmengine.registry import WEIGHT_INITIALIZERS
from torch import nn

from swin_mm.checkpoints import CheckpointError, Report, adapt, unwrap
from swin_mm.checkpoints.loading import nothing_loaded
from swin_mm.models.arguments import (
    check_names,
    reject,
    require_bool,
    require_choice,
    require_depths,
    require_int,
    require_number,
    shorten,
)
from swin_mm.models.swin import ARCHS, SwinPyramid, SwinPyramidV2
from swin_mm.openmmlab.loading import read_checkpoint
from swin_mm.openmmlab.registry import MODELS
from swin_mm.utils.errors import one_line

# Norms whose channels are not the last axis. mmdet's Swin fails with them in forward.
OTHER_NORMS = (
    *(nn.BatchNorm1d, nn.BatchNorm2d, nn.BatchNorm3d, nn.SyncBatchNorm, nn.GroupNorm, nn.LocalResponseNorm),
    *(nn.InstanceNorm1d, nn.InstanceNorm2d, nn.InstanceNorm3d),
)


if TYPE_CHECKING:

    class _Base(SwinPyramid, BaseModule):
        """What the mixin is combined with."""
else:
    _Base = object

_Self = TypeVar('_Self', bound='_Backbone')


class _Backbone(_Base):
    """What mmengine expects of a backbone, as a mixin for the pyramids."""

    def __init__(
        self,
        arch: str = 't',
        *,
        embed_dims: int | None = None,
        depths: Sequence[int] | None = None,
        num_heads: Sequence[int] | None = None,
        act_cfg: dict = {'type': 'GELU'},  # noqa: B006 (the customary way to show a config's default)
        norm_cfg: dict = {'type': 'LN'},  # noqa: B006
        frozen_stages: int = -1,
        pretrained: str | None = None,
        convert_weights: bool = False,
        init_cfg: dict | list[dict] | None = None,
        strict: bool = True,
        compile: bool | dict = False,
        **options: Any,
    ) -> None:
        check_names(type(self), options)
        require_choice('arch', arch, ARCHS)
        given = {'embed_dims': embed_dims, 'depths': depths, 'num_heads': num_heads}
        sizes = ARCHS[arch] | {name: value for name, value in given.items() if value is not None}
        stages = len(require_depths('depths', sizes['depths']))
        self.frozen_stages = _require_frozen_stages(frozen_stages, stages)
        self.strict = require_bool('strict', strict)
        require_bool('convert_weights', convert_weights)
        compile = _require_compile(compile)
        init_cfg = _require_init_cfg(pretrained, init_cfg)
        super().__init__(**sizes, act=_act(act_cfg), norm=_norm(norm_cfg), **options)
        if compile:
            self.compile(**(compile if isinstance(compile, dict) else {}))
        self.load_report: Report | None = None
        self.init_cfg = init_cfg
        self._freeze()

    def _freeze(self) -> None:
        if self.frozen_stages < 0:
            return
        frozen: list[nn.Module] = [self.patch_embed, self.pos_drop]
        if self.absolute_pos_embed is not None:
            self.absolute_pos_embed.requires_grad_(False)
        for i, stage in enumerate(self.layers[: self.frozen_stages]):
            frozen += [stage, getattr(self, f'norm{i}')] if i in self.out_indices else [stage]
        for module in frozen:
            module.eval().requires_grad_(False)

    def train(self: _Self, mode: bool = True) -> _Self:
        """Set training mode; frozen stages stay in evaluation mode. Returns self."""
        super().train(mode)
        self._freeze()
        return self

    def init_weights(self) -> None:
        """Load the checkpoint of ``init_cfg``; without one, keep the random weights and log that.

        Raises:
            CheckpointError: the checkpoint cannot be read, or does not give every parameter of the backbone (except
                the output norms, which classifiers lack).
        """
        configs = self.init_cfg if isinstance(self.init_cfg, list) else [self.init_cfg] if self.init_cfg else []
        pretrained = [
            c for c in configs if getattr(c['type'], '__name__', c['type']) in ('Pretrained', 'PretrainedInit')
        ]
        if len(pretrained) < len(configs):
            whole, self.init_cfg = self.init_cfg, [c for c in configs if c not in pretrained]
            super().init_weights()
            self.init_cfg = whole
        for config in pretrained:
            self._load_pretrained(config)
        if not configs:
            print_log(f'{type(self).__name__} starts from random weights: no init_cfg', logger='current')
        self.is_init = True

    def _load_pretrained(self, config: dict) -> None:
        path = config['checkpoint']
        checkpoint = read_checkpoint(path, config.get('map_location', 'cpu'))
        try:
            self.load_state_dict(unwrap(checkpoint, config.get('prefix', '')), strict=False)
        except RuntimeError as error:
            raise CheckpointError(f'checkpoint {path}: {error}') from error
        report = self.load_report
        if self.strict and report is not None and report.problem:
            raise CheckpointError(f'checkpoint {path}: {report.problem}')

    def _load_from_state_dict(self, state_dict: dict[str, Any], prefix: str, *rest: Any) -> None:
        """Convert the keys under ``prefix`` to ours, then load as any module does.

        Thus ``load_state_dict`` and mmengine's loader accept every known naming. They report missing and unexpected
        keys themselves, with the strictness of their caller. A state dict of another architecture always raises.

        Raises:
            CheckpointError: nothing under ``prefix`` fits the backbone.
        """
        theirs = {key: value for key, value in state_dict.items() if key.startswith(prefix)}
        if not theirs:
            self.load_report = nothing_loaded(self, prefix)
        else:
            stripped = {key.removeprefix(prefix): value for key, value in theirs.items()}
            ours, self.load_report = adapt(stripped, self, strict=False)
            for key in theirs:
                del state_dict[key]
            state_dict.update({prefix + key: value for key, value in ours.items()})
        if not self.patch_embed.proj.weight.is_meta:  # there only shapes are checked, see require_complete
            level = logging.WARNING if self.load_report.problem or self.load_report.notes else logging.INFO
            print_log(str(self.load_report), logger='current', level=level)
        super()._load_from_state_dict(state_dict, prefix, *rest)


@MODELS.register_module()
class SwinTransformer(_Backbone, SwinPyramid, BaseModule):
    """Swin Transformer V1 (arXiv 2103.14030) for dense prediction.

    Takes all arguments of mmdet's and mmseg's ``SwinTransformer``, with their meaning and defaults, and the ones
    marked *new*. Weights of every known naming load without a flag, through ``init_cfg``, ``load_state_dict`` or a
    whole detector's checkpoint. In ``state_dict`` the parameters carry the official repository's names.

    Args:
        arch: *new* 't', 's', 'b' or 'l'; ``embed_dims``, ``depths`` and ``num_heads`` override it.
        embed_dims: channels of the first stage.
        depths: blocks per stage; any number of stages.
        num_heads: attention heads per stage.
        act_cfg: activation of the MLPs.
        norm_cfg: all norms.
        frozen_stages: -1 for none; k >= 0 freezes the patch embedding and stages 0 to k - 1 with their output norms,
            at construction.
        pretrained: older way to write ``init_cfg=dict(type='Pretrained', checkpoint=...)``.
        convert_weights: accepted for compatibility and ignored, because namings are recognised.
        init_cfg: initialisation, usually ``dict(type='Pretrained', checkpoint=...)`` with a source for
            :func:`swin_mm.checkpoints.read_checkpoint`, and optionally ``prefix``.
        strict: *new* the checkpoint of ``init_cfg``, and in this project's tools that of ``load_from`` too, must give
            the whole backbone, except output norms, which classifiers lack; False loads what fits.
            ``load_state_dict`` follows its own ``strict``. The result is in ``load_report``.
        compile: *new* compile the backbone: True, or the options of ``torch.compile``, such as
            ``dict(mode='reduce-overhead')`` for CUDA graphs.
        **options: the arguments of :class:`swin_mm.models.swin.SwinPyramid`, among them *new*: ``pad_small_map``,
            ``attention``, ``window_size`` per stage or as (height, width), and ``with_cp`` per stage or as 'mlp'.

    Raises:
        TypeError: an unknown argument, or one of the wrong type.
        ValueError: an argument out of range or inconsistent with the others.

    Example:
        >>> maps = SwinTransformer(arch='t')(torch.rand(1, 3, 224, 224))
        >>> [tuple(m.shape) for m in maps]
        [(1, 96, 56, 56), (1, 192, 28, 28), (1, 384, 14, 14), (1, 768, 7, 7)]
    """


@MODELS.register_module()
class SwinTransformerV2(_Backbone, SwinPyramidV2, BaseModule):
    """Swin Transformer V2 (arXiv 2111.09883) for dense prediction.

    Args:
        **options: those of :class:`SwinTransformer`, with ``window_size`` 8 by default, and
            ``pretrained_window_sizes`` per stage: the windows that the weights were pre-trained with where they
            differ from the ones in use, for example (12, 12, 12, 6).
    """


def _norm(norm_cfg: dict) -> Callable[[int], nn.Module]:
    """Constructor of the norm layers of a ``norm_cfg``.

    Raises:
        TypeError: not a dict.
        ValueError: it cannot be built, or does not normalise the last axis of a (B, H, W, C) map.
    """
    expected = "a dict of a norm over the channels (last axis), such as {'type': 'LN'}"
    options = _require_layer('norm_cfg', norm_cfg, expected)
    kind: Any = options.pop('type')
    trained = options.pop('requires_grad', True)
    if kind == 'LN':
        kind = nn.LayerNorm
    if isinstance(kind, type):
        layer_type: Callable[..., nn.Module] = kind
        if 'eps' in inspect.signature(kind).parameters:
            options.setdefault('eps', 1e-5)  # as mmcv does

        def build(channels: int) -> nn.Module:
            return layer_type(channels, **options).requires_grad_(trained)
    else:
        from mmcv.cnn import build_norm_layer

        def build(channels: int) -> nn.Module:
            return build_norm_layer(norm_cfg, channels)[1]

    if options.get('eps') is not None:
        try:
            require_number('eps', options['eps'], 0)
        except (TypeError, ValueError) as error:
            reject('norm_cfg', norm_cfg, f'{expected} ({error})', type(error))
    _try_layer('norm_cfg', norm_cfg, expected, lambda: build(4))
    return build


def _act(act_cfg: dict) -> Callable[[], nn.Module]:
    """Constructor of the activation layers of an ``act_cfg``.

    Raises:
        TypeError: not a dict.
        ValueError: it cannot be built, or changes the shape of its input.
    """
    expected = "a dict of an activation, such as {'type': 'GELU'}"
    options = _require_layer('act_cfg', act_cfg, expected)
    kind: Any = options.pop('type')
    if kind == 'GELU':
        kind = nn.GELU
    if isinstance(kind, type):
        layer_type: Callable[..., nn.Module] = kind

        def build() -> nn.Module:
            return layer_type(**options)
    else:
        from mmcv.cnn import build_activation_layer

        def build() -> nn.Module:
            return build_activation_layer(act_cfg)

    _try_layer('act_cfg', act_cfg, expected, build)
    return build


def _require_layer(name: str, config: Any, expected: str) -> dict[str, Any]:
    """A copy of a layer's config."""
    if not isinstance(config, dict) or not isinstance(config.get('type'), str | type | Callable):
        reject(name, config, expected, ValueError if isinstance(config, dict) else TypeError)
    return dict(config)


def _try_layer(name: str, config: dict, expected: str, build: Callable[[], nn.Module]) -> None:
    """Build a layer and apply it to a small map, so that an unsuitable one is rejected at construction."""
    try:
        with torch.device('cpu'), torch.no_grad():
            layer = build()
            if isinstance(layer, OTHER_NORMS):
                raise ValueError(f'{type(layer).__name__} normalises other axes')
            shape = layer(torch.ones(1, 2, 3, 4)).shape
        if shape != (1, 2, 3, 4):
            raise ValueError(f'{type(layer).__name__} changes the shape of a map')
    except ImportError:
        raise
    except Exception as error:
        message = one_line(error)
        raise ValueError(f'{name}={shorten(config)}: expected {expected} ({message})') from error


def _require_frozen_stages(frozen_stages: Any, stages: int) -> int:
    try:
        return require_int('frozen_stages', frozen_stages, maximum=stages)
    except (TypeError, ValueError) as error:
        reject('frozen_stages', frozen_stages, f'an integer from -1 (none) to {stages} (all stages)', type(error))


def _require_compile(compile: Any) -> bool | dict[str, Any]:
    """Return whether to compile, or the options of ``torch.compile`` after trying them."""
    expected = 'True, False, or the options of torch.compile'
    if not isinstance(compile, dict):
        return require_bool('compile', compile, ', or the options of torch.compile')
    try:
        torch.compile(nn.Identity(), **compile)
    except Exception as error:
        raise ValueError(f'compile={shorten(compile)}: expected {expected} ({one_line(error)})') from error
    return compile


def _require_init_cfg(pretrained: Any, init_cfg: Any) -> dict | list[dict] | None:
    """Combine ``pretrained`` and ``init_cfg`` into one ``init_cfg``.

    Raises:
        TypeError: neither a path nor a config.
        ValueError: both are given, or a config names no initialiser or no checkpoint.
    """
    if pretrained is not None:
        if init_cfg:
            raise ValueError(f'pretrained={shorten(pretrained)}, init_cfg={shorten(init_cfg)}: expected only init_cfg')
        if not isinstance(pretrained, str | os.PathLike):
            reject('pretrained', pretrained, 'the path or address of a checkpoint, or None', TypeError)
        if not str(pretrained):
            reject('pretrained', pretrained, 'the path or address of a checkpoint, or None')
        return {'type': 'Pretrained', 'checkpoint': os.fspath(pretrained)}
    if init_cfg is None:
        return None
    several = isinstance(init_cfg, list | tuple)
    configs = [copy.deepcopy(config) for config in (init_cfg if several else [init_cfg])]
    expected = (
        "None, {'type': 'Pretrained', 'checkpoint': path or address}, an initialiser of mmengine, or a list of these"
    )
    if not configs or not all(isinstance(config, dict) for config in configs):
        reject('init_cfg', init_cfg, expected, ValueError if several and not configs else TypeError)
    for config in configs:
        if 'checkpoint' in config:
            config.setdefault('type', 'Pretrained')  # mmdet does not check the type
        if reason := _reason_against_initialiser(config):
            reject('init_cfg', init_cfg, f'{expected} ({reason})')
    return configs if several else configs[0]


def _reason_against_initialiser(config: dict) -> str | None:
    """Why mmengine cannot initialise from this, or None."""
    if not config.get('type'):
        return "no 'type'"
    if getattr(config['type'], '__name__', config['type']) in ('Pretrained', 'PretrainedInit'):
        checkpoint = config.get('checkpoint')
        if not isinstance(checkpoint, str | os.PathLike) or not str(checkpoint):
            return f"'checkpoint' is {shorten(checkpoint)}"
        if not isinstance(config.get('prefix'), str | None):
            return f"'prefix' is {shorten(config['prefix'])}"
        config['checkpoint'] = os.fspath(checkpoint)
    overrides = config.get('override') or []
    for override in overrides if isinstance(overrides, list) else [overrides]:
        if not isinstance(override, dict) or 'name' not in override:
            return f"'override' is {shorten(override)}, without 'name'"
        options = {key: value for key, value in override.items() if key != 'name'}
        if options and (reason := _reason_against_initialiser(options)):
            return f"in 'override': {reason}"
    try:
        WEIGHT_INITIALIZERS.build({key: value for key, value in config.items() if key != 'override'})
    except Exception as error:
        return one_line(error)
    return None
