"""Reading mmengine's checkpoints, and checking that one covers a whole model or a whole training run.

mmengine's loader prints missing and unexpected keys and goes on, so that a test would report the metrics of a random
head. The checks here raise instead.
"""

import contextlib
import copy
import os
import re
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, cast

import numpy as np
from mmengine.fileio import get_local_path
from mmengine.hooks import Hook
from mmengine.logging import HistoryBuffer
from mmengine.model import BaseTTAModel, is_model_wrapper
from torch import Tensor, nn

from swin_mm.checkpoints import files, unwrap
from swin_mm.checkpoints.pickles import Callee, Unfinished, UnknownName
from swin_mm.models.swin import SwinPyramid
from swin_mm.openmmlab.registry import HOOKS
from swin_mm.utils.errors import CheckpointError


def read_checkpoint(source: str | os.PathLike[str], map_location: Any = 'cpu') -> Any:
    """Read a checkpoint as :func:`swin_mm.checkpoints.read_checkpoint` does, with two additions for mmengine.

    Log histories in training checkpoints are read, and ``source`` may be an address of any mmengine file backend.

    Args:
        source: a path, or an address of http(s), ``hf://`` or any file backend of mmengine.
        map_location: where tensors go, as for ``torch.load``.

    Raises:
        CheckpointError: no such file, not a checkpoint, damaged, or it would run code.
    """
    return files.read_checkpoint(source, map_location, names=NAMES, fetch=fetch)


def read_for_mmengine(filename: str, map_location: Any = None) -> dict[str, Any]:
    """Read a checkpoint in the form that mmengine's ``CheckpointLoader`` returns, without any code in it.

    The state dict is under ``state_dict``. The config text ``meta.config`` is left out, because ``Runner.resume`` would
    execute it to look for ``gpu_ids``.

    Raises:
        CheckpointError: see :func:`read_checkpoint`.
    """
    content = read_checkpoint(filename, map_location or 'cpu')
    if not (isinstance(content, dict) and isinstance(content.get('state_dict'), dict)):
        return {'state_dict': unwrap(content)}
    meta = content.get('meta')
    if isinstance(meta, dict):
        content = content | {'meta': {key: value for key, value in meta.items() if key != 'config'}}
    return content


def fetch(source: str) -> AbstractContextManager[Path]:
    """The local path of a checkpoint, valid inside the context; other schemes go to mmengine's file backends.

    Raises:
        CheckpointError: there is no such file.
    """
    scheme, colon, _ = source.partition('://')
    return files.fetch(source) if not colon or scheme in ('http', 'https', 'hf') else _from_backend(source)


@contextlib.contextmanager
def _from_backend(address: str) -> Iterator[Path]:
    with get_local_path(address) as path:
        yield Path(path)


class _History(Unfinished):
    """Stands in for an empty ``HistoryBuffer``."""

    def build(self, state: Any) -> HistoryBuffer:
        """The log history of a pickled state."""
        values, counts, length = (state.get(key) for key in ('_log_history', '_count_history', 'max_length'))
        arrays = isinstance(values, np.ndarray) and isinstance(counts, np.ndarray) and values.shape == counts.shape
        if not (arrays and values.ndim == 1 and isinstance(length, int)):
            raise ValueError('a malformed log history')
        history = HistoryBuffer()
        history.__setstate__({'_log_history': values, '_count_history': counts, 'max_length': length})
        return history


def _history_method(owner: Any, name: Any) -> None:
    """Stand-in for ``getattr`` in pickled log histories; mmengine sets these methods by itself."""
    if not (isinstance(owner, Callee) and owner.function is _History and str(name).isidentifier()) or name[0] == '_':
        raise UnknownName(f'getattr of {name}')


# Names in the pickles of mmengine's training checkpoints, besides plain data.
NAMES = {
    f'{HistoryBuffer.__module__}.HistoryBuffer': _History,
    'builtins.getattr': _history_method,
    '__builtin__.getattr': _history_method,
}


def unwrap_model(model: nn.Module) -> nn.Module:
    """The model inside wrappers for several processes and for test-time augmentation."""
    while is_model_wrapper(model) or isinstance(model, BaseTTAModel):
        model = cast(nn.Module, model.module)
    return model


