"""Replace the backbone of an OpenMMLab config by our Swin.

``plug`` changes a config, ``show`` lists the changes, ``write`` saves them as a config that inherits from the old one,
or as one that stands alone. The channels and strides of the old backbone and neck are measured by running them on the
meta device, not looked up by name.
"""

import copy
import inspect
import math
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from mmengine.logging import print_log
from mmengine.registry import MODELS, PARAM_SCHEDULERS, DefaultScope
from torch import Tensor, nn

from swin_mm.checkpoints.namings import MMDET
from swin_mm.models.swin import ARCHS
from swin_mm.openmmlab.config import (
    is_pure_python,
    iter_dicts,
    load_config,
    raise_missing_dependency,
    type_name,
    with_type_names,
)
from swin_mm.openmmlab.layer_decay import NO_DECAY, NO_DECAY_V2
from swin_mm.utils.errors import InputError, one_line
from swin_mm.utils.files import atomic_write

# The backbones of our recipes, with their official weights. L exists from ImageNet-22k only.
BACKBONES = Path(__file__).parents[1] / '.mim/configs/_base_/backbones'
TYPES = ('swin_mm.SwinTransformer', 'swin_mm.SwinTransformerV2')
STRIDES = (4, 8, 16, 32)
SIDE = 256  # pixels; size of the image that backbones and necks are run on


class Recipe(NamedTuple):
    """Settings of the published Swin recipes for the task of a library.

    Args:
        lr: learning rate for a batch of ``batch`` images.
        batch: images over all GPUs.
        weight_decay: weight decay of AdamW.
        drop_path_rate: stochastic depth rate by size.
        warmup: arguments of the LinearLR at the beginning.
    """

    lr: float
    batch: int
    weight_decay: float
    drop_path_rate: dict[str, float]
    warmup: dict[str, Any]


RECIPES = {
    'mmdet': Recipe(
        1e-4, 16, 0.05, {'t': 0.2, 's': 0.2, 'b': 0.3, 'l': 0.3}, {'start_factor': 1e-3, 'by_epoch': False, 'end': 1000}
    ),
    'mmseg': Recipe(
        6e-5, 16, 0.01, {'t': 0.3, 's': 0.3, 'b': 0.3, 'l': 0.3}, {'start_factor': 1e-6, 'by_epoch': False, 'end': 1500}
    ),
    'mmpretrain': Recipe(
        1e-3,
        1024,
        0.05,
        {'t': 0.2, 's': 0.3, 'b': 0.5, 'l': 0.2},
        {'start_factor': 1e-3, 'by_epoch': True, 'end': 20, 'convert_to_iter_based': True},
    ),
}
WARMUP_SHARE = 10  # a warm-up that we add takes at most 1 / WARMUP_SHARE of the run
# Backbones with extra outputs that the heads of their method depend on.
METHOD_BACKBONES = {
    'SSDVGG',
    'HourglassNet',
    'BiSeNetV1',
    'BiSeNetV2',
    'CGNet',
    'DDRNet',
    'ERFNet',
    'FastSCNN',
    'ICNet',
    'PIDNet',
    'STDCContextPathNet',
    'TridentResNet',
    'UNet',
    'VPD',
}
# Arguments of mmseg's heads that count pixels of the feature map: they are scaled where the stride changes.
PIXEL_ARGUMENTS = ('dilations', 'dilation', 'mask_size', 'down_factor')


class Level(NamedTuple):
    """A feature map: its channels, and its stride (side of the image / side of the map)."""

    channels: int
    stride: float


class PartStrides(NamedTuple):
    """Strides of the maps that a part of the model outputs (backbone, neck) or reads (a head), before and after."""

    part: str
    before: tuple[float, ...]
    after: tuple[float, ...]


@dataclass
class Report:
    """What changed in the model besides the backbone.

    Args:
        strides: of backbone, neck and heads. Empty where a Swin was replaced by the same Swin.
        notes: one line for each change that a reader should check: strides that differ, arguments that were scaled,
            stages that nothing reads, settings that were removed.
    """

    strides: list[PartStrides] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


def plug(cfg: Config, arch: str | None = None, v2: bool = False, checkpoint: str | None = None) -> Config:
    """Return a copy of a config whose model has our Swin as its backbone, and log what should be checked.

    A Swin of any library is replaced by ours with the same arguments and nothing else changes, unless another size or
    version is asked for. Any other backbone is replaced by a Swin of size ``arch`` together with what depends on it:
    channels of necks and heads, normalization of the image, optimizer, warm-up, initial weights.

    Args:
        cfg: a config as :func:`swin_mm.openmmlab.config.load_config` returns it; not changed.
        arch: 't', 's', 'b' or 'l'; None keeps the size of a Swin and means 't' for other backbones.
        v2: use Swin V2.
        checkpoint: weights of the backbone; None keeps those of a Swin and means the official ones for other backbones.

    Raises:
        InputError: the backbone cannot be replaced; the message says why.
    """
    cfg, report = plug_with_report(cfg, arch, v2, checkpoint)
    for note in report.notes:
        print_log(f'plug: {note}', logger='current')
    return cfg


