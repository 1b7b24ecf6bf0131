"""Reading and checking configs, and building models from them."""

import copy
import errno
import importlib.util
import inspect
import os
import re
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path
from typing import Any, TypeGuard

from mmengine.config import Config, ConfigDict
from mmengine.registry import MODELS, init_default_scope
from mmengine.runner import Runner
from torch import nn

from swin_mm.checkpoints.files import MOVED_HOSTS, current_address
from swin_mm.utils.environment import SCOPES, install_command, require
from swin_mm.utils.errors import CheckpointError, DependencyError, InputError, one_line

CONFIGS = Path(__file__).parents[1] / '.mim/configs'  # in the repository a link to configs/


def load_config(name: str | Path) -> Config:
    """Read a config by its path, or by its name in a library: ``mmdet::faster_rcnn/faster-rcnn_r50_fpn_1x_coco.py``.

    Classic configs and configs in mmengine's pure Python style (``with read_base(): ...``) are both read.

    mmengine marks everything that a config inherits from ``LIBRARY::...`` with ``_scope_='LIBRARY'``, and looks up the
    types of a marked part, and of all that it builds, in that library alone. Marks that name swin_mm are removed:
    swin_mm has only backbones and constructors, whose types always carry the prefix ``swin_mm.``, so a marked dataset,
    loop or evaluator would not be found. Marks that name the config's own ``default_scope`` have no effect and are
    removed too.

    Addresses at hosts that are gone, such as those in mmdet's and mmseg's older configs, are replaced, see
    :func:`use_current_addresses`.

    Raises:
        InputError: the config does not exist or cannot be read.
        DependencyError: it needs a library that is missing or broken.
    """
    name = str(name)
    if '::' not in name and not Path(name).is_file():
        raise InputError(f'config {name} does not exist; give the path of a config file, for instance under configs/')
    try:
        cfg = _read_by_library_name(name) if '::' in name else Config.fromfile(name)
        _remove_scopes(dict(cfg.items()), ('swin_mm', cfg.get('default_scope'), None))
    except Exception as error:
        raise_missing_dependency(error)
        raise InputError(f'config {name} cannot be read: {one_line(error)}') from error
    require(*SCOPES.get(cfg.get('default_scope'), ()))
    use_current_addresses(cfg)
    return cfg


def use_current_addresses(cfg: Config) -> None:
    """Replace addresses at hosts that are gone, anywhere in a config, and say so once on standard error.

    This reaches every address that is a whole setting: ``init_cfg`` of any module, ``load_from``, data. It does not
    reach names that mmengine itself translates into addresses, such as ``open-mmlab://resnet50_v1c``.

    Args:
        cfg: the config, changed in place.
    """
    moved = 0

    def current(node: Any) -> Any:
        """The node itself, or what replaces it; shared parts of a config stay shared."""
        nonlocal moved
        if isinstance(node, str):
            address = current_address(node)
            moved += address != node
            return address
        if type(node) is tuple:
            items = tuple(current(item) for item in node)
            return items if any(new is not old for new, old in zip(items, node, strict=True)) else node
        pairs = node.items() if isinstance(node, (dict, Config)) else enumerate(node) if isinstance(node, list) else ()
        for key, old in list(pairs):
            if (new := current(old)) is not old:
                node[key] = new
        return node

    current(cfg)
    if moved:
        hosts = ', '.join(f'{new} instead of {old}' for old, new in MOVED_HOSTS.items())
        print(f'note: addresses of files that have moved ({moved} in the config) are read as: {hosts}', file=sys.stderr)


