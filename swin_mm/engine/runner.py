"""Our subclass of mmengine's Runner, and the settings added to a config before training or testing."""

import os
import re
from collections import OrderedDict
from typing import Any

from mmengine.config import Config
from mmengine.device import get_device
from mmengine.dist import is_distributed
from mmengine.registry import RUNNERS
from mmengine.runner import Runner, load_state_dict
from torch import nn
from torch.distributed import init_process_group
from torch.utils.data import DataLoader

from swin_mm.engine.dataloading import with_sample_errors
from swin_mm.openmmlab.config import config_errors, iter_dicts
from swin_mm.openmmlab.loading import read_for_mmengine, require_complete, unwrap_model
from swin_mm.utils.errors import CheckpointError, InputError, one_line

# mmengine's loops -> ours, which take the same arguments.
LOOPS = {
    'EpochBasedTrainLoop': 'swin_mm.engine.loops.ResumableEpochLoop',
    'IterBasedTrainLoop': 'swin_mm.engine.loops.ResumableIterLoop',
}
COLLATE = 'swin_mm.engine.dataloading.collate_shared'
HOOKS = (
    'swin_mm.CompleteBackboneHook',
    'swin_mm.engine.preemption.ExactResumeHook',
    'swin_mm.engine.preemption.PreemptionHook',
)


class SafeRunner(Runner):
    """A Runner that reads ``load_from`` without running code from it, and checks that it fits.

    mmengine's reader falls back to running code. With a checkpoint that lacks a head, or has one of another shape, it
    leaves that head at its random values with no more than a line in the log; here that is an error in testing and
    resuming, while training from ``load_from`` may start with new heads.
    """

    must_be_complete = False

    def load_checkpoint(
        self,
        filename: str,
        map_location: Any = 'cpu',
        strict: bool = False,
        revise_keys: list = [(r'^module.', '')],  # noqa: B006 (mmengine's signature)
    ) -> dict[str, Any]:
        """Load the weights of a checkpoint into the model, and return the checkpoint.

        Raises:
            CheckpointError: it cannot be read, or does not give the whole model although it must.
        """
        checkpoint = read_for_mmengine(filename, map_location)
        self.call_hook('after_load_checkpoint', checkpoint=checkpoint)
        state = _renamed(checkpoint['state_dict'], revise_keys)
        if self.must_be_complete:
            load_complete(self.model, state, filename)
        else:
            load_state_dict(unwrap_model(self.model), state, strict, logger=self.logger)
        self.logger.info(f'Loaded checkpoint {filename}')
        return checkpoint

    @staticmethod
    def build_dataloader(dataloader: DataLoader | dict, *args: Any, **kwargs: Any) -> DataLoader:
        """Build a dataloader whose errors name the file of a sample that cannot be loaded.

        Raises:
            InputError: its dataset has no images.
        """
        try:
            return with_sample_errors(Runner.build_dataloader(dataloader, *args, **kwargs))
        except ValueError as error:
            if 'need at least one array to concatenate' not in str(error):  # mmengine joins the data of all images
                raise
            raise InputError(f'{_why_empty(dataloader)}; tools/check_data.py says what is there') from error

    def resume(self, *args: Any, **kwargs: Any) -> None:
        """Resume training; the checkpoint must give the whole model.

        Raises:
            CheckpointError: it does not, or the rest of it does not fit this run.
        """
        self.must_be_complete = True
        try:
            super().resume(*args, **kwargs)
        except (KeyError, IndexError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(
                f'the checkpoint does not fit this run: {type(error).__name__}: {one_line(error)}; resume with the '
                'config that it was saved by, or start from its weights with --cfg-options load_from=CHECKPOINT'
            ) from error

    def test(self) -> dict:
        """Test; the checkpoint must give the whole model."""
        self.must_be_complete = True
        return super().test()


def _why_empty(dataloader: Any) -> str:
    """Where a dataset looked for images, from the config of its dataloader."""
    options = next((node for node in iter_dicts(dataloader) if 'data_prefix' in node or 'ann_file' in node), {})
    root, prefix = options.get('data_root') or '', options.get('data_prefix') or {}
    if options.get('ann_file'):
        return f'no images are left of {os.path.join(root, options["ann_file"])}: see its entries and filter_cfg'
    folder = os.path.join(root, prefix.get('img_path') or prefix.get('img') or '')
    suffix = options.get('img_suffix', 'the default of the dataset')
    return f'no images in {folder or "the data set"} (img_suffix: {suffix})'


def load_complete(model: nn.Module, state: dict[str, Any], source: str) -> None:
    """Load a state dict that must give every parameter and buffer of a model.

    Args:
        model: the model, which may be wrapped for several GPUs or test-time augmentation.
        state: the state dict.
        source: the file or address, for the message.

    Raises:
        CheckpointError: something is missing or has another shape.
    """
    state = _renamed(state, [(r'^module\.', '')])  # saved from a wrapper for several GPUs
    require_complete(model, state, source)
    load_state_dict(unwrap_model(model), state)


def _renamed(state: dict[str, Any], patterns: list[tuple[str, str]]) -> dict[str, Any]:
    result = OrderedDict(state)
    for pattern, replacement in patterns:
        result = OrderedDict((re.sub(pattern, replacement, key), value) for key, value in result.items())
    if hasattr(state, '_metadata'):  # torch keeps versions of layers there
        result._metadata = state._metadata  # type: ignore[attr-defined]  # not in the type of OrderedDict
    return result


def build_runner(cfg: Config) -> Runner:
    """Build the Runner of a config, or the one that ``runner_type`` names. On CPUs first join the other ranks, if any.

    Raises:
        InputError: something in the config cannot be built.
        DependencyError: the config uses FSDP and this mmengine does not have it.
    """
    if cfg.get('launcher') == 'pytorch' and get_device() == 'cpu':
        join_on_cpu(cfg)
    if 'runner_type' not in cfg:
        with config_errors(cfg):
            return SafeRunner.from_cfg(cfg)
    if 'FSDPStrategy' not in str(cfg.get('strategy')):
        raise InputError(
            f'runner_type={cfg.runner_type!r} is supported with FSDP only (configs/_base_/strategies/fsdp.py); leave '
            'out runner_type and strategy'
        )
    import swin_mm.engine.fsdp  # noqa: F401 (here, so that an import error is reported as it is)

    with config_errors(cfg):
        return RUNNERS.build(cfg)


def configure_training(cfg: Config) -> None:
    """Add the settings that make a run resumable; all of them are visible in the config that mmengine dumps.

    * ``train_cfg.type``: loops that resume within an epoch (:mod:`swin_mm.engine.loops`);
    * ``default_hooks.checkpoint.backend_args``: checkpoints are written atomically
      (:class:`swin_mm.engine.work_dir.AtomicBackend`);
    * ``custom_hooks``: saving on signals and exact resuming (:mod:`swin_mm.engine.preemption`), and a check that
      ``load_from`` gave the whole backbone (:class:`swin_mm.openmmlab.loading.CompleteBackboneHook`);
    * the dataloaders: see :func:`configure_dataloaders`.

    Args:
        cfg: the config, changed in place. Custom loops and backends are kept.
    """
    train_cfg = cfg.train_cfg
    by_epoch = train_cfg.pop('by_epoch', None)
    kind = train_cfg.get('type') or ('EpochBasedTrainLoop' if by_epoch else 'IterBasedTrainLoop')
    kind = getattr(kind, '__name__', kind)
    train_cfg.type = LOOPS.get(str(kind).rpartition('.')[2], kind)
    if train_cfg.type in LOOPS.values():
        train_cfg.pop('_scope_', None)  # the type has its full path

    hooks = cfg.setdefault('default_hooks', {})
    checkpoint = hooks.setdefault('checkpoint', dict(type='CheckpointHook', interval=1))
    if checkpoint is not None and not (checkpoint.get('backend_args') or checkpoint.get('file_client_args')):
        checkpoint['backend_args'] = dict(backend='swin_mm')

    named = [str(hook.get('type')) for hook in cfg.get('custom_hooks') or []]
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), *(dict(type=hook) for hook in HOOKS if hook not in named)]
    configure_dataloaders(cfg, 'train', 'val')