def plug_with_report(
    cfg: Config, arch: str | None = None, v2: bool = False, checkpoint: str | None = None
) -> tuple[Config, Report]:
    """Return the result of :func:`plug` together with a report instead of logging."""
    if arch not in (None, *ARCHS):
        raise InputError(f'arch {arch!r} is not known; choose from: {", ".join(ARCHS)}')
    before, cfg = with_type_names(cfg), with_type_names(cfg)
    model, scope = cfg.get('model'), _scope(cfg)
    if scope is None:
        raise InputError(
            f'{cfg.filename} is not a config of a model of {", ".join(RECIPES)}: it needs a model and a default_scope'
        )
    report = Report()
    replaced = False
    for owner in list(iter_dicts(model)):
        for key, node in owner.items():
            if _is_swin(node) and (key != 'backbone' or _has_size_and_version(node, arch, v2)):
                _convert_swin(node, scope, checkpoint)
            elif key == 'backbone' and isinstance(node, dict):
                if not _replace(owner, arch or _arch(node) or 't', v2, checkpoint, scope, report):
                    cfg.find_unused_parameters = True
                replaced = True
    if replaced:
        _remove_old_weights(cfg)
        _set_normalization(cfg, scope)
        _set_optimizer(cfg, RECIPES[scope], NO_DECAY_V2 if v2 else NO_DECAY, report)
        _remove_dead_keys(before, cfg, scope, report)
        _check_schedule(cfg)
    elif not any(str(node.get('type')) in TYPES for node in iter_dicts(model)):
        raise InputError(f'the model of {cfg.filename} ({model.get("type")}) has no entry "backbone"')
    else:
        _rename_keys(cfg)
    imports = cfg.get('custom_imports') or {}
    names = imports.get('imports') or []
    names = [names] if isinstance(names, str) else list(names)
    if 'swin_mm' not in names:
        cfg.custom_imports = {**imports, 'imports': [*names, 'swin_mm']}
    return cfg, report


def _scope(cfg: Config) -> str | None:
    """Return the library that a config is for. Configs in pure Python style have no default_scope."""
    model = cfg.get('model')
    if not isinstance(model, dict):
        return None
    scope = cfg.get('default_scope') or str(model.get('type')).partition('.')[0]
    return scope if scope in RECIPES else None


# Replacing a Swin by the same Swin


def _is_swin(node: Any) -> bool:
    return isinstance(node, dict) and type_name(node) in ('SwinTransformer', 'SwinTransformerV2')


def _has_size_and_version(node: dict, arch: str | None, v2: bool) -> bool:
    return arch in (None, _arch(node)) and (not v2 or type_name(node).endswith('V2'))


def _arch(node: dict) -> str | None:
    """Return the letter of a Swin's size, or None for a custom size or another backbone."""
    if not _is_swin(node):
        return None
    if isinstance(node.get('arch'), str):
        return node['arch'][0].lower()
    sizes = ARCHS['t'] | {key: node[key] for key in ARCHS['t'] if key in node}
    return next((arch for arch, known in ARCHS.items() if _plain(known) == _plain(sizes)), None)


def _convert_swin(node: dict, scope: str, checkpoint: str | None) -> None:
    """Turn a Swin of any library into ours."""
    library = node['type'].partition('.')[0] if '.' in node['type'] else scope
    if library in ('mmpretrain', 'mmcls'):
        _translate_mmpretrain(node)
    node['type'] = f'swin_mm.{type_name(node)}'
    if checkpoint:
        node.pop('pretrained', None)
        node['init_cfg'] = {'type': 'Pretrained', 'checkpoint': checkpoint}


def _rename_keys(cfg: Config) -> None:
    """Translate custom_keys that name parameters of the other Swin to our names."""
    paramwise = (cfg.get('optim_wrapper') or {}).get('paramwise_cfg') or {}
    if keys := paramwise.get('custom_keys'):
        parts = {key: key.partition('backbone.') for key in keys}
        paramwise['custom_keys'] = {
            owner + dot + MMDET.ours(rest) if dot else key: keys[key] for key, (owner, dot, rest) in parts.items()
        }