def require_complete(model: nn.Module, state_dict: Mapping[str, Any], source: str) -> None:
    """Raise unless a checkpoint gives every parameter and persistent buffer of a model its value.

    Loads shapes, not values, into a copy of the model on the meta device: each module converts its keys as in a real
    load (Swin backbones from any known naming), and neither the model nor its ``load_report`` changes.

    Call it before a test and before a run is resumed. It is too strict for fine-tuning, where a head with another
    number of classes starts from random weights; there :class:`CompleteBackboneHook` checks the backbone alone.

    Args:
        model: the whole model, before FSDP shards it; DDP and test-time augmentation wrappers are unwrapped.
        state_dict: the checkpoint's tensors by name, as :func:`swin_mm.checkpoints.unwrap` returns them. A leading
            ``module.`` is ignored, as in mmengine.
        source: the file or address, for the message.

    Raises:
        CheckpointError: keys are missing, have the wrong shape, or a Swin backbone cannot use its keys; the message
            names the first of each kind. Keys outside of backbones that the model does not have are no error by
            themselves; they are listed when something else is wrong.
    """
    skeleton = _on_meta(unwrap_model(model))
    # mmengine does not count BatchNorm's counters as missing.
    state = {key: value for key, value in skeleton.state_dict().items() if key.endswith('num_batches_tracked')}
    state |= {re.sub(r'^module\.', '', key): _meta(value) for key, value in state_dict.items()}
    try:
        missing, unexpected, wrong_shape = _load_shapes(skeleton, state)
    except CheckpointError as error:  # from a backbone of ours, which names what is wrong
        raise CheckpointError(f'checkpoint {source} does not fit the model: {error}') from error
    for name, module in skeleton.named_modules():
        if isinstance(module, SwinPyramid) and (problem := _problem(module)):
            raise CheckpointError(f'checkpoint {source} does not fit {name or "the model"}: {problem}')
    problems = [f'{_some(missing)} missing'] if missing else []
    problems += [_some(f'{key} {shapes}' for key, shapes in wrong_shape.items())] if wrong_shape else []
    if not problems:
        return
    problems += [f'{_some(unexpected)} not in the model'] if unexpected else []
    raise CheckpointError(
        f'checkpoint {source} does not cover the whole model: {"; ".join(problems)}; use the config that the '
        'checkpoint was trained with, or the checkpoint of this config'
    )


def _problem(backbone: SwinPyramid) -> str:
    """What is missing after the last load into a backbone, and the remedy; empty if nothing is."""
    report = getattr(backbone, 'load_report', None)
    return '' if report is None else report.problem


def _meta(value: Any) -> Any:
    return value.to('meta') if isinstance(value, Tensor) else value


def _on_meta(model: nn.Module) -> nn.Module:
    """A copy of a model without values: parameters and buffers on the meta device."""
    memo: dict[int, Any] = {}
    for parameter in model.parameters():
        memo[id(parameter)] = nn.Parameter(parameter.detach().to('meta'), requires_grad=parameter.requires_grad)
    for buffer in model.buffers():
        memo[id(buffer)] = buffer.detach().to('meta')
    return copy.deepcopy(model, memo)


def _load_shapes(skeleton: nn.Module, state: Mapping[str, Any]) -> tuple[list[str], list[str], dict[str, str]]:
    """Load into a model on the meta device: missing keys, unexpected keys, and key -> its two shapes."""
    wrong_shape: dict[str, str] = {}
    try:
        result = skeleton.load_state_dict(state, strict=False)
    except CheckpointError:
        raise
    except RuntimeError as error:  # torch raises for shapes even when it is not strict
        found = re.findall(r'size mismatch for (\S+): .*?\[(.*?)\]\).*?\[(.*?)\]\)', str(error))
        wrong_shape = {key: f'is ({theirs}), the model has ({ours})' for key, theirs, ours in found}
        if not wrong_shape:
            raise CheckpointError(' '.join(str(error).split())) from error
        result = skeleton.load_state_dict({k: v for k, v in state.items() if k not in wrong_shape}, strict=False)
    missing = [key for key in result.missing_keys if key not in wrong_shape]
    return missing, list(result.unexpected_keys), wrong_shape


def _some(items: Any, most: int = 3) -> str:
    items = list(items)
    return ', '.join(items[:most]) + (f' (and {len(items) - most} more)' if len(items) > most else '')


