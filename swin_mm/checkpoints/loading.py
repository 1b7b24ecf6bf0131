"""Fitting a checkpoint of any known naming to a model, with a report of what was loaded, resized and left out."""

import math
import re
from collections.abc import Collection, Mapping
from contextlib import suppress
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

MAX_PATCH = 64  # pixels; resizing patches of n x n pixels takes a matrix of n^2 x n^2 per side


@dataclass
class Report:
    """The result of loading a checkpoint into a model. Keys are the model's unless noted.

    Args:
        naming: the key naming of the file.
        prefix: what precedes the backbone's keys in the file.
        loaded: parameters whose value comes from the file.
        converted: loaded parameters with another name or layout in the file -> where they come from.
        resized: loaded parameters that were resized -> the old and the new shape.
        rebuilt: index tables and masks in the file, which the model computes from its sizes.
        dropped: the file's key -> why it is not needed.
        new: output norms, which classifiers lack; they stay as initialised.
        missing: other parameters that the file lacks.
        unexpected: the file's keys of the backbone that the model does not have.
        wrong_shape: the file's key -> both shapes.
        unusable: the file's key -> why its values cannot be weights.
        notes: warnings.
        problem: why the checkpoint does not give the whole backbone, and what to do; empty if it does.
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
    unusable: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    problem: str = ''

    @property
    def complete(self) -> bool:
        """Whether every parameter but new output norms comes from the file, and the file has no others."""
        return not (self.missing or self.unexpected or self.wrong_shape or self.unusable)

    def __str__(self) -> str:
        entries: list[tuple[str, Collection[str], str]] = [
            ('loaded', self.loaded, ''),
            ('of them converted', self.converted, _example(self.converted)),
            ('of them resized', self.resized, _example(self.resized)),
            ('rebuilt', self.rebuilt, 'index tables and masks, computed from the sizes'),
            *((f'not needed: {why}', [w for w in self.dropped.values() if w == why], '') for why in self._reasons()),
            ('new', self.new, 'output norms, which classifiers lack; they stay as initialised'),
            ('MISSING', self.missing, _some(self.missing)),
            ('UNEXPECTED', self.unexpected, _some(self.unexpected)),
            ('WRONG SHAPE', self.wrong_shape, _example(self.wrong_shape)),
            ('UNUSABLE', self.unusable, _example(self.unusable)),
        ]
        where = f' under {self.prefix!r}' if self.prefix else ''
        rows = [(name, len(items), detail) for name, items, detail in entries if items]
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
    """Convert a state dict of any known naming to one that ``model`` loads.

    Args:
        state: tensors by name.
        model: the pyramid to load into; it is not changed.
        strict: raise unless the file gives the whole backbone.

    Returns:
        Our keys and values, and the report. Output norms that a classifier lacks are given the model's own values.

    Raises:
        CheckpointError: nothing fits; or, with ``strict``, parameters are missing, unknown to the model, not floating
            point, or of a shape that cannot be made to fit.
    """
    own = model.state_dict()
    contents = _parse(state, own)
    report = Report(contents.naming.name, contents.prefix, rebuilt=list(contents.rebuilt))
    report.dropped = dict.fromkeys(contents.others, 'other part of the model')
    ours: dict[str, Tensor] = {}
    rejected = set()
    for key, value in contents.state.items():
        source, name = contents.sources[key], _model_key(key, contents, model)
        if name not in own:
            why = meaning(name, LEFTOVERS + CLASSIFIER) or _reason_unused(name, model)
            if why is None:
                report.unexpected.append(source)
                ours[name] = value  # so that torch counts it as unexpected
            else:
                report.dropped[source] = why
            continue
        if not value.is_floating_point():
            rejected.add(name)
            report.unusable[source] = f'is {_dtype(value)}, expected floating point'
            continue
        fitted = _fit(name, value, own[name], model)
        old, new = tuple(value.shape), tuple(own[name].shape)
        if fitted.shape != new:
            rejected.add(name)
            report.wrong_shape[source] = f'is {old}, the model has {new}'
            continue
        if new != old and value.numel() != fitted.numel():
            report.resized[name] = f'{old} -> {new}'
        if source != contents.prefix + name or value is not state[source] or value.ndim != fitted.ndim:
            report.converted[name] = f'from {source}'
        report.loaded.append(name)
        ours[name] = fitted
    absent = [name for name in own if name not in ours and name not in rejected]
    if _is_classifier(report, absent, model):
        report.new = absent
        ours |= {name: own[name] for name in absent}
    else:
        report.missing = absent
    report.notes = [*_window_notes(contents, model), *_value_notes(ours)]
    if not report.complete:
        report.problem = _reason_against(report, contents, model)
    if not report.loaded or (strict and not report.complete):
        raise CheckpointError(report.problem or 'the checkpoint gives nothing of this backbone')
    return ours, report


def _is_classifier(report: Report, absent: list[str], model: SwinPyramid) -> bool:
    """Whether a file lacks all output norms and nothing else, as classifiers do."""
    last = f'norm{len(model.layers) - 1}.'  # a file with only this norm ends like a classifier, too
    has_norms = any(re.fullmatch(OUTPUT_NORMS, name) and not name.startswith(last) for name in report.loaded)
    return not has_norms and all(re.fullmatch(OUTPUT_NORMS, name) for name in absent)


def _dtype(value: Tensor) -> str:
    return str(value.dtype).removeprefix('torch.')


def _value_notes(ours: Mapping[str, Tensor]) -> list[str]:
    """A warning about NaN and infinite weights, which a diverged run leaves."""
    bad = [key for key, value in ours.items() if not value.is_meta and not value.isfinite().all()]
    return [f'WARNING: {len(bad)} of the parameters have NaN or infinite values: {_some(bad)}'] if bad else []


def nothing_loaded(model: SwinPyramid, prefix: str = '') -> Report:
    """The report of a checkpoint that has no keys for a model.

    Args:
        model: the pyramid, all of whose parameters are missing.
        prefix: the prefix that was expected.
    """
    report = Report('unknown', prefix, missing=list(model.state_dict()))
    report.problem = (
        f'no key of the checkpoint begins with {prefix!r}; if it holds a backbone alone, name it in the init_cfg of '
        'the backbone instead of loading it into the whole model; if its keys begin otherwise, rename them'
        if prefix
        else 'the checkpoint is empty'
    )
    return report


def _parse(state: Mapping[str, Any], own: Mapping[str, Tensor]) -> Contents:
    """Parse any naming, or part of the model's own state dict."""
    try:
        return parse(state)
    except CheckpointError:
        if state and state.keys() <= own.keys() and all(isinstance(value, Tensor) for value in state.values()):
            return Contents(OFFICIAL, '', dict(state), {key: key for key in state})
        raise