def _translate_mmpretrain(node: dict) -> None:
    """Translate mmpretrain's arguments to ours."""
    for key, default in (('out_after_downsample', False), ('stage_cfgs', {}), ('patch_cfg', {}), ('norm_eval', False)):
        if node.pop(key, default) != default:
            raise InputError(f'{node["type"]} with {key} has no counterpart in swin_mm')
    arch = node.pop('arch', 'tiny')
    if isinstance(arch, str):
        node['arch'] = arch[0].lower()
        if node['arch'] not in ARCHS:
            raise InputError(f'{node["type"]} of size {arch!r} is not supported; choose from: {", ".join(ARCHS)}')
    else:
        node.update(arch)
    if 'img_size' in node:
        node['pretrain_img_size'] = node.pop('img_size')
    node.pop('interpolate_mode', None)
    node.setdefault('out_indices', (3,))
    node.setdefault('pad_small_map', False)
    if node.get('frozen_stages', -1) >= 0:
        node['frozen_stages'] += 1  # theirs is the index of the last frozen stage, ours the number of frozen stages


# Replacing another backbone


def _replace(owner: dict, arch: str, v2: bool, checkpoint: str | None, scope: str, report: Report) -> bool:
    """Replace the backbone of a model by a Swin, and adapt the neck and the heads to its maps.

    Returns whether all maps of the new backbone are read. The output norm of an unread map gets no gradient.
    """
    backbone = owner['backbone']
    _refuse_method_backbones(owner, backbone)
    side = backbone.get('img_size', SIDE)  # some transformers accept only one image size
    side = side if isinstance(side, int) else side[0]
    old, _ = _run(backbone, [Level(3, 1)], scope, 'backbone', side)
    stages = _choose_stages(backbone, [level.stride for level in old], scope)
    sizes = ARCHS[arch]
    new = [Level(sizes['embed_dims'] * 2**i, STRIDES[i]) for i in stages]

    name = f'swinv2-{arch}-p4-w16' if v2 else f'swin-{arch}-p4-w7'
    owner['backbone'] = {
        **Config.fromfile(BACKBONES / f'{name}{"_in22k" * (arch == "l")}.py').swin.to_dict(),
        'drop_path_rate': RECIPES[scope].drop_path_rate[arch],
        'out_indices': tuple(stages),
    }
    if checkpoint:
        owner['backbone']['init_cfg']['checkpoint'] = checkpoint
    if backbone.get('with_cp'):
        owner['backbone']['with_cp'] = True
    report.strides.append(_compare('backbone', old, new))
    if owner.get('neck'):
        return _adapt_neck(owner, old, new, scope, report)
    read = _adapt_heads(owner, old, new, scope, report)
    if not read or len(read) == len(new):  # no head says what it reads: assume that all maps are read
        return True
    return _drop_unread_by_heads(owner, new, read, scope, report)


def _refuse_method_backbones(owner: dict, backbone: dict) -> None:
    """Raise for models that only work with their own backbone."""
    name = type_name(backbone)
    if name in METHOD_BACKBONES or 'backbone_cfg' in backbone:
        raise InputError(f'cannot be plugged: {name} is part of the method, whose heads need its special outputs')
    if any('shared_head' in node for node in iter_dicts(owner.get('roi_head'))):
        raise InputError('cannot be plugged: the RoI head runs the last stage of a ResNet (C4, shared_head)')
    if not owner.get('neck') and ('rpn_head' in owner or owner.get('type') == 'RPN'):
        raise InputError('cannot be plugged: the RPN reads one map of a ResNet directly (C4 or DC5, no FPN)')


def _choose_stages(backbone: dict, strides: list[float], scope: str) -> list[int]:
    """Choose the Swin stage for each output: the one of the nearest stride, or the next where strides repeat."""
    name, count = type_name(backbone), len(strides)
    refusal = f'cannot be plugged: {name} gives maps of strides [{_join(strides)}], a Swin has {list(STRIDES)}'
    if count > 4 or strides != sorted(strides) or strides[0] < 4 or strides[-1] > 32:
        raise InputError(refusal)
    stages: list[int] = []
    for i, stride in enumerate(strides):
        nearest = min(range(4), key=lambda stage: abs(math.log2(STRIDES[stage] / stride)))
        stages.append(min(max([nearest, *(stage + 1 for stage in stages)]), 4 - count + i))
    # The anchors and points of detectors have the strides of their maps written down.
    if scope == 'mmdet' and [STRIDES[stage] for stage in stages] != strides:
        raise InputError(refusal)
    return stages


# Running parts of the model


def _build(config: Any, scope: str, device: str) -> nn.Module:
    """Build a part of a model without loading weights."""
    config = copy.deepcopy(config)
    for node in iter_dicts(config):
        for key in ('init_cfg', 'pretrained'):
            node.pop(key, None)
    with DefaultScope.overwrite_default_scope(scope), torch.device(device):
        return MODELS.build(config)


