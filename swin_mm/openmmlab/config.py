"""Reading and checking configs, and building models from them."""

import copy
import inspect
import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from torch import nn

from swin_mm.openmmlab.loading import read_checkpoint
from swin_mm.utils.environment import SCOPES, require
from swin_mm.utils.errors import CheckpointError, InputError, one_line


def load_config(name: str | Path) -> Config:
    """Read a config by its path, or by its name in a library: ``mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py``.

    Raises:
        InputError: it is not there or does not read.
        DependencyError: it builds on a library that is absent or broken.
    """
    name = str(name)
    if '::' not in name and not Path(name).is_file():
        raise InputError(f'config {name} does not exist; give the path of a config file, for instance under configs/')
    try:
        if '::' not in name:
            cfg = Config.fromfile(name)
        else:  # mmengine resolves such names for bases alone
            with tempfile.TemporaryDirectory() as folder:
                heir = Path(folder, 'heir.py')
                heir.write_text(f'_base_ = {name!r}\n')
                cfg = Config.fromfile(heir)
                cfg = Config(cfg.to_dict(), cfg_text=cfg.text, filename=name)
    except Exception as error:
        # The usual reason is a `_base_` in a library that is not there; mmengine's words for that name no remedy.
        require(*(module for module in SCOPES if module in str(error)))
        raise InputError(f'config {name} cannot be read: {one_line(error)}') from error
    require(*SCOPES.get(cfg.get('default_scope'), ()))
    return cfg


def apply_options(cfg: Config, options: dict[str, Any]) -> list[str]:
    """Merge ``--cfg-options`` into a config.

    Args:
        cfg: the config, changed in place.
        options: values by dotted key.

    Returns:
        A warning for each key that the config does not have: mmengine adds it, so that a typo goes unnoticed.

    Raises:
        InputError: an option does not fit the config.
    """
    warnings = list(_unknown_options(cfg, options))
    try:
        cfg.merge_from_dict(options)
    except Exception as error:
        raise InputError(f'--cfg-options does not fit the config: {one_line(error)}') from error
    return warnings


def require_data(cfg: Config, *parts: str) -> None:
    """Look for every annotation file and image folder of the dataloaders and evaluators of ``parts``.

    Args:
        cfg: The config.
        parts: What will run, of 'train', 'val' and 'test'.

    Raises:
        InputError: something is not there; it names all that is missing.
    """
    missing = {}  # one entry per path: train and val often share their folder
    for part in parts:
        for section in (f'{part}_dataloader', f'{part}_evaluator'):
            for key, path in _data_paths(cfg.get(section), section):
                if not os.path.exists(path):
                    missing.setdefault(path, key)
    if missing:
        listed = ', '.join(f'{path} ({key})' for path, key in missing.items())
        raise InputError(
            f'data not found: {listed}; relative paths count from {Path.cwd()}; put the data there or set '
            'the paths in the config or with --cfg-options'
        )


def require_pretrained(cfg: Config) -> None:
    """Read every local checkpoint that the model will initialise itself from.

    Raises:
        CheckpointError: one is not there or cannot be read.
    """
    for node in iter_dicts(cfg.get('model')):
        path = node.get('checkpoint')
        if 'Pretrained' in str(node.get('type')) and isinstance(path, str) and not _is_remote(path):
            read_checkpoint(path)


def build_model(cfg: Config, options: ConfigDict) -> nn.Module:
    """Build a model, or the part of one, that these ``options`` in ``cfg`` describe.

    Raises:
        InputError: it cannot be built.
    """
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    with config_errors(cfg):
        return MODELS.build(copy.deepcopy(options))  # some models change their config


@contextmanager
def config_errors(cfg: Config) -> Iterator[None]:
    """Say in one line why something in ``cfg`` cannot be built."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise InputError(f'{cfg.filename} cannot be built: {one_line(error)} (--debug shows where)') from error


def test_dataset(cfg: Config) -> ConfigDict:
    """What the wrappers of the dataset to test on are around."""
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    return dataset


def as_list(evaluators: dict | list) -> list:
    """A config may name one evaluator or several."""
    return evaluators if isinstance(evaluators, list) else [evaluators]


def iter_dicts(node: Any) -> Iterator[dict]:
    """Every dict in a nest of dicts and lists."""
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, (list, tuple)) else ():
        yield from iter_dicts(child)


def reads_segments(pipeline: Any) -> bool:
    """Whether mmdet will open the maps under ``seg``; its instance configs name them too and never do."""
    return any(step.get('with_seg') or 'Panoptic' in str(step.get('type')) for step in iter_dicts(pipeline))


def _is_remote(path: str) -> bool:
    return '://' in path


def _data_paths(section: Any, name: str) -> Iterator[tuple[str, str]]:
    """Where a dataloader or an evaluator will look: (key, path), joined as mmengine's BaseDataset does."""
    for node in iter_dicts(section):
        if node.get('backend_args'):  # the files are not in this file system
            continue
        root = node.get('data_root') or ''
        if root and not _is_remote(root) and not os.path.isdir(root):
            yield f'{name}: data_root', root  # the rest cannot be there either
            continue
        # An empty annotation file means none; an empty folder is data_root itself.
        for key, path in {'ann_file': node.get('ann_file') or None, **(node.get('data_prefix') or {})}.items():
            if key == 'seg' and not reads_segments(node.get('pipeline') or ()):
                continue
            if isinstance(path, str) and not _is_remote(path := os.path.join(root, path)):
                yield f'{name}: {key}', path or '.'


def _unknown_options(cfg: Config, options: dict[str, Any]) -> Iterator[str]:
    """Options that match nothing in the config: mmengine adds them, so that a typo goes unnoticed."""
    runner_arguments = inspect.signature(Runner.__init__).parameters
    for option in options:
        node: Any = cfg.to_dict()
        for depth, part in enumerate(option.split('.')):
            if not isinstance(node, dict) or (depth == 0 and part in runner_arguments and part not in node):
                break
            if part not in node:
                close = get_close_matches(part, node, n=1)
                hint = f'; did you mean {close[0]}?' if close else ''
                yield f'{option} is not in the config and is added to it{hint}'
                break
            node = node[part]
