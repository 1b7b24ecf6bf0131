"""Put our Swin into an OpenMMLab config: in the place of another Swin, or of another backbone altogether.

``plug`` changes a config, ``show`` lists the changes, ``write`` saves them as a config that inherits from the old one.
What a replaced backbone and its neck give is measured by running them, not looked up by name.
"""

import copy
import math
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
from mmengine.config import Config
from mmengine.registry import MODELS, DefaultScope

from swin_mm.checkpoints.namings import MMDET
from swin_mm.models.swin import ARCHS
from swin_mm.openmmlab.config import iter_dicts
from swin_mm.utils.errors import InputError
from swin_mm.utils.files import atomic_write

# The backbones that our recipes use, with their official weights. L exists from ImageNet-22k only.
BACKBONES = Path(__file__).parents[1] / '.mim/configs/_base_/backbones'
TYPES = ('swin_mm.SwinTransformer', 'swin_mm.SwinTransformerV2')
STRIDES = (4, 8, 16, 32)
SIDE = 256  # of the image that backbones and necks are run on


class Recipe(NamedTuple):
    """What the published Swin recipes of a library's task say.

    Args:
        lr: for a batch of ``batch`` images.
        batch: over all GPUs.
        weight_decay: of AdamW.
        drop_path_rate: by size.
        warmup: arguments of the LinearLR that training begins with.
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
NO_DECAY = ('absolute_pos_embed', 'relative_position_bias_table', 'norm')
NO_DECAY_V2 = (*NO_DECAY, 'cpb_mlp', 'logit_scale')
# Backbones that are the method itself: its heads read branches that only this network has.
OWN = {
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


class Level(NamedTuple):
    """A feature map: its channels, and image side over its side."""

    channels: int
    stride: int


def plug(cfg: Config, arch: str | None = None, v2: bool = False, checkpoint: str | None = None) -> Config:
    """A copy of a config whose model has our Swin as its backbone.

    A Swin of any library is replaced by ours with the same arguments and nothing else changes, unless another size or
    version is asked for. Any other backbone is replaced by a Swin of size ``arch`` together with what depends on it:
    channels of necks and heads, normalisation of the image, optimizer, warm-up, weights to start from.

    Args:
        cfg: what ``Config.fromfile`` gives; stays as it is.
        arch: 't', 's', 'b' or 'l'; None keeps the size of a Swin and means 't' otherwise.
        v2: Swin V2.
        checkpoint: weights of the backbone; None keeps those of a Swin and means the official ones otherwise.

    Raises:
        InputError: no Swin can take the place of the backbone; the message says why.
    """
    if arch not in (None, *ARCHS):
        raise InputError(f'arch {arch!r} is not known; choose from: {", ".join(ARCHS)}')
    cfg = copy.deepcopy(cfg)
    model, scope = cfg.get('model'), cfg.get('default_scope')
    if not isinstance(model, dict) or scope not in RECIPES:
        raise InputError(
            f'{cfg.filename} is not the config of a model of {", ".join(RECIPES)} (it needs model and default_scope)'
        )
    if not isinstance(model.get('type'), str):
        raise InputError(
            f"{cfg.filename} names classes (mmengine's pure Python style); give one that names types as text"
        )

    replaced = False
    for owner in list(iter_dicts(model)):
        for key, node in owner.items():
            if _is_swin(node) and (key != 'backbone' or _is_as_asked(node, arch, v2)):
                _adopt(node, scope, checkpoint)
            elif key == 'backbone' and isinstance(node, dict):
                if not _replace(owner, arch or _arch(node) or 't', v2, checkpoint, scope):
                    cfg.find_unused_parameters = True
                replaced = True
    if replaced:
        _start_anew(cfg)
        _set_images(cfg)
        _set_optimizer(cfg, RECIPES[scope], NO_DECAY_V2 if v2 else NO_DECAY)
    elif not any(str(node.get('type')) in TYPES for node in iter_dicts(model)):
        raise InputError(f'the model of {cfg.filename} ({model.get("type")}) has no entry "backbone"')
    else:
        _rename_keys(cfg)
    imports = cfg.get('custom_imports') or {}
    names = imports.get('imports') or []
    names = [names] if isinstance(names, str) else list(names)
    if 'swin_mm' not in names:
        cfg.custom_imports = {**imports, 'imports': [*names, 'swin_mm']}
    return cfg


# A Swin for a Swin


def _is_swin(node: Any) -> bool:
    return isinstance(node, dict) and _name(node) in ('SwinTransformer', 'SwinTransformerV2')


def _is_as_asked(node: dict, arch: str | None, v2: bool) -> bool:
    return arch in (None, _arch(node)) and (not v2 or _name(node).endswith('V2'))


def _arch(node: dict) -> str | None:
    """The letter of a Swin's size, None for a size of its own or another backbone."""
    if not _is_swin(node):
        return None
    if isinstance(node.get('arch'), str):
        return node['arch'][0].lower()
    sizes = ARCHS['t'] | {key: node[key] for key in ARCHS['t'] if key in node}
    return next((arch for arch, known in ARCHS.items() if _plain(known) == _plain(sizes)), None)