def _run(
    config: Any,
    inputs: list[Level],
    scope: str,
    part: str,
    side: int = SIDE,
    devices: Sequence[str] = ('meta', 'cpu'),  # the meta device is fast; modules that read values need the CPU
) -> tuple[list[Level], set[int]]:
    """Run a backbone, neck or head on empty maps of an image of ``side`` pixels.

    Returns its outputs, and the positions of the inputs that they depend on.
    """
    for device in devices:
        try:
            return _run_on(device, config, inputs, scope, part, side)
        except InputError:
            raise
        except Exception as error:
            failure = error
    raise_missing_dependency(failure)
    raise InputError(f'cannot be plugged: its {part} does not run: {one_line(failure)}') from failure


def _run_on(
    device: str, config: Any, inputs: list[Level], scope: str, part: str, side: int
) -> tuple[list[Level], set[int]]:
    sides = [round(side / level.stride) for level in inputs]
    maps = [
        torch.zeros(1, level.channels, size, size, device=device, requires_grad=True)
        for level, size in zip(inputs, sides, strict=True)
    ]
    module = _build(config, scope, device)
    module.eval()  # returns None for some
    with DefaultScope.overwrite_default_scope(scope), torch.device(device):
        outputs = module(maps[0] if part == 'backbone' else tuple(maps))
    outputs = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
    if not all(isinstance(output, Tensor) and (output.ndim == 4 or part == 'head') for output in outputs):
        raise InputError(f'cannot be plugged: its {part} returns more than feature maps')
    levels = [Level(output.shape[1], _round_stride(side / output.shape[-1])) for output in outputs if output.ndim == 4]
    gradients = torch.autograd.grad([output.sum() for output in outputs], maps, allow_unused=True)
    return levels, {i for i, gradient in enumerate(gradients) if gradient is not None}


def _round_stride(stride: float) -> float:
    """Round a stride to an integer, or below 1 to a power of two."""
    return round(stride) if stride >= 1 else 2.0 ** round(math.log2(stride))


# Necks and heads


def _adapt_neck(owner: dict, old: list[Level], new: list[Level], scope: str, report: Report) -> bool:
    """Adapt the neck, and the heads behind it, to the maps of the new backbone. Returns whether all maps are read."""
    neck = owner['neck']
    first = neck[0] if isinstance(neck, list) else neck
    name = type_name(first)
    try:
        before, _ = _run(neck, old, scope, 'neck')
    except InputError:  # it needs operators that exist only on GPUs, or inputs other than maps
        before = None
    if before is not None and len(old) > 1 and len(set(_strides(old))) == 1 and _strides(before) == _strides(new):
        # A plain transformer outputs maps of one size, from which this neck makes a pyramid. A Swin outputs one itself.
        owner.pop('neck')
        report.notes.append(f'neck ({name}) removed: the backbone itself gives maps of strides {_join(_strides(new))}')
        _adapt_heads(owner, before, new, scope, report)
        return True
    if not _rewire(first, old, new) and old != new and before is None:
        raise InputError('cannot be plugged: its neck does not say which channels it takes')
    if before is None:  # the channels behind a neck do not depend on the backbone
        report.notes.append(f'neck ({name}) cannot be run here: the strides of its maps were not compared')
        return True
    # On the CPU: the meta device does not notice wrong channels.
    after, read = _run(neck, new, scope, 'neck, given the maps of a Swin,', devices=('cpu',))
    report.strides.append(_compare('neck', before, after))
    if _strides(before) != _strides(after):
        words = f'strides {_join(_strides(after))}, before {_join(_strides(before))}'
        if scope == 'mmdet':  # anchors and points have the strides written down
            raise InputError(f'cannot be plugged: its neck ({name}) would give maps of {words}')
        report.notes.append(f'neck ({name}) gives maps of {words}')
    complete = len(read) == len(new) or _drop_unread_by_neck(owner, new, after, read, scope, report)
    _adapt_heads(owner, before, after, scope, report)
    return complete


def _drop_unread_by_neck(
    owner: dict, new: list[Level], after: list[Level], read: set[int], scope: str, report: Report
) -> bool:
    """Let the backbone leave out the maps below the neck's ``start_level``, which nothing reads."""
    neck = copy.deepcopy(owner['neck'])
    first = neck[0] if isinstance(neck, list) else neck
    count = min(read, default=0)
    channels = first.get('in_channels')
    if read != set(range(count, len(new))) or first.get('start_level') != count or not isinstance(channels, list):
        return False
    first.update(in_channels=channels[count:], start_level=0)
    if first.get('end_level', -1) > 0:
        first['end_level'] -= count
    try:
        outputs, still_read = _run(neck, new[count:], scope, 'neck')
    except InputError:
        return False
    if outputs != after or len(still_read) != len(new) - count:
        return False
    owner['neck'] = neck
    _keep_maps(owner, sorted(read), report)
    return True


