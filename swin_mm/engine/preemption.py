"""Stopping a training run at any time without losing it, and resuming it as if it had never stopped."""

import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from mmengine.dist import all_reduce, barrier, get_world_size, is_main_process
from mmengine.hooks import EMAHook, Hook
from mmengine.optim import OptimWrapper
from mmengine.runner import Runner

from swin_mm.engine.dataloading import seed_all
from swin_mm.openmmlab.loading import unwrap_model
from swin_mm.utils.errors import Stopped
from swin_mm.utils.files import atomic_write

FILENAME = 'interrupted.pth'
SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
_VALIDATED_AT = 'validated_at'  # key in the message hub, which checkpoints carry: the iteration of the last validation


class PreemptionHook(Hook):
    """On Ctrl-C, SIGTERM or SIGHUP finish the iteration, save a checkpoint for ``--resume``, and raise ``Stopped``.

    Stopping between iterations keeps the checkpoint consistent: an exception in the middle of a step would leave
    weights and optimizer of two different iterations. A second signal stops at once.
    """

    priority = 'LOWEST'  # after the hooks that step the schedules and save checkpoints

    def __init__(self) -> None:
        self._signal = 0  # that this process received
        self._agreed = 0  # that any process had received when all asked
        self._stopping: dict[str, int] = {}
        self._previous: dict[int, Any] = {}

    def before_train(self, runner: Runner) -> None:
        """Install the signal handlers. If the checkpoint to resume was saved before a validation, run that first."""
        self._process = os.getpid()
        for number in SIGNALS:
            if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # nohup ignores SIGHUP
                self._previous[number] = signal.signal(number, self._receive)
        due = getattr(runner.train_loop, 'validation_is_due', lambda: False)
        if runner.iter and due() and runner.message_hub.runtime_info.get(_VALIDATED_AT) != runner.iter:
            runner.logger.info('validating first: the interrupted run may not have finished this validation')
            runner.val_loop.run()

    def after_train(self, runner: Runner) -> None:
        """Restore the signal handlers."""
        self.restore_handlers()

    def restore_handlers(self) -> None:
        """Restore the signal handlers that were set before training."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous = {}

    def after_train_iter(self, runner: Runner, **_: Any) -> None:
        """Stop here after a signal, but not between accumulated gradients. The loop counts this iteration later."""
        if self._asked_anywhere() and runner.optim_wrapper.should_update():
            self.stop(runner, runner.iter + 1)

    def after_val_iter(self, runner: Runner, **_: Any) -> None:
        """Stop within a validation; the resumed run repeats it."""
        if self._asked_anywhere():
            for hook in runner.hooks:
                if isinstance(hook, EMAHook):
                    hook.after_val_epoch(runner)  # it has swapped the weights for the averaged ones
            self.stop(runner, runner.iter)

    def train(self, runner: Runner) -> None:
        """Call ``runner.train()``, and stop with a checkpoint if a signal has ended a data worker."""
        try:
            runner.train()
        except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
            # The signal may have ended the data workers while the loop, between two iterations, waited for one. PyTorch
            # says so, unless it finds the worker still dying: then the connection to it is what breaks.
            if not self._signal or (isinstance(error, RuntimeError) and 'DataLoader worker' not in str(error)):
                raise
            self.stop(runner, runner.iter)
        finally:
            self.restore_handlers()

    def stop(self, runner: Runner, iteration: int) -> None:
        """Save a checkpoint after ``iteration`` iterations and raise ``Stopped``."""
        path = Path(runner.work_dir, FILENAME)
        self._stopping = {'epoch': runner.epoch, 'iter': iteration}
        runner.save_checkpoint(runner.work_dir, FILENAME, backend_args={'backend': 'swin_mm'})
        if is_main_process():
            with atomic_write(path.with_name('last_checkpoint')) as file:
                file.write_text(str(path))
        barrier()  # launchers end the job as soon as the first rank has ended
        raise Stopped(
            f'stopped at iteration {iteration} and saved {path}; to continue, run the same command with --resume',
            self._agreed or self._signal,
        )

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Store where it stopped; runners assume the end of an iteration or an epoch."""
        checkpoint['meta'].update(self._stopping)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a data worker, forked with this handler: the trainer needs it until the iteration is over
        if self._signal:
            raise KeyboardInterrupt
        self._signal = number
        # SIGTERM, sent to every process, does end the workers; torch would raise for that in the middle of a step.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # Not print: the signal may have come in the middle of one.
        os.write(2, b'\nstopping after this iteration, with a checkpoint; Ctrl-C again stops at once\n')

    def _asked_anywhere(self) -> bool:
        """Whether any rank has received a signal. All stop at the same iteration, or some would hang."""
        asked = torch.tensor(self._signal)
        all_reduce(asked, 'max')  # a signal that comes while this waits counts from the next iteration on
        self._agreed = int(asked)
        return bool(self._agreed)


class ExactResumeHook(Hook):
    """Makes a resumed run equal to an uninterrupted one, together with the loops of ``swin_mm.engine.loops``.

    * Every iteration seeds the random generators from the run's seed and its number, so that dropout and stochastic
      depth do not depend on what was drawn before.
    * A checkpoint saved between accumulated gradients carries them (one process only).
    """

    priority = 'VERY_HIGH'

    def __init__(self) -> None:
        self._gradients: dict[str, torch.Tensor] = {}

    def before_train_iter(self, runner: Runner, **_: Any) -> None:
        """Seed the generators for this iteration."""
        seed_all(runner.seed, runner.iter, 0)

    def after_val_epoch(self, runner: Runner, **_: Any) -> None:
        """Note in the message hub that this validation is complete."""
        runner.message_hub.update_info(_VALIDATED_AT, runner.iter)

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Store gradients that no step has used yet."""
        wrapper = runner.optim_wrapper
        if get_world_size() == 1 and isinstance(wrapper, OptimWrapper) and not wrapper.should_update():
            gradients = {
                name: p.grad for name, p in unwrap_model(runner.model).named_parameters() if p.grad is not None
            }
            checkpoint['gradients'] = {name: gradient.cpu() for name, gradient in gradients.items()}

    def after_load_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Keep the stored gradients until training begins."""
        self._gradients = checkpoint.get('gradients') or {}

    def before_train(self, runner: Runner) -> None:
        """Restore the stored gradients."""
        if not runner.iter:
            return
        for name, parameter in unwrap_model(runner.model).named_parameters():
            if name in self._gradients:
                parameter.grad = self._gradients[name].to(parameter.device)
        self._gradients = {}
