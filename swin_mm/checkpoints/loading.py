"""From a checkpoint of any known naming to the state of a given pyramid, with an account of what happened."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from swin_mm.checkpoints.contents import Contents, Variant, meaning, parse, square_position
from swin_mm.checkpoints.namings import CLASSIFIER, LEFTOVERS, OFFICIAL, OUTPUT_NORMS
from swin_mm.models.swin import SwinPyramid
from swin_mm.models.window_attention import WindowAttentionV2
from swin_mm.ops.windows import Size
from swin_mm.utils.errors import CheckpointError


@dataclass
class Report:
    """What became of a checkpoint. Keys are ours where not said otherwise.

    Args:
        naming: the key naming found.
        prefix: what stood before the backbone's keys.
        loaded: parameters that the file gives.
        converted: those of them with another name or layout in the file -> the name there.
        resized: those of them whose shape had to change -> from what to what.
        rebuilt: what the file stores and the model derives from its sizes.
        dropped: the file's key -> why it is not needed.
        new: output norms, which classifiers lack; they start as new norms.
        missing: other parameters that the file lacks.
        unexpected: what the file's backbone has and the model does not; the file's keys.
        wrong_shape: the file's key -> both shapes.
        notes: what to mind.
    """

    naming: str
    prefix: str = ''
    loaded: list[str] = field(default_factory=list)
    converted: dict[str, str] = field(default_factory=dict)
    resized: dict[str, str] = field(default_factory=dict)
    rebuilt: list[str] = field(default_factory=list)
    dropped: dict[str, str] = field(default_factory=dict)
    new: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)
    unexpected: list[str] = field(default_factory=list)
    wrong_shape: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)

    @property
    def complete(self) -> bool:
        """Every parameter of the model has its value from the file, new output norms excepted, and nothing is left."""
        return not (self.missing or self.unexpected or self.wrong_shape)

    def __str__(self) -> str:
        rows = [
            ('loaded', self.loaded, ''),
            ('of them converted', self.converted, _example(self.converted)),
            ('of them resized', self.resized, _example(self.resized)),
            ('rebuilt', self.rebuilt, 'indices, tables and masks follow from the sizes'),
            *((f'not needed: {why}', [w for w in self.dropped.values() if w == why], '') for why in self._reasons()),
            ('new', self.new, 'output norms, which classifiers lack; they start as new norms'),
            ('MISSING', self.missing, _some(self.missing)),
            ('UNEXPECTED', self.unexpected, _some(self.unexpected)),
            ('WRONG SHAPE', self.wrong_shape, _example(self.wrong_shape)),
        ]
        where = f' under {self.prefix!r}' if self.prefix else ''
        rows = [(name, len(items), detail) for name, items, detail in rows if items]
        width = max((len(name) for name, _, _ in rows), default=0)
        lines = [f'  {name:{width}} {count:4}  {detail}'.rstrip() for name, count, detail in rows]
        return '\n'.join([f'Swin weights, {self.naming} naming{where}:', *lines, *(f'  {note}' for note in self.notes)])

    def _reasons(self) -> list[str]:
        return list(dict.fromkeys(self.dropped.values()))


def _some(items: Mapping[str, Any] | list[str]) -> str:
    shown = ', '.join(list(items)[:3])
    return f'{shown}, ...' if len(items) > 3 else shown


def _example(items: Mapping[str, str]) -> str:
    return ''.join(f'{key}: {value}' for key, value in list(items.items())[:1]) + (', ...' if len(items) > 1 else '')


def adapt(state: Mapping[str, Any], model: SwinPyramid, strict: bool = True) -> tuple[dict[str, Tensor], Report]:
    """Turn a state dict of any known naming into one that ``model`` loads.

    Args:
        state: tensors by name.
        model: the pyramid to load into; not changed.
        strict: raise where the file does not give the whole backbone.

    Returns:
        Our keys and values, and the account.

    Raises:
        CheckpointError: nothing fits; or, with ``strict``, parameters are missing, unknown to the model, or of a shape
            that cannot be made to fit.
    """
    own = model.state_dict()
    contents = _parse(state, own)
    report = Report(contents.naming.name, contents.prefix, rebuilt=list(contents.rebuilt))
    report.dropped = dict.fromkeys(contents.others, 'other part of the model')
    ours: dict[str, Tensor] = {}
    misfits = set()
    for key, value in contents.state.items():
        source, name = contents.sources[key], _placed(key, contents, model)
        if name not in own:
            why = meaning(name, LEFTOVERS + CLASSIFIER) or _unread(name, model)
            if why is None:
                report.unexpected.append(source)
                ours[name] = value  # for torch, which knows what the caller thinks of that
            else:
                report.dropped[source] = why
            continue
        fitted = _fit(name, value, own[name], model)
        old, new = tuple(value.shape), tuple(own[name].shape)
        if fitted.shape != new:
            misfits.add(name)
            report.wrong_shape[source] = f'is {old}, the model has {new}'
            continue
        if new != old and value.numel() != fitted.numel():
            report.resized[name] = f'{old} -> {new}'
        if source != contents.prefix + name or value is not state[source] or value.ndim != fitted.ndim:
            report.converted[name] = f'from {source}'
        report.loaded.append(name)
        ours[name] = fitted
    last = f'norm{len(model.layers) - 1}.'  # a file with this norm alone ends like a classifier, too
    has_norms = any(re.fullmatch(OUTPUT_NORMS, name) and not name.startswith(last) for name in report.loaded)
    for name in [name for name in own if name not in ours and name not in misfits]:
        (report.new if re.fullmatch(OUTPUT_NORMS, name) and not has_norms else report.missing).append(name)
    report.notes = _notes(contents, model)
    if (strict and not report.complete) or not report.loaded:
        raise CheckpointError(_reason_against(report, contents, model))
    if strict:  # else whoever asked is told of them
        ours |= {name: own[name] for name in report.new}
    return ours, report


def _parse(state: Mapping[str, Any], own: Mapping[str, Tensor]) -> Contents:
    """Any naming, or a part of our own state."""
    try:
        return parse(state)
    except CheckpointError:
        if state and state.keys() <= own.keys() and all(isinstance(value, Tensor) for value in state.values()):
            return Contents(OFFICIAL, '', dict(state), {key: key for key in state})
        raise


def _placed(key: str, contents: Contents, model: SwinPyramid) -> str:
    """Where a model wants a parameter: it names a classifier's last norm if it ends like a classifier."""
    last = len(model.layers) - 1
    ends_alike = model.out_indices == (last,) and f'layers.{last + 1}.blocks.0.norm1.weight' not in contents.state
    return key.replace('norm.', f'norm{last}.') if key.startswith('norm.') and ends_alike else key