def _heads(owner: dict) -> Iterator[tuple[str, dict]]:
    """Yield (name, config) of the heads of a model."""
    for key, node in owner.items():
        if key not in ('backbone', 'neck', 'data_preprocessor') and not key.endswith('_cfg'):
            parts = node if isinstance(node, list) else [node]
            for i, part in enumerate(parts):
                if isinstance(part, dict) and 'backbone' not in part:
                    yield (f'{key}.{i}' if isinstance(node, list) else key), part


def _adapt_heads(owner: dict, old: list[Level], new: list[Level], scope: str, report: Report) -> set[int]:
    """Adapt the heads to new maps. Returns the positions of the maps that they read, as far as their configs say."""
    read: set[int] = set()
    for name, head in _heads(owner):
        read |= _rewire(head, old, new)
        if scope != 'mmseg':
            continue  # all heads of mmdet read the maps of the neck
        index = head.get('in_index', range(len(old)) if isinstance(head.get('in_channels'), (list, tuple)) else -1)
        order = [index] if isinstance(index, int) else list(index)
        comparison = _compare(name, [old[i] for i in order], [new[i] for i in order])
        report.strides.append(comparison)
        if comparison.before != comparison.after:
            at = 0 if head.get('input_transform') == 'resize_concat' else -1
            note = _scale_pixel_arguments(head, comparison.before[at] / comparison.after[at], scope)
            report.notes.append(
                f'{name} ({type_name(head)}) reads maps of stride {_join(comparison.after)}, before '
                f'{_join(comparison.before)}{note}'
            )
    return read


def _scale_pixel_arguments(head: dict, factor: float, scope: str) -> str:
    """Scale the arguments of a head that count pixels of the map, and return what to add to the note about it."""
    changes = []
    for node in [node for node in iter_dicts(head) if 'type' in node and 'in_channels' in node]:
        for key in PIXEL_ARGUMENTS:
            old = node.get(key, _default_of(node, key, scope))
            values = old if isinstance(old, (list, tuple)) else [old]
            if old is None or not all(isinstance(value, int) for value in values):
                continue
            scaled = [max(1, math.floor(value * factor + 0.5)) for value in values]
            if scaled != list(values):
                node[key] = type(old)(scaled) if isinstance(old, (list, tuple)) else scaled[0]
                changes.append(f'; {key} {old} became {node[key]}')
    return ''.join(changes)


def _default_of(config: dict, argument: str, scope: str) -> Any:
    """Return the default of an argument of the class that a config names, or None."""
    with MODELS.switch_scope_and_registry(scope) as registry:
        cls = registry.get(config['type'])
    for base in cls.__mro__[:-1] if inspect.isclass(cls) else ():
        parameter = inspect.signature(base).parameters.get(argument)
        if parameter is not None:
            return None if parameter.default is parameter.empty else parameter.default
    return None


def _drop_unread_by_heads(owner: dict, new: list[Level], read: set[int], scope: str, report: Report) -> bool:
    """Let the backbone leave out the maps that no head of mmseg takes, and renumber ``in_index``.

    Returns whether all remaining maps are used.
    """
    if scope != 'mmseg':
        return False
    used: set[int] = set()  # EncHead takes three maps and uses one
    for _, head in _heads(owner):
        try:
            used |= _run(head, new, scope, 'head')[1]
        except InputError:  # it needs other inputs, too: only its config tells what it reads
            used |= read
    if not used <= read:
        return False  # a head reads more maps than its config says
    kept = sorted(read)
    for _, head in _heads(owner):
        for node in iter_dicts(head):
            index = node.get('in_index')
            if isinstance(index, int):
                node['in_index'] = kept.index(index % len(new))
            elif isinstance(index, (list, tuple)):
                node['in_index'] = type(index)(kept.index(i % len(new)) for i in index)
    _keep_maps(owner, kept, report)
    return used == read


def _keep_maps(owner: dict, kept: list[int], report: Report) -> None:
    """Keep the given outputs of the backbone only."""
    stages = owner['backbone']['out_indices']
    owner['backbone']['out_indices'] = tuple(stages[i] for i in kept)
    dropped = [stages[i] for i in range(len(stages)) if i not in kept]
    report.notes.append(
        f'backbone: no neck or head reads the map of stage {_join(dropped)} (counted from 0), so out_indices is '
        f'{owner["backbone"]["out_indices"]}; indices of the other maps are renumbered'
    )


