"""Training loops on a stand-in of the runner."""

import logging
from types import SimpleNamespace

import mmengine.runner.loops
import pytest
from mmengine.dataset import InfiniteSampler
from torch.utils.data import BatchSampler, DataLoader

from swin_mm.engine.loops import ResumableIterLoop


class Data(list):
    """Numbers that note when they are loaded."""

    metainfo = None

    def __getitem__(self, index):
        self.loaded.append(index)
        return super().__getitem__(index)


class OddBatches(BatchSampler):
    """Batches of a library's own: how many samples they take is unknown."""


def make_loop(batches, max_iters=5, **options):
    data = Data(range(12))
    data.loaded = []
    trained, hooks = [], []
    model = SimpleNamespace(train=lambda: None, train_step=lambda batch, optim_wrapper: trained.append(batch.tolist()))
    runner = SimpleNamespace(
        seed=0,
        cfg={},
        model=model,
        optim_wrapper=None,
        val_loop=None,
        logger=logging.getLogger('test'),
        call_hook=lambda name, **_: hooks.append(name),
    )
    runner.visualizer = SimpleNamespace()
    sampler = InfiniteSampler(data, shuffle=False)
    loader = DataLoader(data, batch_sampler=batches(sampler, 2, False))
    return ResumableIterLoop(runner, loader, max_iters, **options), data, trained, hooks


@pytest.mark.parametrize('batches', [BatchSampler, OddBatches])
def test_a_resumed_run_continues_with_the_next_batch(batches):
    loop, data, trained, hooks = make_loop(batches)
    loop._iter = 3
    loop.run()
    assert trained == [[6, 7], [8, 9]]
    # mmengine 0.10.7 loads the batches that it skips.
    assert data.loaded == [6, 7, 8, 9]
    assert (hooks[0], hooks[-1]) == ('before_train', 'after_train')


def test_validation_follows_every_interval_and_the_last_iteration():
    loop, _, trained, _ = make_loop(BatchSampler, val_interval=2)
    validated = []
    loop.runner.val_loop = SimpleNamespace(run=lambda: validated.append(len(trained)))
    loop.run()
    assert validated == [2, 4, 5]


def test_the_sampler_is_not_started_before_the_run(monkeypatch):
    """The original mmengine starts the workers when a loop is built, and an InfiniteSampler starts only once."""
    monkeypatch.setattr(mmengine.runner.loops, '_InfiniteDataloaderIterator', lambda loader: next(iter(loader), None))
    loop, data, trained, _ = make_loop(BatchSampler, max_iters=2)
    assert data.loaded == []
    loop.run()
    assert trained == [[0, 1], [2, 3]]
