"""Training from a config: the checks beforehand, and the run."""

import ast
import contextlib
import errno
import http.client
import importlib.util
import os
import pickle
import shutil
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.hooks import Hook
from mmengine.runner import Runner

from swin_mm.engine.config_pickles import require_no_pickles
from swin_mm.engine.preemption import PreemptionHook
from swin_mm.engine.runner import build_runner, configure_training
from swin_mm.engine.schedule import long_warmup
from swin_mm.engine.work_dir import last_checkpoint, locked
from swin_mm.openmmlab.config import is_disk_error, require_data
from swin_mm.openmmlab.loading import read_checkpoint, require_training_checkpoint
from swin_mm.utils.errors import CheckpointError, InputError, one_line

AMP_DTYPES = {'fp16': 'float16', 'bf16': 'bfloat16'}
VIS_BACKENDS = {'mlflow': 'MLflowVisBackend', 'tensorboard': 'TensorboardVisBackend', 'wandb': 'WandbVisBackend'}


def train(cfg: Config, resume: str | None = None, allow_pickle: bool = False) -> None:
    """Train the model of a config.

    Whatever can be checked beforehand is checked before anything is built. Only one run at a time may use a work_dir.

    Args:
        cfg: the config, with a ``work_dir``; it is changed, see :func:`swin_mm.engine.runner.configure_training`.
        resume: a checkpoint to continue from, or 'auto' for the last one in the work_dir.
        allow_pickle: open pickles that the config names, which can run code.

    Raises:
        InputError: something in the config, the data or the folders is wrong.
        CheckpointError: a checkpoint cannot be read or does not fit.
        Stopped: a signal ended the run; it can be resumed.
    """
    parts = ['train', *(['val'] if cfg.get('val_cfg') else [])]
    if not allow_pickle:
        require_no_pickles(cfg, *parts, 'model')
    require_device(cfg)
    require_data(cfg, *parts)
    set_start(cfg, resume)
    with locked(cfg.work_dir) if _is_first_rank() else contextlib.nullcontext(), run_errors(cfg):
        configure_training(cfg)
        cfg.custom_hooks = [*cfg.custom_hooks, dict(type='swin_mm.engine.training.WarmupCheckHook')]
        runner = build_runner(cfg)
        next(hook for hook in runner.hooks if isinstance(hook, PreemptionHook)).train(runner)


def _is_first_rank() -> bool:
    """Whether this is the only process or rank 0, before the process group exists."""
    names = ('RANK', 'SLURM_PROCID', 'OMPI_COMM_WORLD_RANK')  # torchrun, Slurm, MPI
    return next((os.environ[name] for name in names if name in os.environ), '0') == '0'


def use_amp(cfg: Config, dtype: str | None = None) -> None:
    """Turn on mixed precision.

    Args:
        cfg: the config, changed in place.
        dtype: a key of :data:`AMP_DTYPES`; by default that of the config, or else PyTorch's default for the device.
    """
    wrapper = cfg.optim_wrapper
    wrapper.type = 'AmpOptimWrapper'
    if dtype is not None:
        wrapper.dtype = AMP_DTYPES[dtype]
        wrapper.pop('loss_scale', None)
    # bf16 has the range of fp32: losses need no scaling.
    wrapper.setdefault('loss_scale', 1.0 if wrapper.get('dtype') == 'bfloat16' else 'dynamic')


def scale_learning_rate(cfg: Config) -> None:
    """Let mmengine multiply the learning rate by batch size / ``auto_scale_lr.base_batch_size``.

    Raises:
        InputError: the config does not name that batch size.
    """
    if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
        raise InputError(
            '--auto-scale-lr needs the batch size that the learning rate was chosen for: '
            'auto_scale_lr = dict(base_batch_size=16) in the config'
        )
    cfg.auto_scale_lr.enable = True
    # mmengine compares this with the batches of one iteration.
    cfg.auto_scale_lr.base_batch_size /= cfg.optim_wrapper.get('accumulative_counts', 1)