def configure_dataloaders(cfg: Config, *parts: str) -> None:
    """Let data workers survive Ctrl-C and report full shared memory (:mod:`swin_mm.engine.dataloading`).

    Args:
        cfg: the config, changed in place; functions that it sets itself are kept.
        parts: of 'train', 'val' and 'test'.
    """
    for part in parts:
        loader = cfg.get(f'{part}_dataloader')
        if not isinstance(loader, dict) or not loader.get('num_workers'):
            continue
        if 'worker_init_fn' not in loader:
            loader['worker_init_fn'] = dict(type='swin_mm.engine.dataloading.start_worker')
            loader.pop('disable_subprocess_warning', None)  # an argument of mmengine's own function
        collate = loader.get('collate_fn', dict(type='pseudo_collate'))
        if isinstance(collate, dict) and collate.get('type') != COLLATE:
            loader['collate_fn'] = dict(type=COLLATE, collate=collate)


def join_on_cpu(cfg: Config) -> None:
    """Join the ranks that torchrun started and change ``cfg`` to suit; mmengine would look for a GPU of this rank."""
    if not is_distributed():
        init_process_group('gloo')
    unused = cfg.get('find_unused_parameters', False)
    cfg.setdefault('model_wrapper_cfg', dict(broadcast_buffers=False, find_unused_parameters=unused))
    cfg.model_wrapper_cfg.device_ids = None