def config_path(name: str) -> str:
    """The path of one of this project's configs, for programs that do not know ``swin_mm::...``.

    A config that inherits by this line works with every tool and function of OpenMMLab, also where nothing has imported
    swin_mm before, because mmengine evaluates the expression::

        _base_ = __import__('swin_mm').config_path('mask_rcnn/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py')

    Args:
        name: the path below ``configs/``.

    Raises:
        InputError: there is no such config.
    """
    path = CONFIGS / name
    if not path.is_file():
        names = [str(path.relative_to(CONFIGS)) for path in CONFIGS.glob('*/*.py')]
        close = get_close_matches(name, names, n=1)
        hint = f'did you mean {close[0]}?' if close else f'the configs are in {CONFIGS}'
        raise InputError(f'swin_mm has no config {name}; {hint}')
    return str(path)


def with_type_names(cfg: Config) -> Config:
    """Return a copy of a config in which every type is a name, as in classic configs.

    In configs in mmengine's pure Python style types are classes; these become ``'module.Class'``, which mmengine's
    registries resolve.
    """
    return Config(_type_names(cfg.to_dict()), cfg_text=cfg.text, filename=cfg.filename)


def is_pure_python(cfg: Config) -> bool:
    """Whether a config is written in mmengine's pure Python style: its types are classes."""
    return any(not isinstance(node.get('type', ''), str) for node in iter_dicts(dict(cfg.items())))


def raise_missing_dependency(error: BaseException) -> None:
    """Do nothing unless ``error`` arose from a library that is missing or broken.

    mmengine wraps such an error in others that mention neither the library nor a remedy.

    Raises:
        DependencyError: names the library and how to install it.
    """
    require(*(module for module in SCOPES if re.search(rf'\b{module}(mentation|ection)?\b', str(error))))
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ModuleNotFoundError) and cause.name:
            root = cause.name.partition('.')[0]
            if importlib.util.find_spec(root) is None:
                raise DependencyError(f'{root} is not installed; install it with: {install_command(root)}') from error
        cause = cause.__cause__ or cause.__context__


def apply_options(cfg: Config, options: dict[str, Any]) -> list[str]:
    """Merge ``--cfg-options`` into a config.

    Args:
        cfg: the config; changed in place.
        options: values by dotted key.

    Returns:
        A warning for each key that is not in the config. mmengine adds such keys silently, so a typo goes unnoticed.

    Raises:
        InputError: an option does not fit the config.
    """
    warnings = list(_unknown_options(cfg, options))
    try:
        cfg.merge_from_dict(options)
    except Exception as error:
        raise InputError(f'--cfg-options does not fit the config: {one_line(error)}') from error
    use_current_addresses(cfg)
    return warnings


def require_data(cfg: Config, *parts: str) -> None:
    """Check that the annotation files and image folders of the dataloaders and evaluators of ``parts`` exist.

    Args:
        cfg: the config.
        parts: what will run: 'train', 'val', 'test'.

    Raises:
        InputError: lists every missing file and folder.
    """
    missing: dict[str, str] = {}  # one entry per path: train and val often share their folder
    for part in parts:
        for section in (f'{part}_dataloader', f'{part}_evaluator'):
            for key, path in _data_paths(cfg.get(section), section):
                if not os.path.exists(path):
                    missing.setdefault(path, key)
    if missing:
        listed = ', '.join(f'{path} ({key})' for path, key in missing.items())
        raise InputError(
            f'data not found: {listed}; relative paths start at {Path.cwd()}; put the data there, or set '
            'the paths in the config or with --cfg-options'
        )


def type_name(options: dict) -> str:
    """The name of what a config builds, without a scope; configs in pure Python give the class itself."""
    kind = options.get('type')
    return str(getattr(kind, '__name__', kind)).rpartition('.')[2]


def build_model(cfg: Config, options: ConfigDict) -> nn.Module:
    """Build a model or a part of a model.

    Args:
        cfg: the config, for its ``default_scope``.
        options: the entry to build, such as ``cfg.model``.

    Raises:
        InputError: the model cannot be built.
        DependencyError: it needs a library that is missing or broken.
    """
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    with config_errors(cfg):
        return MODELS.build(copy.deepcopy(options))  # some models change their config