def log_to(cfg: Config, package: str) -> None:
    """Add mmengine's writer for a package, a key of :data:`VIS_BACKENDS`, to the visualizer.

    MLflow logs to the server that ``MLFLOW_TRACKING_URI`` names, or else to a database in the work_dir: it no longer
    accepts the plain folder that mmengine would choose.

    Raises:
        InputError: the package is not installed.
    """
    if importlib.util.find_spec(package) is None:
        raise InputError(f'--vis {package} needs the package {package}; install it with: pip install {package}')
    visualizer = cfg.setdefault('visualizer', dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')]))
    backend: dict[str, Any] = dict(type=VIS_BACKENDS[package])
    if package == 'mlflow':
        work_dir = os.path.abspath(cfg.work_dir)
        backend.update(exp_name=Path(work_dir).name, tracking_uri=os.environ.get('MLFLOW_TRACKING_URI'))
        if backend['tracking_uri'] is None:  # the logs are in the work_dir already
            backend.update(tracking_uri=f'sqlite:///{work_dir}/mlflow.db', artifact_suffix=())
            backend['artifact_location'] = f'{work_dir}/mlruns'
    visualizer.vis_backends = [*(visualizer.get('vis_backends') or []), backend]


def require_device(cfg: Config) -> None:
    """Refuse mixed precision where mmengine cannot do it.

    Raises:
        InputError: there is no GPU.
    """
    if 'Amp' in str(cfg.optim_wrapper.get('type')) and get_device() == 'cpu':
        raise InputError(
            'mixed precision (--amp, --amp-dtype, AmpOptimWrapper) needs a GPU and torch sees none: mmengine refuses '
            'it on CPUs, bf16 too; leave out --amp or set --cfg-options optim_wrapper.type=OptimWrapper'
        )


def set_start(cfg: Config, resume: str | None) -> None:
    """Set the checkpoint that training starts from, and read it now, to fail fast.

    Args:
        cfg: the config, changed in place.
        resume: see :func:`train`.

    Raises:
        CheckpointError: a checkpoint cannot be read, or the one to resume is not from a training run.
    """
    if resume is None and cfg.get('resume') and not cfg.get('load_from'):
        resume = 'auto'
    last = last_checkpoint(cfg.work_dir)
    if resume == 'auto':
        resume = last
        if resume is None:
            print(f'nothing to resume in {cfg.work_dir}: training starts from the beginning')
    elif resume is None and not cfg.get('resume') and last is not None:
        _warn(
            f'{cfg.work_dir} holds checkpoints of an earlier run ({Path(last).name}), which this run will '
            'replace; --resume continues that run, --work-dir names another folder'
        )
    if resume is not None:
        cfg.resume, cfg.load_from = True, resume
    if not cfg.get('load_from'):
        require_init_checkpoints(cfg)
        return

    try:
        checkpoint = read_checkpoint(cfg.load_from)
    except CheckpointError as error:
        setting = '--resume FILE' if resume else '--cfg-options load_from=FILE'
        raise CheckpointError(f'{error}; choose another file with {setting}') from error
    if cfg.get('resume'):
        require_training_checkpoint(checkpoint, cfg.load_from)
        for warning in changed_data(checkpoint['meta'].get('cfg'), cfg):
            _warn(warning)
        # The samplers take their seed when they are built, before mmengine restores that of the interrupted run.
        cfg.randomness = {'seed': checkpoint['meta'].get('seed')} | cfg.get('randomness', {})


def require_init_checkpoints(cfg: Config) -> None:
    """Read, or download, the checkpoints that the model will be initialised from.

    Those of our backbones are downloaded now. mmengine downloads those of other modules when they are built, unless
    they are in its cache; here it is only checked that their servers answer.

    Raises:
        CheckpointError: one cannot be read; the message names the setting that chooses another file.
    """
    for key, node in _modules(cfg.get('model'), 'model'):
        inits = node['init_cfg'] if isinstance(node['init_cfg'], (list, tuple)) else [node['init_cfg']]
        for init in inits:
            path = init.get('checkpoint') if isinstance(init, dict) else None
            if 'Pretrained' not in str(init and init.get('type')) or not isinstance(path, str):
                continue
            try:
                if '://' not in path or str(node.get('type')).startswith('swin_mm.'):
                    read_checkpoint(path)
                elif path.startswith(('http://', 'https://')):
                    require_reachable(path)
            except CheckpointError as error:
                setting = f'{key}.init_cfg.checkpoint=FILE' if isinstance(node['init_cfg'], dict) else f'{key}.init_cfg'
                raise CheckpointError(f'{error}; choose another file with --cfg-options {setting}') from error


def require_reachable(address: str) -> None:
    """Check that a file that mmengine will download is in its cache or can be downloaded.

    Raises:
        CheckpointError: neither; the message says where to put the file.
    """
    path = Path(torch.hub.get_dir(), 'checkpoints', Path(urlsplit(address).path).name)
    if path.exists():
        return
    try:
        urllib.request.urlopen(address, timeout=60).close()
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise CheckpointError(
            f'checkpoint {address} cannot be downloaded: {one_line(error)}; get the file {path.name} by hand and '
            f'save it as {path}'
        ) from error


def _modules(node: Any, path: str) -> Iterator[tuple[str, dict]]:
    """(dotted key, settings) of everything in a model that has an ``init_cfg``."""
    if isinstance(node, dict):
        if node.get('init_cfg'):
            yield path, node
        for key, value in node.items():
            yield from _modules(value, f'{path}.{key}')
    elif isinstance(node, (list, tuple)):
        for index, value in enumerate(node):
            yield from _modules(value, f'{path}.{index}')


def changed_data(text: str | None, cfg: Config) -> list[str]:
    """Compare the training data of a config with that of the run that saved a checkpoint.

    Args:
        text: the config that the checkpoint carries; it is parsed, not executed.
        cfg: the config of this run.

    Returns:
        A warning for each setting that differs.
    """
    try:
        tree = ast.parse(text or '')
    except SyntaxError:
        return []
    old: dict[str, list[str]] = {}
    for statement in tree.body:
        names = [target.id for target in getattr(statement, 'targets', []) if isinstance(target, ast.Name)]
        if 'train_dataloader' in names:
            for node in ast.walk(statement):
                if isinstance(node, ast.keyword) and node.arg in ('data_root', 'ann_file', 'classes'):
                    with contextlib.suppress(ValueError):
                        old.setdefault(node.arg, []).append(str(ast.literal_eval(node.value)))
    new: dict[str, list[str]] = {}
    _collect(cfg.train_dataloader, new)
    return [
        f'the run to resume was trained on {key} {_listed(old[key])}, this one is on {_listed(new[key])}; the schedule '
        'and the order of images continue unchanged'
        for key in ('data_root', 'ann_file', 'classes')
        if old.get(key) and new.get(key) and sorted(old[key]) != sorted(new[key])
    ]


def _collect(node: Any, found: dict[str, list[str]]) -> None:
    if isinstance(node, dict):
        for key, value in node.items():
            if key in ('data_root', 'ann_file', 'classes'):
                found.setdefault(key, []).append(str(tuple(value) if isinstance(value, list) else value))
            else:
                _collect(value, found)
    elif isinstance(node, (list, tuple)):
        for value in node:
            _collect(value, found)


def _listed(values: list[str]) -> str:
    text = ', '.join(values)
    return text if len(text) < 100 else f'{text[:100]}...'


class WarmupCheckHook(Hook):
    """Warns if the warm-up of the learning rate takes more than a tenth of the run."""

    def before_train(self, runner: Runner) -> None:
        """Compare the schedule with the length of the run."""
        if what := long_warmup(runner.cfg, runner.max_iters, len(runner.train_dataloader)):
            runner.logger.warning(what)


@contextlib.contextmanager
def run_errors(cfg: Config) -> Iterator[None]:
    """Turn common errors of a run into one line with a remedy.

    Raises:
        InputError: the data, the disk or the shared memory is at fault.
        CheckpointError: a checkpoint cannot be read.
    """
    try:
        yield
    except InputError as error:
        raise explained(error, cfg) from error
    except pickle.UnpicklingError as error:
        raise CheckpointError(
            f'a checkpoint of the model would run code when it is opened: {one_line(error)[:300]}; if you trust its '
            'origin, pass --allow-pickle'
        ) from error
    except (RuntimeError, OSError, ValueError) as error:
        if (explanation := explained(error, cfg)) is error:
            raise
        raise explanation from error


def explained(error: Exception, cfg: Config) -> Exception:
    """Return a one-line error with a remedy for a common error of a run, and any other error unchanged."""
    text = str(error)
    work_dir = cfg.get('work_dir') or '.'
    resume = 'then continue with --resume' if last_checkpoint(work_dir) else 'then start again'
    if isinstance(error, InputError):
        if 'DataLoader worker' in text:  # torch puts the worker's traceback in front
            text = text.rsplit('InputError: ', 1)[-1].strip()
        if 'cannot be loaded' in text:
            return InputError(f'{text}; tools/check_data.py lists all such files: fix or remove them, {resume}')
        if 'cannot be written' in text:
            return InputError(f'{text}; {_space(text.partition(" cannot be written")[0], work_dir)}, {resume}')
        return InputError(text)
    if is_disk_error(error):
        where = error.filename or work_dir
        return InputError(f'{where} cannot be written: {error.strerror}; {_space(where, work_dir)}, {resume}')
    if 'Expected more than 1 value per channel' in text:
        return InputError(
            'a batch of one image is too small for a BatchNorm behind pooling to 1 × 1 (UPerNet, PSPNet): use 2 or '
            'more per GPU, --cfg-options train_dataloader.batch_size=2 train_dataloader.drop_last=True'
        )
    shared = 'shared memory' in text or ('torch_' in text and os.strerror(errno.ENOSPC) in text)
    # torch may raise that a worker exited from the error that says why.
    if shared or 'killed by signal: Bus error' in f'{text} {error.__cause__}':
        return InputError(
            'the shared memory (/dev/shm) through which data workers pass batches is full; give it more (in Docker '
            '--shm-size) or use fewer workers: --cfg-options train_dataloader.num_workers=0 '
            f'train_dataloader.persistent_workers=False, {resume}'
        )
    return error


def _space(path: str, work_dir: str) -> str:
    """How much room there is where a file should have been written, and what else to do."""
    place = Path(path).absolute()
    folder = next(parent for parent in place.parents if parent.is_dir())
    another = '--work-dir' if place.is_relative_to(Path(work_dir).absolute()) else 'folder'
    free = shutil.disk_usage(folder).free
    return f'{free / 1e9:.1f} GB are free there: make room, or choose another {another}'


def _warn(text: str) -> None:
    print(f'warning: {text}', file=sys.stderr)