def _rewire(node: dict, old: list[Level], new: list[Level], nested: bool = False) -> set[int]:
    """Replace the old channels in a neck or a head by the new ones; return the positions of the maps it reads."""
    before, after = [level.channels for level in old], [level.channels for level in new]
    channels, index = node.get('in_channels'), node.get('in_index')
    orders: list[Sequence[int]] = []  # positions of the maps that the channels may belong to
    if isinstance(index, int):
        orders = [[index]]
    elif index is not None:
        orders = [index]
    elif isinstance(channels, (list, tuple)):
        everything = range(len(before))
        orders = [everything[: len(channels)], everything[::-1], everything[-len(channels) :]]
    elif not nested:
        orders = [[-1]]  # the default of mmseg's heads
    stated = list(channels) if isinstance(channels, (list, tuple)) else [channels]
    read: set[int] = set()
    for order in orders:
        if stated == [before[i] for i in order if i < len(before)]:
            written = [after[i] for i in order]
            node['in_channels'] = type(channels)(written) if isinstance(channels, (list, tuple)) else written[0]
            read = {i % len(before) for i in order}
            break
    if 'c1_in_channels' in node and node['c1_in_channels'] == before[0]:  # DeepLabV3+ also reads the first map
        node['c1_in_channels'] = after[0]
        read.add(0)
    for key, value in node.items():
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, dict) and not key.endswith('_cfg'):
                read |= _rewire(child, old, new, nested=True)
    return read


def _compare(part: str, before: list[Level], after: list[Level]) -> PartStrides:
    return PartStrides(part, _strides(before), _strides(after))


def _strides(levels: list[Level]) -> tuple[float, ...]:
    return tuple(level.stride for level in levels)


def _join(numbers: Sequence[float]) -> str:
    return ', '.join(f'{number:g}' for number in numbers)


# Settings that depend on the backbone


def _remove_old_weights(cfg: Config) -> None:
    """Remove weights of whole models: they hold the old backbone."""
    if cfg.model.get('pretrained'):
        cfg.model.pretrained = None
    for owner in [node for node in iter_dicts(cfg.model) if 'backbone' in node]:
        if owner.get('pretrained'):
            owner['pretrained'] = None
        if 'Pretrained' in str(owner.get('init_cfg')):
            owner['init_cfg'] = None
    if cfg.get('load_from'):
        cfg.load_from = None