@contextmanager
def config_errors(cfg: Config) -> Iterator[None]:
    """Turn any exception while building from ``cfg`` into an InputError of one line."""
    try:
        yield
    except (CheckpointError, DependencyError):
        raise
    except Exception as error:
        raise_missing_dependency(error)
        if is_disk_error(error):  # a Runner writes its first files when it is built
            where = error.filename or cfg.get('work_dir')
            raise InputError(f'{where} cannot be written: {error.strerror}') from error
        raise InputError(f'{cfg.filename} cannot be built: {one_line(error)} (--debug shows where)') from error


def is_disk_error(error: BaseException) -> TypeGuard[OSError]:
    """Whether a file could not be written because of the disk."""
    return isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)


def test_dataset(cfg: Config) -> ConfigDict:
    """Return the config of the test dataset without its wrappers."""
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    return dataset


def as_list(evaluators: dict | list) -> list:
    """Return the evaluators as a list; a config may give a single one."""
    return evaluators if isinstance(evaluators, list) else [evaluators]


def iter_dicts(node: Any) -> Iterator[dict]:
    """Yield every dict in nested dicts, lists and tuples, outer ones first."""
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, (list, tuple)) else ():
        yield from iter_dicts(child)


def reads_segments(pipeline: Any) -> bool:
    """Whether a pipeline of mmdet reads the maps under ``seg``. Instance configs only name them."""
    return any(step.get('with_seg') or 'Panoptic' in str(step.get('type')) for step in iter_dicts(pipeline))


def _read_by_library_name(name: str) -> Config:
    """Read ``LIBRARY::PATH``.

    ``Config.fromfile`` resolves such names in ``_base_`` only, and ``mmengine.hub.get_config`` would install a missing
    library by itself.
    """
    with tempfile.TemporaryDirectory() as folder:
        child = Path(folder, 'child.py')
        child.write_text(f'_base_ = {name!r}\n')
        cfg = Config.fromfile(child)
    return Config(cfg.to_dict(), cfg_text=cfg.text, filename=name)


def _remove_scopes(node: Any, scopes: tuple[str | None, ...]) -> None:
    if isinstance(node, dict):
        if '_scope_' in node:
            if node['_scope_'] not in scopes:
                return  # the types inside belong to another library
            del node['_scope_']
        node = list(node.values())
    if isinstance(node, (list, tuple)):
        for child in node:
            _remove_scopes(child, scopes)


def _type_names(node: Any) -> Any:
    if isinstance(node, dict):
        return {key: _type_names(value) for key, value in node.items()}
    if isinstance(node, (list, tuple)):
        return type(node)(_type_names(value) for value in node)
    if inspect.isclass(node) or inspect.isfunction(node):
        return f'{node.__module__}.{node.__qualname__}'
    return node


def _is_remote(path: str) -> bool:
    return '://' in path


def _data_paths(section: Any, name: str) -> Iterator[tuple[str, str]]:
    """Yield (key, path) of the data of a dataloader or evaluator, joined as mmengine's BaseDataset does."""
    for node in iter_dicts(section):
        if node.get('backend_args'):  # remote storage
            continue
        root = node.get('data_root') or ''
        if root and not _is_remote(root) and not os.path.isdir(root):
            yield f'{name}: data_root', root  # everything below is missing too
            continue
        # An empty ann_file means there is none; an empty folder is data_root itself.
        for key, path in {'ann_file': node.get('ann_file') or None, **(node.get('data_prefix') or {})}.items():
            if key == 'seg' and not reads_segments(node.get('pipeline') or ()):
                continue
            if isinstance(path, str) and not _is_remote(path := os.path.join(root, path)):
                yield f'{name}: {key}', path or '.'


def _unknown_options(cfg: Config, options: dict[str, Any]) -> Iterator[str]:
    """Yield a warning for each option that is not in the config."""
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
