"""Recognising a Swin Transformer in a checkpoint, and converting it to our names and layout or to another library's.

H, W rows and columns of the map, C channels, w side of a window, N = w * w its tokens, h heads.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from swin_mm.checkpoints.namings import LEFTOVERS, NAMINGS, OUTPUT_NORMS, REBUILT, RELATIVES, STAGES, TARGETS, Naming
from swin_mm.checkpoints.pickles import ARRAYS, HEADROOM, MAX_EXPANSION
from swin_mm.models.swin import ARCHS
from swin_mm.ops.windows import log_spaced_offsets, region_mask, relative_index
from swin_mm.utils.errors import CheckpointError

MAX_BACKBONES = 16  # in one checkpoint; each is compared with every key
WRAPPERS = ('state_dict', 'model', 'module', 'state_dict_ema', 'model_ema')


def unwrap(checkpoint: Any, prefix: str = '') -> dict[str, Any]:
    """The state dict inside a checkpoint: itself, or the value under ``state_dict``, ``model`` and the like.

    Args:
        checkpoint: the content of a file; arrays become tensors.
        prefix: take only the keys that begin with this, and remove it.

    Raises:
        CheckpointError: there is no state dict, or no key has the prefix.
    """
    state = checkpoint if isinstance(checkpoint, Mapping) else {}
    for _ in WRAPPERS:  # wrappers may be nested
        state = next((state[w] for w in WRAPPERS if isinstance(state.get(w), Mapping)), state)
    state = {
        key: torch.from_numpy(value) if isinstance(value, ARRAYS) else value
        for key, value in state.items()
        if isinstance(key, str)
    }
    if not any(isinstance(value, Tensor) for value in state.values()):
        raise CheckpointError(
            f'the file holds no state dict: expected tensors by name, bare or under {", ".join(WRAPPERS)}'
        )
    if not prefix:
        return state
    prefix = prefix.rstrip('.') + '.'
    found = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)}
    if not found:
        begin = ', '.join(sorted({key.partition('.')[0] for key in state})[:8])
        raise CheckpointError(f'no key in the file begins with {prefix!r}; they begin with {begin}')
    return found


@dataclass(frozen=True)
class Variant:
    """The architecture of a state dict in our names.

    Args:
        version: 1 or 2.
        in_channels: of the image.
        patch: side of a patch.
        embed_dims: C of the first stage.
        depths: blocks per stage.
        num_heads: h per stage.
        windows: side of the window per stage; 0 where the state dict does not determine it.
    """

    version: int
    in_channels: int
    patch: int
    embed_dims: int
    depths: tuple[int, ...]
    num_heads: tuple[int, ...]
    windows: tuple[int, ...]

    @classmethod
    def of(cls, state: Mapping[str, Tensor]) -> 'Variant':
        """Infer the sizes from a state dict in our names."""
        found = (re.match(r'layers\.(\d{1,15})\.blocks\.(\d{1,15})\.', key) for key in state)
        blocks = {(int(m[1]), int(m[2])) for m in found if m}
        for number in (number for block in blocks for number in block):
            if number >= len(state):  # or few keys would claim a model of any size
                raise CheckpointError(
                    f'the checkpoint numbers a stage or block {number} but has {len(state)} tensors: wrong keys'
                )
        depths: dict[int, int] = {}
        for stage, block in blocks:
            depths[stage] = max(depths.get(stage, 0), block + 1)
        stages = range(max(depths) + 1)
        version = _version(state)
        heads, windows = [], []
        for i in stages:
            attn = f'layers.{i}.blocks.0.attn.'
            table = state.get(attn + 'relative_position_bias_table')
            scale = state.get(attn + 'logit_scale')
            heads.append(len(scale) if scale is not None else table.shape[1] if table is not None else 0)
            side = 0 if table is None else math.isqrt(len(table))
            windows.append(side // 2 + 1 if table is not None and side**2 == len(table) else 0)
        out, channels, patch = state['patch_embed.proj.weight'].shape[:3]
        blocks_per_stage = tuple(depths.get(i, 0) for i in stages)
        return cls(version, channels, patch, out, blocks_per_stage, tuple(heads), tuple(windows))

    def sizes(self, stages: int) -> tuple[Any, ...]:
        """The sizes of the first ``stages`` stages that must be equal for weights to fit."""
        return self.embed_dims, self.depths[:stages], self.num_heads[:stages]

    @property
    def arch(self) -> str | None:
        """The name in ARCHS of the published model with these sizes, or None."""
        sizes = {'embed_dims': self.embed_dims, 'depths': self.depths, 'num_heads': self.num_heads}
        return next((arch for arch, published in ARCHS.items() if published == sizes), None)

    def __str__(self) -> str:
        if self.arch:
            return f'Swin-{self.arch.upper()} V{self.version}'
        if len(self.depths) > STAGES:
            return f'Swin V{self.version} with {len(self.depths)} stages'
        sizes = f'embed_dims={self.embed_dims}, depths={self.depths}, num_heads={self.num_heads}'
        return f'Swin V{self.version} with {sizes}'


@dataclass
class Contents:
    """A state dict of any known naming, split into its parts.

    Args:
        naming: the key naming found.
        prefix: what precedes the backbone's keys.
        state: the backbone's parameters, and a classifier's last norm and head, in our names and layout.
        sources: our key -> the file's.
        rebuilt: index tables and masks in the file, which follow from the sizes, by our names.
        others: everything else in the file, by its names.
    """

    naming: Naming
    prefix: str
    state: dict[str, Tensor] = field(default_factory=dict)
    sources: dict[str, str] = field(default_factory=dict)
    rebuilt: dict[str, Any] = field(default_factory=dict)
    others: dict[str, Any] = field(default_factory=dict)

    @property
    def variant(self) -> Variant:
        """The sizes of the backbone."""
        return Variant.of(self.state)

    def windows(self) -> list[tuple[int, int] | None]:
        """Per stage the window and the pre-training window that normalises V2's offsets; None where unknown."""
        found: list[tuple[int, int] | None] = []
        for i, window in enumerate(self.variant.windows):
            table = self.rebuilt.get(f'layers.{i}.blocks.0.attn.relative_coords_table')
            index = self.rebuilt.get(f'layers.{i}.blocks.0.attn.relative_position_index')
            if window:
                found.append((window, window))
            elif table is not None and table.ndim == 4 and not table.is_meta and table.numel() and table.max() > 0:
                # The largest offset is (w - 1) / (pre-training w - 1), log-spaced: invert that.
                w = table.shape[1] // 2 + 1
                ratio = (8 ** min(table.max().item(), 3) - 1) / 8
                found.append((w, round((w - 1) / ratio) + 1) if ratio > 0 else None)
            elif index is not None:
                w = math.isqrt(math.isqrt(index.numel()))
                found.append((w, w))
            else:
                found.append(None)
        return found


