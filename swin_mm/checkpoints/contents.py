"""What a checkpoint holds of a Swin Transformer: recognised, in our names and layout, and back in any naming.

H, W rows and columns of the map, C channels, w side of a window, N = w * w its tokens, h heads.
"""

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from swin_mm.checkpoints.namings import LEFTOVERS, NAMINGS, OUTPUT_NORMS, REBUILT, RELATIVES, TARGETS, Naming
from swin_mm.models.swin import ARCHS
from swin_mm.ops.windows import log_spaced_offsets, relative_index
from swin_mm.utils.errors import CheckpointError

WRAPPERS = ('state_dict', 'model', 'module', 'state_dict_ema', 'model_ema')


def unwrap(checkpoint: Any, prefix: str = '') -> dict[str, Any]:
    """The state dict inside a checkpoint: itself, or what stands under ``state_dict``, ``model`` and the like.

    Args:
        checkpoint: what a file holds; arrays become tensors.
        prefix: take only what stands under this, and take it off.

    Raises:
        CheckpointError: there is none.
    """
    state = checkpoint if isinstance(checkpoint, Mapping) else {}
    for _ in WRAPPERS:  # as often as wrappers may lie in each other
        state = next((state[w] for w in WRAPPERS if isinstance(state.get(w), Mapping)), state)
    state = {
        key: torch.from_numpy(value) if isinstance(value, np.ndarray) else value
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
        begin = ', '.join(sorted({key.partition('.')[0] for key in state}))
        raise CheckpointError(f'nothing in the file stands under {prefix!r}; its keys begin with {begin}')
    return found


@dataclass(frozen=True)
class Variant:
    """The sizes that a state dict in our names has.

    Args:
        version: 1 or 2.
        in_channels: of the image.
        patch: side of a patch.
        embed_dims: C of the first stage.
        depths: blocks per stage.
        num_heads: h per stage.
        windows: side of the window per stage; 0 where the state does not tell.
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
        """Read the sizes off a state dict in our names."""
        blocks = [m for m in (re.match(r'layers\.(\d+)\.blocks\.(\d+)\.', key) for key in state) if m]
        stages = range(max(int(m[1]) for m in blocks) + 1)
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
        depths = tuple(1 + max((int(m[2]) for m in blocks if int(m[1]) == i), default=-1) for i in stages)
        return cls(version, channels, patch, out, depths, tuple(heads), tuple(windows))

    def sizes(self, stages: int) -> tuple[Any, ...]:
        """What must agree between two models of as many stages."""
        return self.embed_dims, self.depths[:stages], self.num_heads[:stages]

    @property
    def arch(self) -> str | None:
        """The published size that this is, by its name in ARCHS."""
        sizes = {'embed_dims': self.embed_dims, 'depths': self.depths, 'num_heads': self.num_heads}
        return next((arch for arch, published in ARCHS.items() if published == sizes), None)

    def __str__(self) -> str:
        if self.arch:
            return f'Swin-{self.arch.upper()} V{self.version}'
        sizes = f'embed_dims={self.embed_dims}, depths={self.depths}, num_heads={self.num_heads}'
        return f'Swin V{self.version} with {sizes}'


@dataclass
class Contents:
    """A state dict of any known naming, taken apart.

    Args:
        naming: the key naming found.
        prefix: what stands before the backbone's keys.
        state: the backbone's parameters, and a classifier's last norm and head, in our names and layout.
        sources: our key -> the file's.
        rebuilt: the file's tensors that follow from the sizes, by our names.
        others: what the file holds beside the backbone, by its names.
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
        """Per stage the window and the one of pre-training that normalises V2's offsets; None where nothing tells."""
        found: list[tuple[int, int] | None] = []
        for i, window in enumerate(self.variant.windows):
            table = self.rebuilt.get(f'layers.{i}.blocks.0.attn.relative_coords_table')
            index = self.rebuilt.get(f'layers.{i}.blocks.0.attn.relative_position_index')
            if window:
                found.append((window, window))
            elif table is not None and not table.is_meta and table.max() > 0:
                # The outermost offset, w - 1 over that of pre-training, is log-spaced: undo that.
                w = table.shape[1] // 2 + 1
                ratio = (8 ** table.max().item() - 1) / 8
                found.append((w, round((w - 1) / ratio) + 1))
            elif index is not None:
                w = math.isqrt(math.isqrt(index.numel()))
                found.append((w, w))
            else:
                found.append(None)
        return found


def parse(state: Mapping[str, Any]) -> Contents:
    """Recognise the naming of a state dict and translate it.

    Raises:
        CheckpointError: it is of no Swin Transformer, or of several.
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
    if contents.state['patch_embed.proj.weight'].ndim == 5:
        raise CheckpointError('the checkpoint is of a Video Swin Transformer; this backbone takes images')
    _to_our_layout(contents)
    return contents


def _version(names: Iterable[str]) -> int:
    return 2 if any(re.search(r'\.att(n|ention)\.(\w+\.)?logit_scale\Z', name) for name in names) else 1


def _recognise(state: Mapping[str, Any]) -> tuple[Naming, str]:
    """The naming of a state dict and the prefix of the backbone's keys in it."""
    for pattern, what in RELATIVES:
        if any(re.search(pattern, key) for key in state):
            raise CheckpointError(f'the checkpoint is of {what}; this backbone does not implement it')
    found = [
        (key.removesuffix(naming.anchor), naming)
        for naming in NAMINGS
        for key, value in state.items()
        # 'ema_' is a prefix too
        if isinstance(value, Tensor) and re.search(rf'(\A|[._]){re.escape(naming.anchor)}\Z', key)
    ]
    found = [(prefix, naming) for prefix, naming in found if _is_named_so(state, naming, prefix)]
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


def _is_named_so(state: Mapping[str, Any], naming: Naming, prefix: str) -> bool:
    """Whether what stands around a patch embedding is of this naming."""
    root = naming.root(prefix)
    keys = [key.removeprefix(root) for key in state if key.startswith(root)]
    return (
        naming.version in (None, _version(keys))
        and any(re.search(naming.mark, key) for key in keys)
        and not any(re.search(naming.unlike, key) for key in keys)
    )


def _to_our_layout(contents: Contents) -> None:
    """Join q, k and v, put the channels of merging in the official order, and so on."""
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
            q, _, v = state[key].chunk(3)  # cosine attention has no use for the keys' part
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
    """Whether a parameter's last axis is the 4C channels of patch merging; V2 norms after the reduction."""
    return bool(re.search(r'\.downsample\.(reduction|norm)' if version == 1 else r'\.downsample\.reduction', key))


def convert(
    contents: Contents, target: str, windows: Sequence[int] | None = None
) -> tuple[dict[str, Any], dict[str, str]]:
    """Name and lay out a backbone as ``target`` does, exactly: values are moved, never computed.

    What follows from the sizes alone (position indices, coordinate tables) is added where the target's strict loading
    expects it.

    Args:
        contents: what :func:`parse` found.
        target: a name in TARGETS.
        windows: per stage, for V2 weights of a naming that does not tell.

    Returns:
        The checkpoint, and what of the file has no place in it: the file's key -> why.

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
        if re.fullmatch(naming.lacks, key):
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
        result |= contents.others
    else:
        dropped |= dict.fromkeys(contents.others, 'other part of the model')
    for key, value in result.items():
        if isinstance(value, Tensor):  # a part of a larger tensor would be saved with all of it
            result[key] = value.clone(memory_format=torch.contiguous_format)
    return {naming.under: result} if naming.under else result, dropped


def meaning(name: str, table: Sequence[tuple[str, str]]) -> str | None:
    """What a table of patterns says of a name."""
    return next((what for pattern, what in table if re.fullmatch(pattern, name)), None)


def _derived(naming: Naming, contents: Contents, windows: Sequence[int] | None) -> dict[str, Tensor]:
    """The buffers that the naming's library expects, by our names."""
    if not naming.index:
        return {}
    variant, found = contents.variant, {}
    for i, told in enumerate(contents.windows()):
        if not (told or windows):
            continue
        window, pretrained = ((w, w) for w in told or (windows[i], windows[i]))
        index = relative_index(window, window, torch.device('cpu'))
        for j in range(variant.depths[i]):
            attn = f'layers.{i}.blocks.{j}.attn.'
            found[attn + 'relative_position_index'] = index.flatten() if naming.index == 'flat' else index
            if variant.version == 2:
                found[attn + 'relative_coords_table'] = log_spaced_offsets(window, pretrained)[None]
    return found


def _flat_position(value: Tensor) -> Tensor:
    return value if value.ndim == 3 else value.flatten(2).transpose(1, 2)


def square_position(value: Tensor) -> Tensor:
    """A position embedding as (1, C, H, W); (1, H * W, C) is taken for a square.

    Raises:
        CheckpointError: it is of no square.
    """
    if value.ndim == 4:
        return value
    side = math.isqrt(value.shape[1])
    if side**2 != value.shape[1]:
        raise CheckpointError(
            f'absolute_pos_embed has {value.shape[1]} positions, which are no square; load it into a model with its '
            'pretrain_img_size'
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