def _set_normalization(cfg: Config, scope: str) -> None:
    """Normalize images as in pre-training: RGB, mean and standard deviation of ImageNet."""
    found = [node['data_preprocessor'] for node in iter_dicts(cfg.model) if node.get('data_preprocessor')]
    if cfg.get('data_preprocessor'):
        found.append(cfg.data_preprocessor)
    for node in found:
        if 'data_preprocessor' not in node:
            rgb = 'to_rgb' if scope == 'mmpretrain' else 'bgr_to_rgb'
            node.update(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
            node[rgb] = True
            node.pop('rgb_to_bgr', None)


def _set_optimizer(cfg: Config, recipe: Recipe, no_decay: tuple[str, ...], report: Report) -> None:
    """Set the AdamW of the recipe. A config that already has an Adam keeps its learning rate and schedule."""
    wrapper = cfg.get('optim_wrapper')
    if not wrapper or 'optimizer' not in wrapper:
        return
    paramwise = wrapper.get('paramwise_cfg') or {}
    layer_decay = {'decay_rate', 'layer_decay_rate'} & paramwise.keys()
    if layer_decay:  # it counts the layers of the old backbone
        wrapper.pop('constructor', None)
        paramwise = {k: v for k, v in paramwise.items() if k not in (*layer_decay, 'decay_type', 'num_layers')}
    is_adam = 'Adam' in type_name(wrapper['optimizer'])
    if not is_adam and 'bias_lr_mult' in paramwise:  # a custom of SGD
        paramwise = {k: v for k, v in paramwise.items() if k != 'bias_lr_mult'}
        report.notes.append('optim_wrapper: removed bias_lr_mult, which is meant for SGD')
    keys = {**{key: {'decay_mult': 0.0} for key in no_decay}, **(paramwise.get('custom_keys') or {})}
    wrapper['paramwise_cfg'] = {**paramwise, 'custom_keys': keys}
    if is_adam:
        return

    ratio = recipe.lr / wrapper['optimizer']['lr']
    adamw = {'type': 'AdamW', 'lr': recipe.lr, 'betas': (0.9, 0.999), 'weight_decay': recipe.weight_decay}
    wrapper['optimizer'] = adamw
    cfg.auto_scale_lr = {'enable': False, **(cfg.get('auto_scale_lr') or {}), 'base_batch_size': recipe.batch}
    schedulers = cfg.get('param_scheduler') or []
    schedulers = list(schedulers) if isinstance(schedulers, (list, tuple)) else [schedulers]
    for scheduler in schedulers:
        for key in ('eta_min', 'eta_max'):
            if scheduler.get(key):
                scheduler[key] = float(f'{scheduler[key] * ratio:.6g}')
    if not any(_is_warmup(scheduler) for scheduler in schedulers):
        schedulers = _add_warmup(schedulers, recipe, cfg.get('train_cfg') or {}, report)
    cfg.param_scheduler = schedulers


def _is_warmup(scheduler: dict) -> bool:
    """Whether the learning rate rises under a scheduler."""
    name = type_name(scheduler)
    if name in ('LinearLR', 'ConstantLR'):
        start = scheduler.get('start_factor' if name == 'LinearLR' else 'factor', 1 / 3)
        return start < scheduler.get('end_factor', 1.0)
    return 'Warmup' in name or 'OneCycle' in name


def _add_warmup(schedulers: list[dict], recipe: Recipe, train_cfg: dict, report: Report) -> list[dict]:
    """Put the warm-up of the recipe, shortened for short runs, before a schedule that has none."""
    warmup = {'type': 'LinearLR', 'begin': 0, **recipe.warmup}
    epochs, iterations = train_cfg.get('max_epochs'), train_cfg.get('max_iters')
    if iterations:
        recipe_end = recipe.warmup['end'] if not recipe.warmup['by_epoch'] else iterations
        warmup.update(by_epoch=False, end=min(recipe_end, iterations // WARMUP_SHARE))
        warmup.pop('convert_to_iter_based', None)
        if warmup['end'] < 2:  # mmengine's LinearLR over one step never leaves its start
            return schedulers
    elif epochs and epochs >= WARMUP_SHARE:
        # How many iterations an epoch has is not known here. Two epochs are at least two steps.
        recipe_end = recipe.warmup['end'] if recipe.warmup['by_epoch'] else 2
        warmup.update(by_epoch=True, end=min(recipe_end, epochs // WARMUP_SHARE), convert_to_iter_based=True)
    elif epochs:  # a tenth of the run, if an epoch has 100 iterations
        warmup.update(by_epoch=False, end=10 * epochs)
        warmup.pop('convert_to_iter_based', None)
    unit = 'epochs' if warmup['by_epoch'] else 'iterations'
    report.notes.append(f'param_scheduler: added a warm-up of {warmup["end"]} {unit}')
    for scheduler in schedulers:
        follows = type_name(scheduler) in ('PolyLR', 'CosineAnnealingLR') and 'T_max' not in scheduler
        same_unit = scheduler.get('by_epoch', True) == warmup['by_epoch']
        if follows and same_unit and scheduler.get('begin', 0) == 0:
            scheduler['begin'] = warmup['end']
    return [warmup, *schedulers]


def _check_schedule(cfg: Config) -> None:
    """Build the schedulers as mmengine's Runner does.

    Raises:
        InputError: one of them cannot be built.
    """
    schedulers, train_cfg = cfg.get('param_scheduler') or [], cfg.get('train_cfg') or {}
    epoch_length = 1000  # any number will do: the data is not read
    max_epochs = train_cfg.get('max_epochs', 1)
    max_iters = train_cfg.get('max_iters', max_epochs * epoch_length)
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0)
    with DefaultScope.overwrite_default_scope(_scope(cfg)):
        for scheduler in schedulers if isinstance(schedulers, (list, tuple)) else [schedulers]:
            end = max_epochs if scheduler.get('by_epoch', True) else max_iters
            config = {'end': end, **copy.deepcopy(scheduler)}
            try:
                PARAM_SCHEDULERS.build(config, default_args={'optimizer': optimizer, 'epoch_length': epoch_length})
            except Exception as error:
                raise InputError(
                    f'cannot be plugged: param_scheduler {scheduler["type"]} cannot be built: {one_line(error)}'
                ) from error


def _remove_dead_keys(before: Config, cfg: Config, scope: str, report: Report) -> None:
    """Remove ``custom_keys`` that selected parameters of the old model and select none of the new one."""
    paramwise = (cfg.get('optim_wrapper') or {}).get('paramwise_cfg') or {}
    own = (before.get('optim_wrapper') or {}).get('paramwise_cfg') or {}
    keys = (own.get('custom_keys') or {}).keys() & (paramwise.get('custom_keys') or {}).keys()
    if not keys:
        return
    old, new = _parameter_names(before.model, scope), _parameter_names(cfg.model, scope)
    if old is None or new is None:
        return
    dead = {key for key in keys if any(key in name for name in old) and not any(key in name for name in new)}
    if dead:
        paramwise['custom_keys'] = {k: v for k, v in paramwise['custom_keys'].items() if k not in dead}
        report.notes.append(
            f'optim_wrapper: removed custom_keys of layers that the new model does not have: {", ".join(sorted(dead))}'
        )


def _parameter_names(model: dict, scope: str) -> list[str] | None:
    """Return the names of a model's parameters, or None if it cannot be built here."""
    for device in ('meta', 'cpu'):
        try:
            return [name for name, _ in _build(model, scope, device).named_parameters()]
        except Exception:
            continue
    return None


# Showing and writing


def show(before: Config, after: Config) -> str:
    """List the changed entries, one per line: ``- path = old value`` and ``+ path = new value``."""
    old, new = (dict(_leaves(with_type_names(cfg).to_dict())) for cfg in (before, after))
    lines = []
    for path in sorted(old.keys() | new.keys()):
        if old.get(path) != new.get(path):
            lines += [f'{sign} {path} = {side[path]}' for sign, side in (('-', old), ('+', new)) if path in side]
    return '\n'.join(lines)


def write(before: Config, after: Config, path: Path, force: bool = False, flat: bool = False) -> None:
    """Save a plugged config; the file is read back and compared before it appears.

    By default the file inherits from the config that was plugged and holds the differences only, in the style of that
    config (classic or pure Python).

    Args:
        before: the config that was plugged, as :func:`swin_mm.openmmlab.config.load_config` returns it.
        after: the result of ``plug``.
        path: the file to write; its folder is created if missing.
        force: replace an existing file.
        flat: write a config that inherits from nothing: mmengine's ``Config.fromfile``, and so the tools of mmdet and
            mmseg, read it without swin_mm having been imported.

    Raises:
        InputError: the file exists or cannot be written, or the config cannot be inherited from.
    """
    if path.exists() and not force:
        raise InputError(f'{path} exists; give another --out, or --force to replace it')
    if flat:
        text = Config(after.to_dict()).pretty_text
    elif is_pure_python(before):
        text = _pure_python_text(before, after, path)
    else:
        base = before.filename if '::' in before.filename else os.path.relpath(before.filename, path.parent)
        text = Config({'_base_': [base], **_difference(before.to_dict(), after.to_dict())}).pretty_text
    with atomic_write(path) as part:
        part.write_text(text, encoding='utf-8')
        try:
            same = with_type_names(Config.fromfile(part) if flat else load_config(part)).to_dict() == after.to_dict()
        except Exception as error:
            raise InputError(
                f'{before.filename} cannot be inherited from ({one_line(error)}); write all settings with --flat'
            ) from error
        if not same:
            raise InputError(f'{path} would not read back as the plugged config; nothing was written')


def _pure_python_text(before: Config, after: Config, path: Path) -> str:
    """Return a config in mmengine's pure Python style with the differences."""
    relative = Path(os.path.relpath(Path(before.filename).with_suffix(''), path.parent))
    names = [part for part in relative.parts if part != os.pardir]
    if '::' in before.filename or not all(name.isidentifier() for name in names):
        raise InputError(
            f'{before.filename} cannot be imported as a module, so nothing can inherit from it in pure Python style; '
            'write all settings with --flat'
        )
    module = '.' * (1 + len(relative.parts) - len(names)) + '.'.join(names)
    old = with_type_names(before).to_dict()
    lines = ['from mmengine.config import read_base', '', 'with read_base():', f'    from {module} import *', '']
    for key, value in _difference(old, after.to_dict()).items():
        text = Config({key: value}).pretty_text.strip()
        if isinstance(value, dict) and key in old:
            text = f'{key}.merge({text.partition("=")[2]})'
        lines.append(text)
    for name in (name.rpartition('.')[2] for name in TYPES):
        if any(f"'swin_mm.{name}'" in line for line in lines):
            lines = [line.replace(f"type='swin_mm.{name}'", f'type={name}') for line in lines]
            lines.insert(1, f'from swin_mm import {name}')
    return '\n'.join(lines) + '\n'


def _difference(old: dict, new: dict) -> dict:
    """Return what a config that inherits from ``old`` must contain to become ``new``."""
    result = {}
    for key, value in new.items():
        if key in old and _same(old[key], value):
            continue
        if isinstance(value, dict) and key in old:
            if isinstance(old[key], dict) and not _lost(old[key], value):
                value = _difference(old[key], value)
            else:
                value = {'_delete_': True, **value}
        result[key] = value
    return result


def _same(a: Any, b: Any) -> bool:
    return a == b and type(a) is type(b)


def _lost(old: dict, new: dict) -> bool:
    return bool(old.keys() - new.keys())


def _plain(node: dict) -> dict:
    return {key: list(value) if isinstance(value, (list, tuple)) else value for key, value in node.items()}


def _leaves(node: Any, path: str = '') -> Iterator[tuple[str, str]]:
    """Yield (path, value) of every value that contains no dict."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _leaves(value, f'{path}.{key}' if path else str(key))
    elif isinstance(node, (list, tuple)) and any(isinstance(child, dict) for child in node):
        for i, value in enumerate(node):
            yield from _leaves(value, f'{path}.{i}')
    else:
        yield path, repr(node)
