"""mmengine's training loops, which resume at the batch where the interrupted run stopped."""

from collections.abc import Iterator
from typing import Any

from mmengine.dist import get_rank
from mmengine.runner import EpochBasedTrainLoop, IterBasedTrainLoop, Runner
from torch import nn
from torch.utils.data import DataLoader

from swin_mm.engine.dataloading import resumable

BATCHES_DONE = 'batches_done'  # key in the message hub, which checkpoints carry: (batches of this epoch, all of them)


class ResumableEpochLoop(EpochBasedTrainLoop):
    """Epoch-based loop that resumes an interrupted epoch after its last batch; mmengine would start it over."""

    def __init__(self, runner: Runner, dataloader: DataLoader | dict, max_epochs: int, **options: Any) -> None:
        super().__init__(runner, _build(runner, dataloader, endless=False), max_epochs, **options)

    def run_epoch(self) -> None:
        """Train one epoch, or the rest of one."""
        hub, total = self.runner.message_hub, len(self.dataloader)
        done, of = hub.runtime_info.get(BATCHES_DONE, (0, total))
        if of != total:
            if done:
                self.runner.logger.warning(
                    f'the checkpoint is from batch {done} of {of} of its epoch and now there are {total}: other data, '
                    'batch size or number of GPUs; the epoch starts over'
                )
            done = 0
        if done:
            self.runner.logger.info(f'skipping {done} of {total} batches of this epoch, which were trained on')
        self.runner.call_hook('before_train_epoch')
        self.runner.model.train()
        if hasattr(self.dataloader.batch_sampler, 'start_at'):
            self.dataloader.batch_sampler.start_at(self._iter, skip=done)
        for index, batch in enumerate(self.dataloader, start=done):
            hub.update_info(BATCHES_DONE, (index + 1, total))  # for checkpoints saved after this iteration
            self.run_iter(index, batch)
        hub.update_info(BATCHES_DONE, (0, total))
        self.runner.call_hook('after_train_epoch')
        self._epoch += 1

    def validation_is_due(self) -> bool:
        """Whether a validation follows the last epoch."""
        if self.runner.val_loop is None or self.runner.message_hub.runtime_info.get(BATCHES_DONE, (0, 0))[0]:
            return False
        self._decide_current_val_interval()
        last = self._epoch == self._max_epochs
        return self._epoch >= self.val_begin and (self._epoch % self.val_interval == 0 or last)


class ResumableIterLoop(IterBasedTrainLoop):
    """Iteration-based loop that resumes with the batch that would have come next in the interrupted run."""

    def __init__(self, runner: Runner, dataloader: DataLoader | dict, max_iters: int, **options: Any) -> None:
        loader = _build(runner, dataloader, endless=True)
        can_skip = hasattr(loader.batch_sampler, 'start_at')
        super().__init__(runner, _Unstarted(loader) if can_skip else loader, max_iters, **options)
        if can_skip:
            self.dataloader, self.dataloader_iterator = loader, _Batches(loader)

    def run(self) -> nn.Module:
        """Train, as mmengine's loop does, except that a resumed run skips batches without loading them.

        mmengine 0.10.7, the last original one, loads and drops every batch that was trained on.
        """
        self.runner.call_hook('before_train')
        self.runner.call_hook('before_train_epoch')  # the whole run is one epoch
        if self._iter > 0:
            self.runner.logger.info(f'skipping {self._iter} batches, which were trained on')
            skip = getattr(self.dataloader_iterator, 'skip_iter', None)
            if skip is not None:
                skip(self._iter)
            else:
                for _ in range(self._iter):
                    next(self.dataloader_iterator)
        while self._iter < self._max_iters and not self.stop_training:
            self.runner.model.train()
            self.run_iter(next(self.dataloader_iterator))
            if self.validation_is_due():
                self.runner.val_loop.run()
        self.runner.call_hook('after_train_epoch')
        self.runner.call_hook('after_train')
        return self.runner.model

    def validation_is_due(self) -> bool:
        """Whether a validation follows the last iteration."""
        if self.runner.val_loop is None:
            return False
        self._decide_current_val_interval()
        last = self._iter == self._max_iters
        return self._iter >= self.val_begin and (self._iter % self.val_interval == 0 or last)


class _Unstarted:
    """Stands for a dataloader while mmengine's loop is built.

    The original mmengine starts the dataloader's workers then, and an ``InfiniteSampler`` starts only once.
    """

    def __init__(self, loader: DataLoader) -> None:
        self.dataset = loader.dataset

    def __iter__(self) -> Iterator:
        return iter(())


class _Batches:
    """Iterates over an endless dataloader."""

    def __init__(self, loader: DataLoader) -> None:
        self.loader = loader
        self.iterator: Any = None

    def skip_iter(self, number: int) -> None:
        """Skip batches that were trained on, without loading them."""
        batches: Any = self.loader.batch_sampler
        batches.start_at(number, skip=number)

    def __next__(self) -> Any:
        if self.iterator is None:
            self.iterator = iter(self.loader)
        return next(self.iterator)


def _build(runner: Runner, dataloader: DataLoader | dict, endless: bool) -> DataLoader:
    if isinstance(dataloader, DataLoader):
        loader = dataloader
    else:
        differ = runner.cfg.get('randomness', {}).get('diff_rank_seed', False)
        # Samplers need the same seed on all ranks; with diff_rank_seed mmengine draws one that no checkpoint keeps.
        loader = runner.build_dataloader(dataloader, seed=runner.seed - get_rank() * differ)
    return resumable(loader, (runner.seed, get_rank()), endless)
