"""Whether the learning rate's warm-up suits the length of a run."""

from mmengine.config import Config

from swin_mm.openmmlab.config import type_name


def long_warmup(cfg: Config, iterations: int, per_epoch: int) -> str | None:
    """What to change if the warm-up takes more than a tenth of the training; None if it does not.

    Args:
        cfg: the config.
        iterations: of the whole training.
        per_epoch: iterations per epoch.
    """
    schedulers = cfg.get('param_scheduler') or []
    single = not isinstance(schedulers, (list, tuple))
    for index, scheduler in enumerate([schedulers] if single else schedulers):
        if type_name(scheduler) not in ('LinearLR', 'ConstantLR') or scheduler.get('begin', 0) > 0:
            continue
        # Without `end` it lasts for the whole run; a rate that falls is no warm-up.
        if 'end' not in scheduler or scheduler.get('start_factor', scheduler.get('factor', 1 / 3)) >= 1:
            continue
        unit = per_epoch if scheduler.get('by_epoch', True) else 1
        warmup = min(scheduler['end'] * unit, iterations)
        if warmup > iterations / 10:
            key = 'param_scheduler.end' if single else f'param_scheduler.{index}.end'
            end = iterations // 10 // unit
            # mmengine's LinearLR over a single step never leaves its start.
            remedy = f'set {key}={end}' if end * unit > 1 else 'remove it'
            return (
                f'the warm-up of the learning rate takes {warmup} of {iterations} iterations, more than a tenth of the '
                f'run; {remedy}, or train for longer'
            )
    return None