def _adopt(node: dict, scope: str, checkpoint: str | None) -> None:
    """Make a Swin of any library ours."""
    library = node['type'].rpartition('.')[0] or scope
    if library in ('mmpretrain', 'mmcls'):
        _translate_mmpretrain(node)
    node['type'] = f'swin_mm.{_name(node)}'
    if checkpoint:
        node.pop('pretrained', None)
        node['init_cfg'] = {'type': 'Pretrained', 'checkpoint': checkpoint}


def _rename_keys(cfg: Config) -> None:
    """Have keys that pick parameters of the other Swin, to train them otherwise, pick the same ones of ours."""
    paramwise = (cfg.get('optim_wrapper') or {}).get('paramwise_cfg') or {}
    if keys := paramwise.get('custom_keys'):
        parts = {key: key.partition('backbone.') for key in keys}
        paramwise['custom_keys'] = {
            owner + dot + MMDET.ours(rest) if dot else key: keys[key] for key, (owner, dot, rest) in parts.items()
        }


def _translate_mmpretrain(node: dict) -> None:
    """Take mmpretrain's arguments as ours."""
    for key, default in (('out_after_downsample', False), ('stage_cfgs', {}), ('patch_cfg', {}), ('norm_eval', False)):
        if node.pop(key, default) != default:
            raise InputError(f'{node["type"]} with {key} has no counterpart in swin_mm')
    arch = node.pop('arch', 'tiny')
    if isinstance(arch, str):
        node['arch'] = arch[0].lower()
        if node['arch'] not in ARCHS:
            raise InputError(f'{node["type"]} of size {arch!r} is not known here; choose from: {", ".join(ARCHS)}')
    else:
        node.update(arch)
    if 'img_size' in node:
        node['pretrain_img_size'] = node.pop('img_size')
    node.pop('interpolate_mode', None)
    node.setdefault('out_indices', (3,))
    node.setdefault('pad_small_map', False)
    if node.get('frozen_stages', -1) >= 0:
        node['frozen_stages'] += 1  # theirs counts the last frozen stage, ours how many


# A Swin for another backbone


def _replace(owner: dict, arch: str, v2: bool, checkpoint: str | None, scope: str) -> bool:
    """Put a Swin into a model in place of its backbone, and its channels into what reads them.

    Returns whether all of its maps are read; an output norm that nothing reads gets no gradient.
    """
    backbone = owner['backbone']
    _refuse_own(owner, backbone)
    side = backbone.get('img_size', SIDE)  # some transformers take images of their own size alone
    side = side if isinstance(side, int) else side[0]
    old, _ = _run(backbone, (torch.zeros(1, 3, side, side),), scope, 'backbone')
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

    read: set[int] = set()  # positions of the maps that something reads
    if neck := owner.get('neck'):
        try:
            before, _ = _run(neck, _maps(old), scope, 'neck')
        except InputError:  # it needs operators that only a GPU has, or more than maps
            before = None
        if not _rewire(neck[0] if isinstance(neck, list) else neck, old, new) and old != new and before is None:
            raise InputError('cannot be plugged: its neck does not say which channels it takes')
        if before is None:  # necks bring maps to channels of their own
            return True
        after, read = _run(neck, _maps(new), scope, 'neck, given the maps of a Swin,')
        old, new = before, after
    for key, node in owner.items():
        if key not in ('backbone', 'neck', 'data_preprocessor') and not key.endswith('_cfg'):
            for part in node if isinstance(node, list) else [node]:
                if isinstance(part, dict) and 'backbone' not in part:
                    found = _rewire(part, old, new)
                    read |= set() if neck else found
    return not read or len(read) == len(stages)


def _refuse_own(owner: dict, backbone: dict) -> None:
    """Refuse the models that no other backbone fits."""
    name = _name(backbone)
    if name in OWN or 'backbone_cfg' in backbone:
        raise InputError(f'cannot be plugged: {name} is part of the method, whose heads read what only it gives')
    if any('shared_head' in node for node in iter_dicts(owner.get('roi_head'))):
        raise InputError('cannot be plugged: the RoI head runs the last stage of a ResNet (C4, shared_head)')
    if not owner.get('neck') and ('rpn_head' in owner or owner.get('type') == 'RPN'):
        raise InputError('cannot be plugged: the RPN reads one map of a ResNet directly (C4 or DC5, no FPN)')