def _model_key(key: str, contents: Contents, model: SwinPyramid) -> str:
    """The model's key for a parameter. If only the last stage is an output, a classifier's norm is its output norm."""
    last = len(model.layers) - 1
    ends_alike = model.out_indices == (last,) and f'layers.{last + 1}.blocks.0.norm1.weight' not in contents.state
    return key.replace('norm.', f'norm{last}.') if key.startswith('norm.') and ends_alike else key


def _reason_against(report: Report, contents: Contents, model: SwinPyramid) -> str:
    """What is wrong with a checkpoint, and what to do."""
    reasons = [f'{key} {why}' for key, why in report.unusable.items()]
    reasons += [f'{key} {shapes}' for key, shapes in report.wrong_shape.items()]
    reasons += [f'{key} is missing' for key in report.missing]
    reasons += [f'{key} is not in the model' for key in report.unexpected]
    listed = '; '.join(reasons[:3]) + (f' (and {len(reasons) - 3} more)' if len(reasons) > 3 else '')
    theirs: Variant | None = None
    mine: Variant | None = None
    with suppress(KeyError, ValueError, CheckpointError):  # too few keys to tell
        theirs, mine = contents.variant, Variant.of(model.state_dict())
    stages = len(model.layers)
    if theirs and mine and (theirs.version != mine.version or theirs.sizes(stages) != mine.sizes(stages)):
        kind = f"type='swin_mm.SwinTransformer{'V2' if theirs.version == 2 else ''}'"
        size = f"arch='{theirs.arch}'" if theirs.arch else 'its embed_dims, depths and num_heads'
        remedy = f'give the backbone {kind} and {size}, or choose the checkpoint of another model'
        return f'the checkpoint is of a {theirs}, the model is a {mine}: {listed}; {remedy}'
    return (
        f'the checkpoint does not give the whole backbone: {listed}; choose the checkpoint of this model, or load what '
        'fits with strict=False'
    )


