"""From a checkpoint of any known naming to the state of a given pyramid, with an account of what happened."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from swin_mm.checkpoints.files import CheckpointError
from swin_mm.checkpoints.namings import LEFTOVERS, NAMINGS, Naming
from swin_mm.swin import SwinPyramid


@dataclass
class Report:
    """What became of a checkpoint.

    Args:
        naming: the key naming found.
        prefix: what stood before the backbone's keys.
        fitting: our keys that the file gives.
        resized: our key -> how the file's value was changed to fit.
        dropped: the file's key -> why it is not needed.
        kept: our output norms that the file, a classifier's, does not have; they keep their start.
    """

    naming: str
    prefix: str
    fitting: list[str] = field(default_factory=list)
    resized: dict[str, str] = field(default_factory=dict)
    dropped: dict[str, str] = field(default_factory=dict)
    kept: list[str] = field(default_factory=list)

    def __str__(self) -> str:
        where = f' under {self.prefix!r}' if self.prefix else ''
        lines = [f'Swin weights: {self.naming} naming{where}, {len(self.fitting)} tensors fit']
        lines += [f'  resized {key}: {how}' for key, how in self.resized.items()]
        reasons = list(self.dropped.values())
        lines += [f'  not needed: {reasons.count(why)} x {why}' for why in dict.fromkeys(reasons)]
        if self.kept:
            lines.append(f'  not in the file: {", ".join(self.kept)} (a classifier has none); they start as new norms')
        return '\n'.join(lines)


def unwrap(checkpoint: Any) -> Mapping[str, Tensor]:
    """The state dict inside a checkpoint: itself or its ``state_dict`` or ``model``."""
    for wrapper in ('state_dict', 'model'):
        if isinstance(checkpoint, Mapping) and isinstance(checkpoint.get(wrapper), Mapping):
            checkpoint = checkpoint[wrapper]
    if not isinstance(checkpoint, Mapping) or not any(isinstance(v, Tensor) for v in checkpoint.values()):
        raise CheckpointError(
            'the file holds no state dict: expected tensors by name, bare or under state_dict or model'
        )
    return checkpoint


def adapt(state: Mapping[str, Tensor], model: SwinPyramid) -> tuple[dict[str, Tensor], Report]:
    """Turn a state dict of any known naming into one that ``model`` loads.

    Keys of other parts of a detector or segmentor, and what :data:`~swin_mm.checkpoints.namings.LEFTOVERS` lists, are
    dropped. Keys of the backbone that the model does not have stay, for strict loading to report.

    Args:
        state: tensors by name.
        model: the pyramid to load into; not changed.

    Returns:
        Our keys and values, and the account.

    Raises:
        CheckpointError: nothing fits, or a tensor has a shape that cannot be made to fit.
    """
    own = model.state_dict()
    naming, prefix = _recognise(state, own)
    report = Report(naming.name, prefix)
    ours: dict[str, Tensor] = {}
    misfits = []
    for key, value in state.items():
        if not key.startswith(prefix):
            report.dropped[key] = 'other part of the model'
            continue
        name = key.removeprefix(prefix)
        why = _leftover(name) or ('other part of the model' if not isinstance(value, Tensor) else None)
        if why is None:
            name, value = naming.to_ours(name, value)
            if name not in own:
                why = _unread(name, model)
        if why is not None:
            report.dropped[key] = why
            continue
        if name in own:
            resized = _fit(name, value, own[name], model)
            if resized.shape != own[name].shape:
                misfits.append(f'{key} is {tuple(value.shape)}, the model needs {tuple(own[name].shape)}')
                continue
            if resized.shape != value.shape:
                report.resized[name] = f'{tuple(value.shape)} -> {tuple(resized.shape)}'
            value = resized
            report.fitting.append(name)
        ours[name] = value
    if misfits:
        more = f' (and {len(misfits) - 3} more)' if len(misfits) > 3 else ''
        raise CheckpointError(
            f'the checkpoint is of another model: {"; ".join(misfits[:3])}{more}. '
            'Give the backbone the arch and window_size of the checkpoint, or choose the checkpoint that fits.'
        )
    norms = [name for name in own if re.match(r'norm\d', name)]
    if not any(re.match(r'norm\d', name) for name in ours):
        report.kept = norms
        ours.update({name: own[name] for name in norms})
    if not report.fitting:
        raise _nothing_fits(state)
    return ours, report


def _recognise(state: Mapping[str, Tensor], own: Mapping[str, Tensor]) -> tuple[Naming, str]:
    """The naming of a state dict and the prefix of the backbone's keys in it."""
    found = [
        (key.removesuffix(naming.anchor), naming)
        for key in state
        for naming in NAMINGS
        if key == naming.anchor or key.endswith('.' + naming.anchor)
    ]
    if not found:
        if own.keys() & state.keys():  # part of our own state
            return NAMINGS[0], ''
        raise _nothing_fits(state)
    shortest = min(len(prefix) for prefix, _ in found)
    found = [(prefix, naming) for prefix, naming in found if len(prefix) == shortest]
    if len(found) > 1:
        names = ' and '.join(prefix for prefix, _ in found)
        raise CheckpointError(f'the checkpoint holds several backbones, {names}: say which with init_cfg prefix=...')
    return found[0][1], found[0][0]


def _nothing_fits(state: Mapping[str, Tensor]) -> CheckpointError:
    some = ', '.join(list(state)[:3]) or 'none'
    anchors = ' or '.join(naming.anchor for naming in NAMINGS)
    return CheckpointError(
        f'nothing in the checkpoint fits a Swin Transformer backbone: expected keys such as {anchors}, found {some}'
    )


def _leftover(name: str) -> str | None:
    """Why a backbone has no use for this key, or None."""
    return next((why for pattern, why in LEFTOVERS if re.fullmatch(pattern, name)), None)


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
    if name == 'absolute_pos_embed' and value.ndim == 3 and value.numel() == target.numel():
        return value.transpose(1, 2).reshape(target.shape)  # (1, H * W, C) -> (1, C, H, W)
    if name.endswith('.relative_position_bias_table') and value.shape[1:] == target.shape[1:]:
        side = int(value.shape[0] ** 0.5)
        if side * side == value.shape[0]:
            window = model.get_submodule(name.rpartition('.')[0]).window
            table = value.T.reshape(1, -1, side, side)
            size = (2 * window[0] - 1, 2 * window[1] - 1)
            return F.interpolate(table, size=size, mode='bicubic')[0].flatten(1).T.contiguous()
    return value
