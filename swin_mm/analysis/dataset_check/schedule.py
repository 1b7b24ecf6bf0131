"""Whether the learning rate's warm-up suits the length of the run."""

import math
from typing import Any

from mmengine.config import Config

from swin_mm.openmmlab.config import type_name


def long_warmup(cfg: Config, images: int) -> str | None:
    """What to change if the warm-up takes more than a tenth of the training, on one GPU; None if it does not.

    Args:
        cfg: The config.
        images: Training images per epoch.
    """
    per_epoch = max(1, math.ceil(images / _batch_size(cfg)))
    run = _iterations(cfg, per_epoch)
    schedulers = cfg.get('param_scheduler') or []
    for index, scheduler in enumerate(schedulers if isinstance(schedulers, (list, tuple)) else [schedulers]):
        if type_name(scheduler) not in ('LinearLR', 'ConstantLR') or scheduler.get('begin', 0) > 0:
            continue
        # Without `end` it lasts for the whole run; a rate that falls is no warm-up.
        if 'end' not in scheduler or scheduler.get('start_factor', scheduler.get('factor', 1 / 3)) >= 1:
            continue
        warmup = scheduler['end'] * (per_epoch if scheduler.get('by_epoch', True) else 1)
        if run and warmup > run / 10:
            length = f'{run:,} iterations' + (f', {per_epoch:,} per epoch' if 'max_epochs' in cfg.train_cfg else '')
            end = max(1, run // 10 // (per_epoch if scheduler.get('by_epoch', True) else 1))
            what = f'the warm-up takes {warmup:,} iterations, more than a tenth of the training ({length}, on one GPU)'
            return f'{what}; set param_scheduler.{index}.end={end}, or train for longer'
    return None


def epoch_length(dataset: Any, sizes: list[int]) -> int:
    """Samples per epoch of a dataset with its wrappers; ``sizes`` of the datasets inside are used up in order."""
    if inside := dataset.get('datasets'):
        return sum(epoch_length(one, sizes) for one in inside)
    if 'dataset' in dataset:
        return dataset.get('times', 1) * epoch_length(dataset['dataset'], sizes)
    return sizes.pop(0)


def _batch_size(cfg: Config) -> int:
    return max(1, cfg.train_dataloader.get('batch_size') or 1)


def _iterations(cfg: Config, per_epoch: int) -> int:
    """Iterations of the training; 0 if the config does not say."""
    loop = cfg.get('train_cfg') or {}
    return loop.get('max_iters') or (loop.get('max_epochs') or 0) * per_epoch