def _window_notes(contents: Contents, model: SwinPyramid) -> list[str]:
    """A note if a V2 file was trained with other windows for its position bias than the model uses."""
    stages: Any = model.layers  # nn.ModuleList does not know the type of its items
    if not all(len(stage.blocks) for stage in stages):
        return []
    attentions = [stage.blocks[0].attn for stage in stages]
    if not isinstance(attentions[0], WindowAttentionV2) or 'patch_embed.proj.weight' not in contents.state:
        return []
    windows = contents.windows()[: len(attentions)]
    told = [pair for pair in windows if pair is not None]
    if len(told) < len(windows):
        return []
    found = [(whole, whole) for _, whole in told]
    used = [tuple(p or w for p, w in zip(a.pretrained_window, a.window, strict=True)) for a in attentions]
    if found == used:
        return []
    return [
        f'NOTE: the position bias was trained with windows {found}, this model uses it as of windows {used}: '
        f'set pretrained_window_sizes={tuple(whole for _, whole in told)}'
    ]


def _reason_unused(name: str, model: SwinPyramid) -> str | None:
    """Why this model lacks a part that larger Swins have, or None if no Swin has such a part."""
    last = len(model.layers) - 1
    part = re.match(r'(?:layers\.(\d{1,15})\.(blocks|downsample)|norm(\d))\.', name)
    if part is None:
        return None
    stage, kind, norm = part.groups()
    beyond = norm is not None or int(stage) > last or (int(stage) == last and kind == 'downsample')
    return 'no output of this model reads it' if beyond else None


def _fit(name: str, value: Tensor, target: Tensor, model: SwinPyramid) -> Tensor:
    """Resize a value to the target's shape. If that is not possible, the result has another shape."""
    if value.shape == target.shape or not value.numel():
        return value
    value = value.to(torch.promote_types(value.dtype, torch.float32))
    if name == 'absolute_pos_embed':
        if value.ndim == 3 and value.numel() == target.numel():
            return value.transpose(1, 2).reshape(target.shape)  # (1, H * W, C) -> (1, C, H, W)
        value = square_position(value)
        same = value.shape[1] == target.shape[1]
        return F.interpolate(value, size=target.shape[2:], mode='bicubic') if same else value
    if name.endswith('.relative_position_bias_table') and value.shape[1:] == target.shape[1:]:
        attention: Any = model.get_submodule(name.rpartition('.')[0])
        return _resized_table(value, attention.window)
    resizable = value.ndim == 4 and len(value) == len(target) and max(value.shape[2:]) <= MAX_PATCH
    if name == 'patch_embed.proj.weight' and resizable:
        return _resized_patches(_change_channels(value, target.shape[1]), (target.shape[2], target.shape[3]))
    return value


def _resized_table(table: Tensor, window: Size) -> Tensor:
    """Resize a position bias to another window by bicubic interpolation, as in the official code.

    Args:
        table: ((2 * w - 1) ** 2, h) of a square window.
        window: (Hw, Ww).

    Returns:
        ((2 * Hw - 1) * (2 * Ww - 1), h), or the table itself if its window is not square.
    """
    side = math.isqrt(len(table))
    if side**2 != len(table):
        return table
    size = (2 * window[0] - 1, 2 * window[1] - 1)
    return F.interpolate(table.T.reshape(1, -1, side, side), size=size, mode='bicubic')[0].flatten(1).T.contiguous()


def _change_channels(weight: Tensor, channels: int) -> Tensor:
    """Change the input channels of a patch projection: repeat RGB in turn and scale by 3 / channels.

    Thus an image with equal channels keeps its embedding. A single channel gets the sum over RGB.

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
    """Resize a patch projection so that resized patches keep their embedding (FlexiViT, arXiv 2212.08013, section 3.4).

    This is exact for larger patches and a least-squares fit for smaller ones.

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