def parse(state: Mapping[str, Any]) -> Contents:
    """Recognise the naming of a state dict and convert it to our names and layout.

    Raises:
        CheckpointError: it holds no Swin Transformer, or several.
    """
    naming, prefix = _recognise(state)
    root = naming.root(prefix)
    contents = Contents(naming, prefix)
    for key, value in state.items():
        ours = naming.ours('/' + key.removeprefix(root)) if key.startswith(root) else '/'
        if ours.startswith('/') and key.startswith(prefix):
            ours = naming.ours(key.removeprefix(prefix))
        if ours.startswith('/') or not isinstance(value, Tensor):
            contents.others[key] = value
        elif re.fullmatch(REBUILT, ours):
            contents.rebuilt[ours] = value
        elif ours in contents.state:
            raise CheckpointError(f'{contents.sources[ours]} and {key} both name {ours}: the file mixes namings')
        else:
            contents.state[ours] = value
            contents.sources[ours] = key
    if not any(re.match(r'layers\.\d+\.blocks\.', key) for key in contents.state):
        raise _nothing_fits(state)
    projection = contents.state['patch_embed.proj.weight']
    if projection.ndim == 5:
        raise CheckpointError('the checkpoint is of a Video Swin Transformer; this backbone takes images')
    if projection.ndim != 4 or not projection.numel():
        source = contents.sources['patch_embed.proj.weight']
        raise CheckpointError(f'{source} is {tuple(projection.shape)}, expected (channels, image channels, side, side)')
    _to_our_layout(contents)
    return contents


def _version(names: Iterable[str]) -> int:
    return 2 if any(re.search(r'\.att(n|ention)\.(\w+\.)?logit_scale\Z', name) for name in names) else 1


