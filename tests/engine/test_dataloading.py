"""A sample depends on the seed and its position in the run, not on the workers or on earlier random numbers."""

import os
import random
import shutil
import signal
import subprocess
import sys

import numpy as np
import pytest
import torch
from mmengine.dataset import DefaultSampler, InfiniteSampler
from support.tool_fixtures import ROOT
from torch.utils.data import BatchSampler, DataLoader, Dataset

from swin_mm.engine.dataloading import NumberedBatches, resumable, seed_all, with_sample_errors
from swin_mm.utils.errors import InputError


class RandomSamples(Dataset):
    """Every sample consists of its index and a random number from each generator."""

    metainfo: dict = {'classes': ('a', 'b')}  # noqa: RUF012

    def __len__(self):
        return 7

    def __getitem__(self, index):
        return index, random.random(), np.random.rand(), torch.rand(()).item()

    def get_data_info(self, index):
        return {'img_path': f'{index}.jpg', 'seg_map_path': f'{index}.png'}


class Failing(RandomSamples):
    def __getitem__(self, index):
        raise AttributeError("'NoneType' object has no attribute 'shape'")


def loader(dataset=None, workers=0, sampler=InfiniteSampler, **options):
    dataset = dataset or RandomSamples()
    options |= {'multiprocessing_context': 'fork'} if workers else {}
    return DataLoader(dataset, 2, sampler=sampler(dataset, seed=1), num_workers=workers, collate_fn=list, **options)


def batches(count, start=0, **options):
    made = resumable(loader(**options), (5, 0), endless=True)
    made.batch_sampler.start_at(start, skip=start)
    stream = iter(made)
    return [next(stream) for _ in range(count)]


@pytest.mark.parametrize('sampler', [InfiniteSampler, DefaultSampler])
def test_batches_are_the_same_after_a_skip_and_with_other_workers(sampler):
    whole = batches(9, sampler=sampler)
    np.random.seed(77)  # the state of the process does not matter
    assert batches(9, sampler=sampler) == whole
    assert batches(4, start=5, sampler=sampler) == whole[5:]
    assert batches(9, sampler=sampler, workers=2) == whole
    assert batches(3, start=6, sampler=sampler, workers=1) == whole[6:]
    numbers = {number for batch in whole for sample in batch for number in sample[1:]}
    assert len(numbers) == 3 * sum(map(len, whole)), 'no two samples draw the same'


def test_skipped_samples_are_not_loaded():
    loaded = []

    class Counting(RandomSamples):
        def __getitem__(self, index):
            loaded.append(index)
            return super().__getitem__(index)

    batches(1, start=50, dataset=Counting())
    assert len(loaded) == 2


def test_ranks_have_different_random_numbers():
    first, second = (next(iter(resumable(loader(), (5, rank)))) for rank in (0, 1))
    assert [sample[0] for sample in first] == [sample[0] for sample in second] and first != second


def test_loading_does_not_change_the_random_state_of_the_process():
    seed_all(3, 4)
    expected = random.random(), np.random.rand(), torch.rand(())
    seed_all(3, 4)
    resumable(loader(), (5, 0)).dataset[(0, 0, 0)]
    assert (random.random(), np.random.rand(), torch.rand(())) == expected


def test_wrappers_forward_attributes_of_the_dataset():
    made = resumable(with_sample_errors(loader(sampler=DefaultSampler)), (5, 0))
    assert made.dataset.metainfo['classes'] == ('a', 'b') and len(made.dataset) == 7 and len(made) == 4
    assert not hasattr(made.dataset, '__getitems__'), 'torch would fetch samples without seeding them'
    assert isinstance(made.batch_sampler.sampler, DefaultSampler), 'where mmengine sets the epoch'


def test_an_epoch_ends_and_the_next_begins_from_the_sampler():
    dataset = RandomSamples()
    numbered = NumberedBatches(BatchSampler(DefaultSampler(dataset, seed=1), 2, drop_last=False))
    first = list(numbered)
    assert [key[1:] for batch in first for key in batch] == [(0, 0), (0, 1), (1, 0), (1, 1), (2, 0), (2, 1), (3, 0)]
    numbered.sampler.set_epoch(1)
    assert [key[0] for batch in numbered for key in batch] != [key[0] for batch in first for key in batch]


@pytest.mark.parametrize('workers', [0, 1])
def test_a_sample_that_cannot_be_loaded_is_named(workers):
    made = with_sample_errors(loader(Failing(), workers))
    with pytest.raises(InputError, match=r"\d.jpg with \d.png cannot be loaded: 'NoneType' .* \(AttributeError\)"):
        next(iter(made))


FULL = """
import sys, torch
from torch.utils.data import DataLoader
from swin_mm.engine.dataloading import collate_shared
from functools import partial

collate = partial(collate_shared, collate=dict(type='pseudo_collate'))
data = [dict(inputs=torch.zeros(1_000_000)) for _ in range(8)]
loader = DataLoader(data, 2, num_workers=1, collate_fn=collate if sys.argv[1] == 'ours' else list)
try:
    for batch in loader:
        pass
except RuntimeError as error:
    print('refused:', error, error.__cause__)
"""


@pytest.mark.skipif(shutil.which('unshare') is None or os.getuid() != 0, reason='needs a /dev/shm of its own')
def test_full_shared_memory_raises_instead_of_hanging():
    def run(kind, seconds):
        script = f'mount -t tmpfs -o size=1m tmpfs /dev/shm && exec "$0" -c "$1" {kind}'
        return subprocess.run(
            ['unshare', '-m', 'sh', '-c', script, sys.executable, FULL],
            cwd=ROOT,
            env=os.environ | {'PYTHONPATH': str(ROOT)},
            text=True,
            capture_output=True,
            timeout=seconds,
            check=False,
        )

    done = run('ours', 60)
    if 'mount' in done.stderr or 'unshare' in done.stderr:
        pytest.skip('mounting is not permitted here')
    assert 'refused:' in done.stdout and 'shared memory' in done.stdout, done.stdout + done.stderr


def test_signals_to_the_process_group_do_not_reach_workers():
    class Group(RandomSamples):
        def __getitem__(self, index):
            return os.getpgrp()

    from swin_mm.engine.dataloading import start_worker

    (group,) = next(iter(DataLoader(Group(), num_workers=1, collate_fn=list, worker_init_fn=start_worker)))
    assert group != os.getpgrp() and signal.getsignal(signal.SIGINT)