def _reason_against(report: Report, contents: Contents, model: SwinPyramid) -> str:
    """What is wrong with a checkpoint, and what to do."""
    reasons = [f'{key} {shapes}' for key, shapes in report.wrong_shape.items()]
    reasons += [f'{key} is missing' for key in report.missing]
    reasons += [f'{key} is not in the model' for key in report.unexpected]
    listed = '; '.join(reasons[:3]) + (f' (and {len(reasons) - 3} more)' if len(reasons) > 3 else '')
    try:
        theirs, mine = contents.variant, Variant.of(model.state_dict())
    except (KeyError, ValueError):  # too little of a model to tell
        theirs = mine = None
    stages = len(model.layers)
    if theirs is not None and (theirs.version != mine.version or theirs.sizes(stages) != mine.sizes(stages)):
        kind = f"type='swin_mm.SwinTransformer{'V2' if theirs.version == 2 else ''}'"
        size = f"arch='{theirs.arch}'" if theirs.arch else 'its embed_dims, depths and num_heads'
        remedy = f'give the backbone {kind} and {size}, or choose the checkpoint of another model'
        return f'the checkpoint is of a {theirs}, the model is a {mine}: {listed}; {remedy}'
    return (
        f'the checkpoint does not give the whole backbone: {listed}; choose the checkpoint of this model, or load what '
        'fits with strict=False'
    )


