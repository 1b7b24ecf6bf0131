"""What the command-line tools share: reading a config, naming bad input before anything is built, exit codes.

Exit codes: 0 done, 1 something failed, 2 bad input, 128 + signal number when stopped (130 for Ctrl-C).
"""

import copy
import inspect
import os
import sys
import tempfile
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from mmengine.config import Config, ConfigDict, DictAction
from mmengine.device import get_device
from mmengine.registry import MODELS, RUNNERS, init_default_scope
from mmengine.runner import CheckpointLoader, Runner
from torch import nn

from swin_mm.checkpoints import CheckpointError, read_checkpoint, unwrap
from swin_mm.distributed import join_on_cpu
from swin_mm.doctor import SCOPES, DependencyError, require

_DET_TTA = {'type': 'DetTTAModel', 'tta_cfg': {'nms': {'type': 'nms', 'iou_threshold': 0.5}, 'max_per_img': 100}}


class InputError(ValueError):
    """What the user gave does not work; the message says what was wrong, what was expected and what to do."""


class Stopped(KeyboardInterrupt):
    """The user (or the cluster) ended the run and everything worth keeping is saved; the message says how to go on."""

    def __init__(self, message: str, signal_number: int) -> None:
        super().__init__(message)
        self.code = 128 + signal_number


def parser(description: str, runner: bool = True, **kwargs: Any) -> ArgumentParser:
    """The arguments that all tools on a config have, with the names that mmdet and mmseg use.

    Args:
        description: What the tool does.
        runner: Whether it builds mmengine's Runner, which wants a work_dir and a launcher.
        kwargs: More for ArgumentParser.
    """
    result = ArgumentParser(description=description, **kwargs)
    result.add_argument('config', help='config file')
    result.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        metavar='KEY=VALUE',
        help='change settings of the config: model.backbone.with_cp=True, or lists as key="[a,b]" or key=a,b',
    )
    result.add_argument('--debug', action='store_true', help='show where an error arose')
    if not runner:
        return result
    result.add_argument('--work-dir', help='folder for logs and checkpoints (default: work_dirs/<name of the config>)')
    result.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='job launcher')
    # torchrun and its forerunners pass the rank by one of these names or in the environment.
    result.add_argument('--local_rank', '--local-rank', type=int, default=0, help='set by the launcher')
    return result


def run(main: Callable[[Namespace], None], args: Namespace) -> int:
    """Call ``main`` and turn what it raises into one line and an exit code.

    An error that is not about the input keeps its traceback: it may come hours into a run.
    """
    try:
        main(args)
    except (InputError, CheckpointError, DependencyError) as error:
        if args.debug:
            traceback.print_exc()
        print(f'error: {error}', file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.code
    except KeyboardInterrupt:
        print('stopped at once; nothing was saved by this', file=sys.stderr)
        return 130
    return 0


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
        raise InputError(f'config {name} cannot be read: {_one_line(error)}') from error
    require(*SCOPES.get(cfg.get('default_scope'), ()))
    return cfg


def read_config(args: Namespace, change: Callable[[Config], Config] = lambda cfg: cfg) -> Config:
    """Read the config that ``parser`` was given, with its options and, for a runner, work_dir and launcher set.

    Args:
        args: what ``parser`` gives.
        change: what happens to the config before its options are set.

    Raises:
        InputError: it is not there or does not read.
        DependencyError: it builds on a library that is absent or broken.
    """
    cfg = change(load_config(args.config))
    for warning in _unknown_options(cfg, args.cfg_options):
        print(f'warning: {warning}', file=sys.stderr)
    try:
        cfg.merge_from_dict(args.cfg_options)
    except Exception as error:
        raise InputError(f'--cfg-options does not fit the config: {_one_line(error)}') from error

    if 'launcher' not in args:
        return cfg
    cfg.launcher = args.launcher
    if args.launcher in ('slurm', 'mpi') and get_device() == 'cpu':
        raise InputError(f'--launcher {args.launcher} needs GPUs and torch sees none; on CPUs use tools/dist_train.sh')
    if args.launcher == 'pytorch' and 'RANK' not in os.environ:
        raise InputError('--launcher pytorch is for processes that torchrun starts; use tools/dist_train.sh')
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or str(Path('work_dirs', Path(args.config).stem))
    return cfg


def check_data(cfg: Config, *parts: str) -> None:
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


def check_pretrained(cfg: Config) -> None:
    """Read every local checkpoint that the model will initialise itself from.

    Raises:
        CheckpointError: one is not there or cannot be read.
    """
    for node in _dicts(cfg.get('model')):
        path = node.get('checkpoint')
        if 'Pretrained' in str(node.get('type')) and isinstance(path, str) and not _is_remote(path):
            read_checkpoint(path)


def use_safe_reader() -> None:
    """Have mmengine read checkpoints without executing what they contain.

    Its own reader tries that first and then falls back to executing.
    """

    def load_from_any_source(filename: str, map_location: Any = None) -> Any:
        checkpoint = read_checkpoint(filename, map_location or 'cpu')
        # mmengine looks under 'state_dict' alone.
        known = isinstance(checkpoint, dict) and 'state_dict' in checkpoint
        return checkpoint if known else {'state_dict': unwrap(checkpoint)}

    schemes = ['', 'http://', 'https://', 'hf://']
    CheckpointLoader.register_scheme(prefixes=schemes, loader=load_from_any_source, force=True)
    # The remaining schemes (model zoos, object stores) end in torch.load, which obeys this.
    os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] = '1'