def _recognise(state: Mapping[str, Any]) -> tuple[Naming, str]:
    """Find the naming of a state dict and the prefix of the backbone's keys."""
    for pattern, what in RELATIVES:
        if any(re.search(pattern, key) for key in state):
            raise CheckpointError(f'the checkpoint is of {what}; this backbone does not implement it')
    found = [
        (key.removesuffix(naming.anchor), naming)
        for naming in NAMINGS
        for key, value in state.items()
        # 'ema_' is a prefix, too
        if isinstance(value, Tensor) and re.search(rf'(\A|[._]){re.escape(naming.anchor)}\Z', key)
    ]
    if len({prefix for prefix, _ in found}) > MAX_BACKBONES:
        raise CheckpointError(f'the checkpoint has more than {MAX_BACKBONES} patch embeddings: say which with a prefix')
    found = [(prefix, naming) for prefix, naming in found if _has_naming(state, naming, prefix)]
    if not found:
        raise _nothing_fits(state)
    shortest = min(len(prefix) for prefix, _ in found)
    prefixes = dict.fromkeys(prefix for prefix, _ in found if len(prefix) == shortest)
    if len(prefixes) > 1:
        raise CheckpointError(
            f'the checkpoint holds several backbones, {" and ".join(prefixes)}: say which with init_cfg prefix=...'
        )
    return next((naming, prefix) for prefix, naming in found if prefix in prefixes)


def _nothing_fits(state: Mapping[str, Any]) -> CheckpointError:
    some = ', '.join(list(state)[:3]) or 'none'
    anchors = ' or '.join(dict.fromkeys(naming.anchor for naming in NAMINGS))
    return CheckpointError(
        'nothing in the checkpoint fits a Swin Transformer backbone: expected blocks and a patch embedding, '
        f'{anchors}, found {some}'
    )


def _has_naming(state: Mapping[str, Any], naming: Naming, prefix: str) -> bool:
    """Whether the keys around a patch embedding have this naming."""
    root = naming.root(prefix)
    keys = [key.removeprefix(root) for key in state if key.startswith(root)]
    return (
        naming.version in (None, _version(keys))
        and any(re.search(naming.must_match, key) for key in keys)
        and not any(re.search(naming.must_not_match, key) for key in keys)
    )


def _to_our_layout(contents: Contents) -> None:
    """Join q, k and v, put the channels of patch merging in the official order, and so on."""
    state, sources = contents.state, contents.sources
    version = _version(state)

    def put(new: str, value: Tensor, *old: str) -> None:
        sources[new] = sources[old[0]]
        for name in {*old} - {new}:
            del state[name], sources[name]
        state[new] = value

    for key in list(state):
        attn, _, kind = key.rpartition('.attn.')
        attn += '.attn.'
        if kind in ('q.weight', 'q.bias'):
            parts = [f'{attn}{part}.{kind.removeprefix("q.")}' for part in 'qkv']
            if all(part in state for part in parts):
                put(attn + kind.replace('q.', 'qkv.'), torch.cat([state[part] for part in parts]), *parts)
        if version == 2 and kind in ('q.bias', 'v.bias'):
            put(attn + kind.replace('.', '_'), state[key], key)
        if version == 2 and kind == 'qkv.bias':
            q, _, v = state[key].chunk(3)  # cosine attention has no bias for keys
            sources[attn + 'v_bias'] = sources[key]
            state[attn + 'v_bias'] = v
            put(attn + 'q_bias', q, key)
        if contents.naming.unfold and _is_merged(key, version):
            # (..., C * row * column) -> (..., column * row * C)
            state[key] = state[key].unflatten(-1, (-1, 2, 2)).transpose(-1, -3).flatten(-3)
    norms = [key for key in state if re.fullmatch(OUTPUT_NORMS, key)]
    last = f'norm{len(contents.variant.depths) - 1}.'
    if contents.naming.last_norm and all(key.startswith(last) for key in norms):
        for key in norms:
            put(key.replace(last, 'norm.'), state[key], key)


def _is_merged(key: str, version: int) -> bool:
    """Whether a parameter's last axis is the 4C channels of patch merging; V2 has its norm after the reduction."""
    return bool(re.search(r'\.downsample\.(reduction|norm)' if version == 1 else r'\.downsample\.reduction', key))