def require_training_checkpoint(content: Any, source: str) -> None:
    """Raise unless a checkpoint holds what mmengine needs to resume training.

    Checks types and structure, not that the numbers fit a model: see :func:`require_complete`.

    Args:
        content: what :func:`swin_mm.checkpoints.read_checkpoint` returns.
        source: the file or address, for the message.

    Raises:
        CheckpointError: a part is missing or malformed; the message names it and what was expected.
    """

    def require(condition: bool, problem: str) -> None:
        if not condition:
            raise CheckpointError(
                f'checkpoint {source} cannot be resumed: {problem}; resume from a checkpoint that training saved, or '
                'start from its weights alone with --cfg-options load_from=CHECKPOINT instead of --resume'
            )

    require(isinstance(content, dict), f'expected a dictionary, found {type(content).__name__}')
    parts = ('meta', 'message_hub', 'state_dict', 'optimizer')
    lacking = [part for part in parts if part not in content]
    require(not lacking, f'it has no {", ".join(lacking)}')
    for part in parts:
        require(isinstance(content[part], dict), f'{part} is {_kind(content[part])}, expected a dictionary')

    meta = content['meta']
    for key in ('epoch', 'iter'):
        require(key in meta, f'meta has no {key}')
        require(_is_count(meta[key]), f'meta.{key} is {_shown(meta[key])}, expected a whole number from 0 up')
    seed = meta.get('seed')
    require(seed is None or _is_count(seed), f'meta.seed is {_shown(seed)}, expected a whole number from 0 up')

    for key in ('log_scalars', 'runtime_info', 'resumed_keys'):
        value = content['message_hub'].get(key)
        require(isinstance(value, dict), f'message_hub.{key} is {_kind(value)}, expected a dictionary')

    state = content['state_dict']
    require(any(isinstance(value, Tensor) for value in state.values()), 'state_dict holds no tensors')
    require(all(isinstance(key, str) for key in state), 'state_dict has keys that are not strings')

    optimizers = content['optimizer']
    if 'param_groups' in optimizers or not all(isinstance(value, dict) for value in optimizers.values()):
        optimizers = {'': optimizers}
    require(bool(optimizers), 'optimizer is empty')
    for name, optimizer in optimizers.items():
        where = f'optimizer.{name}' if name else 'optimizer'
        groups, states = optimizer.get('param_groups'), optimizer.get('state')
        require(isinstance(states, dict), f'{where}.state is {_kind(states)}, expected a dictionary')
        require(
            isinstance(groups, list) and bool(groups) and all(isinstance(group, dict) for group in groups),
            f'{where}.param_groups is {_kind(groups)}, expected a list of dictionaries',
        )
        require(
            all(isinstance(group.get('params'), list) for group in groups),
            f'{where}.param_groups has a group without its list of params',
        )
        require(
            all(isinstance(value, dict) for value in states.values()),
            f'{where}.state has entries that are not dictionaries',
        )

    schedulers = content.get('param_schedulers', [])
    if isinstance(schedulers, dict):
        lists = list(schedulers.values())
    else:
        lists = [schedulers]
    for one in lists:
        require(
            isinstance(one, list) and all(isinstance(scheduler, dict) for scheduler in one),
            f'param_schedulers is {_kind(one)}, expected a list of dictionaries',
        )
        for index, scheduler in enumerate(one):
            step = scheduler.get('last_step')
            require(
                isinstance(step, int) and not isinstance(step, bool),
                f'param_schedulers[{index}].last_step is {_shown(step)}, expected a whole number',
            )


def _is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _kind(value: Any) -> str:
    return 'missing' if value is None else f'of type {type(value).__name__}'


def _shown(value: Any) -> str:
    text = repr(value) if isinstance(value, (str, int, float, bool, type(None))) else f'of type {type(value).__name__}'
    return text if len(text) <= 60 else text[:57] + '...'


@HOOKS.register_module()
class CompleteBackboneHook(Hook):
    """Check before a run that the checkpoint gave every parameter of the Swin backbones; raise otherwise.

    mmengine's loader lets missing keys pass, for example where ``load_from`` names a classifier's weights instead of a
    detector's. This project's tools add the hook; with other tools, add it to the config::

        custom_hooks = [dict(type='swin_mm.CompleteBackboneHook')]

    A backbone built with ``strict=False`` may be loaded in part.

    Raises:
        CheckpointError: the last load did not give the whole backbone.
    """

    priority = 'VERY_HIGH'

    def before_train(self, runner: Any) -> None:
        """Check before the first iteration."""
        require_complete_backbones(runner.model)

    def before_val(self, runner: Any) -> None:
        """Check before validation."""
        require_complete_backbones(runner.model)

    def before_test(self, runner: Any) -> None:
        """Check before testing."""
        require_complete_backbones(runner.model)


def require_complete_backbones(model: nn.Module) -> None:
    """Raise if the last checkpoint loaded into a model left a strict Swin backbone incomplete.

    A backbone that no checkpoint was loaded into is allowed.

    Args:
        model: any model, wrapped or not.

    Raises:
        CheckpointError: names the backbone, its missing keys and the remedy.
    """
    for name, module in model.named_modules():
        if isinstance(module, SwinPyramid) and getattr(module, 'strict', True) and (problem := _problem(module)):
            raise CheckpointError(f'{name or "backbone"} was not loaded completely: {problem}')