def build_runner(cfg: Config) -> Runner:
    """Build mmengine's Runner, or the one that ``runner_type`` names. On CPUs join the other ranks, if any, first.

    Raises:
        InputError: something in the config cannot be built.
    """
    if cfg.get('launcher') == 'pytorch' and get_device() == 'cpu':
        join_on_cpu(cfg)
    with building(cfg):
        return RUNNERS.build(cfg) if 'runner_type' in cfg else Runner.from_cfg(cfg)


def build_model(cfg: Config, options: ConfigDict) -> nn.Module:
    """Build a model, or the part of one, that these ``options`` in ``cfg`` describe.

    Raises:
        InputError: it cannot be built.
    """
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    with building(cfg):
        return MODELS.build(copy.deepcopy(options))  # some models change their config


@contextmanager
def building(cfg: Config) -> Iterator[None]:
    """Say in one line why something in ``cfg`` cannot be built."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise InputError(f'{cfg.filename} cannot be built: {_one_line(error)} (--debug shows where)') from error


def numbers(option: str, text: str | None, separator: str, least: int = 0) -> tuple[int, int] | None:
    """Two whole numbers that an option gives, such as 1333x800, or None if it is not given.

    Raises:
        InputError: it gives something else.
    """
    if text is None:
        return None
    try:
        first, second = map(int, text.lower().split(separator))
    except ValueError:
        raise InputError(f'{option} {text}: expected two whole numbers with {separator!r} between them') from None
    if min(first, second) < least:
        raise InputError(f'{option} {text}: expected numbers from {least} up')
    return first, second


def augment(cfg: Config) -> None:
    """Wrap the model in its library's test-time augmentation: a flip, unless the config says otherwise."""
    if cfg.default_scope == 'mmdet':
        _leave_out_masks(cfg)
        model, pack = _DET_TTA, 'PackDetInputs'
    else:
        model, pack = {'type': 'SegTTAModel'}, 'PackSegInputs'
    dataset = test_dataset(cfg)
    # Unflipped first: the merged prediction keeps the ground truth of the first view.
    flips = [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)]
    default = [*dataset.pipeline[:-1], dict(type='TestTimeAug', transforms=[flips, [dict(type=pack)]])]
    dataset.pipeline = cfg.get('tta_pipeline') or default
    cfg.model = dict(cfg.get('tta_model') or model, module=cfg.model)


def test_dataset(cfg: Config) -> ConfigDict:
    """What the wrappers of the dataset to test on are around."""
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    return dataset


def _leave_out_masks(cfg: Config) -> None:
    """Test boxes alone: mmdet's test-time augmentation refuses predictions with masks."""
    if 'panoptic_head' in cfg.model:
        raise InputError(f'--tta: mmdet merges boxes alone, and {cfg.model.type} predicts masks; leave --tta out')
    heads = cfg.model.get('roi_head') or {}
    if heads.get('mask_head') is None:
        return
    print('note: test-time augmentation of mmdet merges boxes only, masks are left out')
    heads.mask_head = heads.mask_roi_extractor = None
    for evaluator in as_list(cfg.test_evaluator):
        if 'segm' in evaluator.get('metric', ()):
            evaluator.metric = ['bbox']


def as_list(evaluators: dict | list) -> list:
    """A config may name one evaluator or several."""
    return evaluators if isinstance(evaluators, list) else [evaluators]


@contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A file beside ``path`` to write to, of the same suffix; it takes the place of ``path`` when all went well.

    Raises:
        InputError: the folder cannot be made or the file cannot be put there.
    """
    part = path.with_name(f'.{os.getpid()}_{path.name}')
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        yield part
        os.replace(part, path)
    except OSError as error:
        raise InputError(f'{path} cannot be written: {error.strerror or error}') from error
    finally:
        with suppress(OSError):
            part.unlink()


def _one_line(error: BaseException) -> str:
    return ' '.join(str(error).split()) or type(error).__name__


def _is_remote(path: str) -> bool:
    return '://' in path


def _dicts(node: Any) -> Iterator[dict]:
    """Every dict in a nest of dicts and lists."""
    if isinstance(node, dict):
        yield node
    for child in node.values() if isinstance(node, dict) else node if isinstance(node, (list, tuple)) else ():
        yield from _dicts(child)


def _data_paths(section: Any, name: str) -> Iterator[tuple[str, str]]:
    """Where a dataloader or an evaluator will look: (key, path), joined as mmengine's BaseDataset does."""
    for node in _dicts(section):
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


def reads_segments(pipeline: Any) -> bool:
    """Whether mmdet will open the maps under ``seg``; its instance configs name them too and never do."""
    return any(step.get('with_seg') or 'Panoptic' in str(step.get('type')) for step in _dicts(pipeline))


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