def convert(
    contents: Contents, target: str, windows: Sequence[int] | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Convert a backbone to the names and layout of ``target``. Values are moved, never computed.

    Position indices, coordinate tables and attention masks are added where the target's strict loading expects them.

    Args:
        contents: what :func:`parse` returned.
        target: a key of TARGETS.
        windows: window of each stage, for V2 weights of a naming that does not store it.

    Returns:
        The checkpoint, and what was left out of it: the file's key -> why.

    Raises:
        CheckpointError: the target has no such Swin.
    """
    variant = contents.variant
    naming = next((n for n in TARGETS[target] if n.version in (None, variant.version)), None)
    if naming is None:
        raise CheckpointError(f'{target} has no Swin V{variant.version}')
    state, dropped = {}, {}
    for key, value in contents.state.items():
        why = meaning(key, LEFTOVERS)
        if re.fullmatch(naming.unsupported, key):
            if 'norm' not in key:
                raise CheckpointError(f'{target} has no {key}, which {contents.sources[key]} would become')
            why = f'{target} has no output norms'
        if why:
            dropped[contents.sources[key]] = why
        else:
            state[key] = value
    state |= _derived(naming, contents, windows)
    state = _to_their_layout(state, naming, variant)

    whole = naming.whole and contents.naming.whole and contents.prefix.endswith('backbone.')
    root = contents.prefix if whole else ''
    # transformers wraps the backbone in its classifiers, not in its backbone classes.
    bare = naming.name == 'transformers' and 'head.weight' not in contents.state
    wrapper = '' if bare else naming.wrappers[0]
    result = {}
    for key, value in state.items():
        theirs = naming.theirs(key)
        theirs = root + (theirs[1:] if theirs.startswith('/') else wrapper + theirs)
        result[theirs] = value
    if whole:
        dropped |= {key: 'not a tensor' for key, value in contents.others.items() if not isinstance(value, Tensor)}
        result |= {key: value for key, value in contents.others.items() if isinstance(value, Tensor)}
    else:
        dropped |= dict.fromkeys(contents.others, 'other part of the model')
    # A part of a larger tensor would be saved with all of it.
    result = {key: value.clone(memory_format=torch.contiguous_format) for key, value in result.items()}
    return {naming.root_key: result} if naming.root_key else result, dropped


def transformers_config(contents: Contents, windows: Sequence[int] | None = None) -> dict[str, Any]:
    """The ``config.json`` with which transformers' ``from_pretrained`` reads what :func:`convert` makes.

    Args:
        contents: what :func:`parse` returned.
        windows: window of each stage, for V2 weights of a naming that does not store it.

    Raises:
        CheckpointError: the window is unknown.
    """
    variant, state, told = contents.variant, contents.state, contents.windows()
    sides = [window if window else (windows[i],) * 2 if windows else (0, 0) for i, window in enumerate(told)]
    if not all(window for window, _ in sides):
        raise CheckpointError('the config needs the window, which the file does not store: give --window')
    norms = sorted(int(key[4:-7]) for key in state if re.fullmatch(r'norm\d+\.weight', key))
    kind = 'ForImageClassification' if 'head.weight' in state else 'Backbone' if norms else 'Model'
    config = {
        'model_type': 'swin' if variant.version == 1 else 'swinv2',
        'architectures': [f'Swin{"v2" * (variant.version == 2)}{kind}'],
        # In every published model the last window is as large as the last map.
        'image_size': variant.patch * 2 ** (len(sides) - 1) * sides[-1][0],
        'patch_size': variant.patch,
        'num_channels': variant.in_channels,
        'embed_dim': variant.embed_dims,
        'depths': list(variant.depths),
        'num_heads': list(variant.num_heads),
        'window_size': max(window for window, _ in sides),
        'mlp_ratio': len(state['layers.0.blocks.0.mlp.fc1.weight']) / variant.embed_dims,
        'qkv_bias': any(key.endswith(('attn.qkv.bias', 'attn.q_bias')) for key in state),
        'use_absolute_embeddings': 'absolute_pos_embed' in state,
        'layer_norm_eps': 1e-5,
    }
    if variant.version == 2:
        config['pretrained_window_sizes'] = [whole if whole != window else 0 for window, whole in sides]
    if 'head.weight' in state:
        config['num_labels'] = len(state['head.weight'])
    if norms:
        config['out_features'] = [f'stage{i + 1}' for i in norms]
    return config


def meaning(name: str, table: Sequence[tuple[str, str]]) -> str | None:
    """The entry of the first pattern in a table that matches a name."""
    return next((what for pattern, what in table if re.fullmatch(pattern, name)), None)


def _derived(naming: Naming, contents: Contents, windows: Sequence[int] | None) -> dict[str, Tensor]:
    """The buffers that the target's strict loading expects, by our names.

    Raises:
        CheckpointError: they would be much larger than the weights.
    """
    if not naming.index:
        return {}
    variant, told = contents.variant, contents.windows()
    sides = [window if window else (windows[i],) * 2 if windows else None for i, window in enumerate(told)]
    known = [side for side in sides if side is not None]
    # In every published classifier the last window is as large as the last map, which determines the size of all maps.
    masks = naming.masks and 'head.weight' in contents.state and len(known) == len(sides)
    maps = [known[-1][0] * 2 ** (len(sides) - 1 - i) if masks else 0 for i in range(len(sides))]
    sizes = [
        depth * (8 * window[0] ** 4 + 2 * (side * window[0]) ** 2)
        for depth, window, side in zip(variant.depths, sides, maps, strict=True)
        if window is not None
    ]
    weights = sum(value.nbytes for value in contents.state.values())
    if sum(sizes) > MAX_EXPANSION * weights + HEADROOM:
        raise CheckpointError(
            f'{naming.name} stores tables for windows of {max(w for w, _ in known)}, which would take '
            f'{sum(sizes) / 1e9:,.0f} GB; the file or --window is wrong, or choose another target'
        )
    found, cpu = {}, torch.device('cpu')
    for i, window in enumerate(sides):
        if window is None:
            continue
        side, pretrained = ((w, w) for w in window)
        index = relative_index(side, side, cpu)
        for j in range(variant.depths[i]):
            block = f'layers.{i}.blocks.{j}.'
            found[block + 'attn.relative_position_index'] = index.flatten() if naming.index == 'flat' else index
            if variant.version == 2:
                found[block + 'attn.relative_coords_table'] = log_spaced_offsets(side, pretrained)[None]
            if masks and j % 2 and maps[i] > window[0]:  # blocks with shifted windows
                found[block + 'attn_mask'] = region_mask((maps[i],) * 2, side, (window[0] // 2,) * 2, cpu)
    return found


def _flat_position(value: Tensor) -> Tensor:
    return value if value.ndim == 3 else value.flatten(2).transpose(1, 2)


def square_position(value: Tensor) -> Tensor:
    """A position embedding as (1, C, H, W); (1, H * W, C) is assumed to be square.

    Raises:
        CheckpointError: H * W is not a square number.
    """
    if value.ndim == 4:
        return value
    side = math.isqrt(value.shape[1])
    if side**2 != value.shape[1]:
        raise CheckpointError(
            f'absolute_pos_embed has {value.shape[1]} positions, which is not a square number; load it into a model '
            'with its pretrain_img_size'
        )
    return value.transpose(1, 2).unflatten(2, (side, side))


def _to_their_layout(state: Mapping[str, Tensor], naming: Naming, variant: Variant) -> dict[str, Tensor]:
    """The inverse of :func:`_to_our_layout`."""
    split = any(ours == 'attn.q' for ours, _ in naming.inside)
    last = f'norm{len(variant.depths) - 1}'
    result: dict[str, Tensor] = {}
    for key, value in state.items():
        attn, _, kind = key.rpartition('.attn.')
        attn += '.attn.'
        if split and kind in ('qkv.weight', 'qkv.bias'):
            result |= {attn + kind.replace('qkv', p): v for p, v in zip('qkv', value.chunk(3), strict=True)}
        elif split and kind in ('q_bias', 'v_bias'):
            result[attn + kind.replace('_', '.')] = value
        elif naming.qkv_bias and kind == 'q_bias':
            result[attn + 'qkv.bias'] = torch.cat([value, torch.zeros_like(value), state[attn + 'v_bias']])
        elif naming.qkv_bias and kind == 'v_bias':
            pass
        elif naming.unfold and _is_merged(key, variant.version):
            result[key] = value.unflatten(-1, (2, 2, -1)).transpose(-1, -3).flatten(-3)
        elif key == 'absolute_pos_embed':
            result[key] = _flat_position(value) if naming.flat_position else square_position(value)
        elif naming.last_norm and key.startswith('norm.'):
            result[key.replace('norm.', f'{last}.')] = value
        else:
            result[key] = value
    return result