def _notes(contents: Contents, model: SwinPyramid) -> list[str]:
    """What a V2 file says of its windows, where the model would read its position bias otherwise."""
    if not all(len(stage.blocks) for stage in model.layers):
        return []
    attentions = [stage.blocks[0].attn for stage in model.layers]
    if not isinstance(attentions[0], WindowAttentionV2) or 'patch_embed.proj.weight' not in contents.state:
        return []
    told = contents.windows()[: len(attentions)]
    if None in told:
        return []
    found = [(whole, whole) for _, whole in told]
    used = [tuple(p or w for p, w in zip(a.pretrained_window, a.window, strict=True)) for a in attentions]
    if found == used:
        return []
    return [
        f'NOTE: the position bias was trained with windows {found}, this model reads it as of windows {used}: '
        f'set pretrained_window_sizes={tuple(whole for _, whole in told)}'
    ]


def _unread(name: str, model: SwinPyramid) -> str | None:
    """Why this model has not built that part of a Swin, or None if the part is unknown."""
    last = len(model.layers) - 1
    part = re.match(r'(?:layers\.(\d+)\.(blocks|downsample)|norm(\d))\.', name)
    if part is None:
        return None
    stage, kind, norm = part.groups()
    beyond = norm is not None or int(stage) > last or (int(stage) == last and kind == 'downsample')
    return 'no output of this model reads it' if beyond else None


def _fit(name: str, value: Tensor, target: Tensor, model: SwinPyramid) -> Tensor:
    """The value in the target's shape, where there is a faithful way."""
    if value.shape == target.shape:
        return value
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    if name == 'absolute_pos_embed':
        if value.ndim == 3 and value.numel() == target.numel():
            return value.transpose(1, 2).reshape(target.shape)  # (1, H * W, C) -> (1, C, H, W)
        value = square_position(value)
        same = value.shape[1] == target.shape[1]
        return F.interpolate(value, size=target.shape[2:], mode='bicubic') if same else value
    if name.endswith('.relative_position_bias_table') and value.shape[1:] == target.shape[1:]:
        return _resized_table(value, model.get_submodule(name.rpartition('.')[0]).window)
    if name == 'patch_embed.proj.weight' and value.ndim == 4 and len(value) == len(target):
        return _resized_patches(_recoloured(value, target.shape[1]), target.shape[2:])
    return value


def _resized_table(table: Tensor, window: Size) -> Tensor:
    """A position bias for another window, by bicubic interpolation as in the official code.

    Args:
        table: ((2 * w - 1) ** 2, h) of a square window.
        window: (Hw, Ww).

    Returns:
        ((2 * Hw - 1) * (2 * Ww - 1), h), or the table itself where it is of no square window.
    """
    side = math.isqrt(len(table))
    if side**2 != len(table):
        return table
    size = (2 * window[0] - 1, 2 * window[1] - 1)
    return F.interpolate(table.T.reshape(1, -1, side, side), size=size, mode='bicubic')[0].flatten(1).T.contiguous()


def _recoloured(weight: Tensor, channels: int) -> Tensor:
    """A patch projection for images of other channels: RGB repeated in turn, scaled to the same overall strength.

    One channel thus gets the sum over RGB, and sees in a grey image what RGB sees in its three equal channels.

    Args:
        weight: (C, in_channels, patch, patch).
        channels: of the new images.

    Returns:
        (C, channels, patch, patch).
    """
    old = weight.shape[1]
    if channels == old:
        return weight
    if channels == 1:
        return weight.sum(1, keepdim=True)
    return weight[:, torch.arange(channels) % old] * (old / channels)


def _resized_patches(weight: Tensor, size: Size) -> Tensor:
    """A patch projection for patches of another size that gives resized patches their old embedding.

    Larger patches: exactly; smaller ones: as well as least squares can (FlexiViT, arXiv 2212.08013, section 3.4).

    Args:
        weight: (C, in_channels, height, width).
        size: (height, width) of the new patches.

    Returns:
        (C, in_channels, *size).
    """
    old = tuple(weight.shape[2:])
    if old == tuple(size):
        return weight
    pixels = torch.eye(old[0] * old[1], dtype=torch.float64).unflatten(1, (1, *old))
    resize = F.interpolate(pixels, size=tuple(size), mode='bicubic').flatten(1)  # row i: pixel i, resized
    resized = weight.flatten(2).double() @ torch.linalg.pinv(resize).T
    return resized.unflatten(2, tuple(size)).to(weight.dtype)