def _run(config: Any, maps: tuple[torch.Tensor, ...], scope: str, what: str) -> tuple[list[Level], set[int]]:
    """Build a backbone or neck without weights and run it: what it gives, and which of ``maps`` that depends on."""
    config = copy.deepcopy(config)
    for node in iter_dicts(config):
        for key in ('init_cfg', 'pretrained'):
            node.pop(key, None)
    try:
        with DefaultScope.overwrite_default_scope(scope):
            module = MODELS.build(config)
            module.eval()  # some return None
            with torch.set_grad_enabled(what != 'backbone'):
                outputs = module(maps if what != 'backbone' else maps[0])
    except Exception as error:
        words = ' '.join(str(error).split()) or type(error).__name__
        raise InputError(f'cannot be plugged: its {what} does not run: {words}') from error
    outputs = list(outputs) if isinstance(outputs, (list, tuple)) else [outputs]
    if not all(isinstance(output, torch.Tensor) for output in outputs):
        raise InputError(f'cannot be plugged: its {what} gives more than feature maps')
    if what == 'backbone':
        return [Level(output.shape[1], maps[0].shape[-1] // output.shape[-1]) for output in outputs], set()
    levels = [Level(output.shape[1], 0) for output in outputs]  # nobody asks for strides behind the neck
    gradients = torch.autograd.grad([output.sum() for output in outputs], maps, allow_unused=True)
    return levels, {i for i, gradient in enumerate(gradients) if gradient is not None}


def _maps(levels: list[Level]) -> tuple[torch.Tensor, ...]:
    sides = [SIDE // level.stride for level in levels]
    return tuple(
        torch.zeros(1, level.channels, side, side, requires_grad=True)
        for level, side in zip(levels, sides, strict=True)
    )


def _choose_stages(backbone: dict, strides: list[int], scope: str) -> list[int]:
    """The Swin stage for each output: that of the nearest stride, one further where strides repeat."""
    name, count = _name(backbone), len(strides)
    if count > 4 or strides != sorted(strides) or strides[0] < 4 or strides[-1] > 32:
        raise InputError(f'cannot be plugged: {name} gives maps of strides {strides}, a Swin has {list(STRIDES)}')
    stages: list[int] = []
    for i, stride in enumerate(strides):
        nearest = min(range(4), key=lambda stage: abs(math.log2(STRIDES[stage] / stride)))
        stages.append(min(max([nearest, *(stage + 1 for stage in stages)]), 4 - count + i))
    # Anchors and points of detectors have the strides of their maps written down.
    if scope == 'mmdet' and [STRIDES[stage] for stage in stages] != strides:
        raise InputError(f'cannot be plugged: {name} gives maps of strides {strides}, a Swin has {list(STRIDES)}')
    return stages


def _rewire(node: dict, old: list[Level], new: list[Level], nested: bool = False) -> set[int]:
    """Write the new channels where a neck or a head states the old ones; the positions of the maps that it reads."""
    before, after = [level.channels for level in old], [level.channels for level in new]
    channels, index = node.get('in_channels'), node.get('in_index')
    orders: list[Sequence[int]] = []  # which maps the channels may be those of
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
    if 'c1_in_channels' in node and node['c1_in_channels'] == before[0]:  # DeepLabV3+ takes details from the first
        node['c1_in_channels'] = after[0]
        read.add(0)
    for key, value in node.items():
        for child in value if isinstance(value, list) else [value]:
            if isinstance(child, dict) and not key.endswith('_cfg'):
                read |= _rewire(child, old, new, nested=True)
    return read


# What else depends on the backbone


def _start_anew(cfg: Config) -> None:
    """Leave out weights of whole models: they hold the backbone that was replaced."""
    cfg.model.update({'pretrained': None} if cfg.model.get('pretrained') else {})
    for owner in [node for node in iter_dicts(cfg.model) if 'backbone' in node]:
        if owner.get('pretrained'):
            owner['pretrained'] = None
        if 'Pretrained' in str(owner.get('init_cfg')):
            owner['init_cfg'] = None
    if cfg.get('load_from'):
        cfg.load_from = None


def _set_images(cfg: Config) -> None:
    """Normalise images as the pre-training did: RGB, ImageNet's mean and deviation."""
    found = [node['data_preprocessor'] for node in iter_dicts(cfg.model) if node.get('data_preprocessor')]
    if cfg.get('data_preprocessor'):
        found.append(cfg.data_preprocessor)
    for node in found:
        if 'data_preprocessor' not in node:
            rgb = 'to_rgb' if cfg.get('default_scope') == 'mmpretrain' else 'bgr_to_rgb'
            node.update(mean=[123.675, 116.28, 103.53], std=[58.395, 57.12, 57.375])
            node[rgb] = True
            node.pop('rgb_to_bgr', None)


def _set_optimizer(cfg: Config, recipe: Recipe, no_decay: tuple[str, ...]) -> None:
    """AdamW and warm-up of the recipe; the schedule keeps its shape. A config that has AdamW keeps its rates."""
    wrapper = cfg.get('optim_wrapper')
    if not wrapper or 'optimizer' not in wrapper:
        return
    paramwise = wrapper.get('paramwise_cfg') or {}
    if 'decay_rate' in paramwise:  # layer decay names the layers of the replaced backbone
        wrapper.pop('constructor', None)
        paramwise = {k: v for k, v in paramwise.items() if k not in ('decay_rate', 'decay_type', 'num_layers')}
    keys = {**{key: {'decay_mult': 0.0} for key in no_decay}, **(paramwise.get('custom_keys') or {})}
    wrapper['paramwise_cfg'] = {**paramwise, 'custom_keys': keys}
    if 'Adam' in wrapper['optimizer']['type']:
        return

    ratio = recipe.lr / wrapper['optimizer']['lr']
    adamw = {'type': 'AdamW', 'lr': recipe.lr, 'betas': (0.9, 0.999), 'weight_decay': recipe.weight_decay}
    wrapper['optimizer'] = adamw
    if cfg.get('auto_scale_lr'):
        cfg.auto_scale_lr['base_batch_size'] = recipe.batch
    schedulers = cfg.get('param_scheduler') or []
    schedulers = list(schedulers) if isinstance(schedulers, (list, tuple)) else [schedulers]
    for scheduler in schedulers:
        if scheduler.get('eta_min'):
            scheduler['eta_min'] = float(f'{scheduler["eta_min"] * ratio:.6g}')
    warmup = {'type': 'LinearLR', 'begin': 0, **recipe.warmup}
    begin = 0  # of what follows the warm-up
    if schedulers and ('Warmup' in schedulers[0]['type'] or schedulers[0]['type'] in ('LinearLR', 'ConstantLR')):
        begin = schedulers.pop(0).get('end')
    for scheduler in schedulers:
        curve = scheduler['type'] in ('PolyLR', 'CosineAnnealingLR') and 'T_max' not in scheduler
        same_clock = scheduler.get('by_epoch', True) == warmup['by_epoch']
        if curve and same_clock and scheduler.get('begin', 0) == begin:
            scheduler['begin'] = warmup['end']
    cfg.param_scheduler = [warmup, *schedulers]


# Showing and writing


def show(before: Config, after: Config) -> str:
    """The changed entries, one a line: ``- path = value`` for what was, ``+ path = value`` for what is."""
    old, new = (dict(_leaves(cfg.to_dict())) for cfg in (before, after))
    lines = []
    for path in sorted(old.keys() | new.keys()):
        if old.get(path) != new.get(path):
            lines += [f'{sign} {path} = {side[path]}' for sign, side in (('-', old), ('+', new)) if path in side]
    return '\n'.join(lines)


def write(before: Config, after: Config, path: Path, force: bool = False) -> None:
    """Save a plugged config as one that inherits from the config it was made of and holds the differences alone.

    Args:
        before: the config that was plugged, as ``swin_mm.openmmlab.config.load_config`` gives it.
        after: what ``plug`` made of it.
        path: the file to write.
        force: replace a file that is there.

    Raises:
        InputError: the file is there, or cannot be written.
    """
    if path.exists() and not force:
        raise InputError(f'{path} exists; give another --out, or --force to replace it')
    base = before.filename if '::' in before.filename else os.path.relpath(before.filename, path.parent)
    changes = {'_base_': [base], **_difference(before.to_dict(), after.to_dict())}
    with atomic_write(path) as part:
        part.write_text(Config(changes).pretty_text, encoding='utf-8')
        if Config.fromfile(part).to_dict() != after.to_dict():
            raise InputError(f'{path} would not read back as the plugged config; nothing was written')


def _difference(old: dict, new: dict) -> dict:
    """What a config over ``old`` must hold to become ``new``, by mmengine's rules of inheritance."""
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


def _name(node: dict) -> str:
    return str(node.get('type')).rpartition('.')[2]


def _plain(node: dict) -> dict:
    return {key: list(value) if isinstance(value, (list, tuple)) else value for key, value in node.items()}


def _leaves(node: Any, path: str = '') -> Iterator[tuple[str, str]]:
    """Every value that holds no dict, by its path."""
    if isinstance(node, dict) and node:
        for key, value in node.items():
            yield from _leaves(value, f'{path}.{key}' if path else str(key))
    elif isinstance(node, (list, tuple)) and any(isinstance(child, dict) for child in node):
        for i, value in enumerate(node):
            yield from _leaves(value, f'{path}.{i}')
    else:
        yield path, repr(node)
