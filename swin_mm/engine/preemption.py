"""Ending a training run at any time without losing it."""

import os
import signal
from pathlib import Path
from types import FrameType
from typing import Any, ClassVar

import torch
from mmengine.dist import all_reduce, barrier, is_main_process
from mmengine.fileio import LocalBackend, register_backend
from mmengine.hooks import Hook
from mmengine.registry import LOOPS
from mmengine.runner import EpochBasedTrainLoop, Runner, find_latest_checkpoint

from swin_mm.utils.errors import Stopped

FILENAME = 'interrupted.pth'
_DONE = 'batches_done'  # where the message hub, which checkpoints carry, keeps how far the epoch is


class InterruptHook(Hook):
    """On Ctrl-C or SIGTERM finish the iteration, save a checkpoint for ``--resume``, and raise ``Stopped``.

    Stopping between iterations is what makes the checkpoint whole: an exception out of the middle of a step would
    leave weights and optimizer of two different iterations. A second signal stops at once.
    """

    priority = 'LOWEST'  # after the hooks that step the schedules and save checkpoints

    def __init__(self) -> None:
        self._signal = 0  # that this process received
        self._agreed = 0  # that any process had received when all asked
        self._stopping: dict[str, int] = {}
        self._previous: dict[int, Any] = {}

    def before_train(self, runner: Runner) -> None:
        """Begin to listen."""
        self._process = os.getpid()
        self._previous = {number: signal.signal(number, self._receive) for number in (signal.SIGINT, signal.SIGTERM)}

    def after_train(self, runner: Runner) -> None:
        """Let signals do what they did before."""
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def after_train_iter(self, runner: Runner, **_: Any) -> None:
        """Stop here if asked to, but not amid accumulated gradients; the loop counts this iteration after its hooks."""
        if self._asked_anywhere() and runner.optim_wrapper.should_update():
            self.stop(runner, runner.iter + 1)

    def after_val_iter(self, runner: Runner, **_: Any) -> None:
        """Stop within a validation; the next run goes on with the training behind it."""
        if self._asked_anywhere():
            self.stop(runner, runner.iter)

    def train(self, runner: Runner) -> None:
        """Call ``runner.train()`` under the protection of this hook."""
        runner.register_hook(self)
        try:
            runner.train()
        except (RuntimeError, ConnectionError, EOFError, FileNotFoundError) as error:
            # The signal may have ended the data workers while the loop, between two iterations, waited for one. PyTorch
            # says so, unless it finds the worker still dying: then the connection to it is what breaks.
            if not self._signal or (isinstance(error, RuntimeError) and 'DataLoader worker' not in str(error)):
                raise
            self.stop(runner, runner.iter)

    def stop(self, runner: Runner, iteration: int) -> None:
        """Save a checkpoint after ``iteration`` iterations and raise ``Stopped``."""
        path = Path(runner.work_dir, FILENAME)
        self._stopping = {'epoch': runner.epoch, 'iter': iteration}
        runner.save_checkpoint(runner.work_dir, FILENAME)
        if is_main_process():
            WholeFiles().put(str(path).encode(), path.with_name('last_checkpoint'))
        barrier()  # launchers end the job as soon as the first rank has ended
        raise Stopped(
            f'stopped at iteration {iteration} and saved {path}; to go on, run the same command with --resume',
            self._agreed or self._signal,
        )

    def before_save_checkpoint(self, runner: Runner, checkpoint: dict[str, Any]) -> None:
        """Say where it stopped; runners assume the end of an iteration or an epoch."""
        checkpoint['meta'].update(self._stopping)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:
            return  # a data worker, forked with this handler: the trainer needs it until the iteration is over
        if self._signal:
            raise KeyboardInterrupt
        self._signal = number
        # SIGTERM, sent to the whole group, does end the workers; torch would raise for that in the middle of a step.
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        # Not print: the signal may have come in the middle of one.
        os.write(2, b'\nstopping after this iteration, with a checkpoint; Ctrl-C again stops at once\n')

    def _asked_anywhere(self) -> bool:
        """All ranks stop at the same iteration, or those that go on would wait for the others for ever."""
        asked = torch.tensor(self._signal)
        all_reduce(asked, 'max')  # while this waits a signal may come, which counts from the next iteration on
        self._agreed = int(asked)
        return bool(self._agreed)


class ContinuedEpochLoop(EpochBasedTrainLoop):
    """mmengine's loop, which begins an interrupted epoch anew; this one goes on behind the batches already trained on.

    The batches are passed over in the order of the interrupted run, since the sampler has its seed.
    """

    def run_epoch(self) -> None:
        """Train one epoch, or the rest of one."""
        hub, total = self.runner.message_hub, len(self.dataloader)
        done, then = hub.runtime_info.get(_DONE, (0, total))
        if then != total:
            done = 0  # other data or another number of GPUs: what had been seen cannot be told
        if done:
            self.runner.logger.info(f'passing over the {done} of {total} batches that were trained on')
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        for index, batch in enumerate(self.dataloader):
            if index >= done:
                hub.update_info(_DONE, (index + 1, total))  # for every checkpoint that is saved behind this iteration
                self.run_iter(index, batch)
        hub.update_info(_DONE, (0, total))
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1


class WholeFiles(LocalBackend):
    """Files are there whole or not at all, and what is to be removed stays until the next one is there.

    mmengine writes checkpoints in place, and deletes those that ``max_keep_ckpts`` has no room for beforehand.
    """

    _doomed: ClassVar[set[str]] = set()

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write a file."""
        half = Path(f'{filepath}.half')  # one name, so that what a killed run leaves is overwritten by the next
        super().put(obj, half)
        with half.open() as file:
            os.fsync(file.fileno())  # for the case that the machine goes down
        half.replace(filepath)
        for path in self._doomed - {str(filepath)}:
            super().remove(path)
        self._doomed.clear()

    def remove(self, filepath: str | Path) -> None:
        """Remove a file after the next ``put``."""
        self._doomed.add(str(filepath))


def last_checkpoint(work_dir: str) -> str | None:
    """The checkpoint to go on from, if there is one."""
    named = find_latest_checkpoint(work_dir)
    if named is None or '://' in named or os.path.exists(named):
        return named
    # The run was killed while it wrote the name, or before it did. The best ones have no optimizer.
    found = [path for path in Path(work_dir).glob('*.pth') if not path.name.startswith('best_')]
    return str(max(found, key=os.path.getmtime)) if found else None


def install() -> None:
    """Let every config that names mmengine's EpochBasedTrainLoop have ours, and every checkpoint be written whole."""
    LOOPS.register_module(name='EpochBasedTrainLoop', module=ContinuedEpochLoop, force=True)
    register_backend('local', WholeFiles, force=True, prefixes='')
    # Signals to the whole group, of Ctrl-C and torchrun, then spare the data workers: ranks that are to finish an
    # iteration together need them all.
    os.register_at_fork(after_in_child=os.setpgrp)
