"""Dataloaders whose batches depend only on the seed and the iteration, so that a run can be resumed anywhere.

mmengine seeds the data workers once, so a sample's augmentation depends on all samples before it. Here every sample
has its own seed, derived from the run's seed, the rank, the iteration and the position in the batch. A resumed run
therefore needs no saved random state, skips batches without loading them, and may use another number of workers.
"""

import os
import pickle
import random
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import mmengine.dataset  # noqa: F401 (registers pseudo_collate)
import numpy as np
import torch
from mmengine.registry import FUNCTIONS
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from swin_mm.utils.errors import InputError, one_line


def seed_all(*numbers: int) -> None:
    """Seed the random generators of Python, numpy and torch (all devices) with a hash of ``numbers``."""
    words = _hash(numbers)
    _seed_cpu(words)
    torch.manual_seed(int(words[0]))


@contextmanager
def seeded(*numbers: int) -> Iterator[None]:
    """Context in which the CPU's random generators are seeded with a hash of ``numbers``; restores them afterwards."""
    states = random.getstate(), np.random.get_state(), torch.get_rng_state()
    _seed_cpu(_hash(numbers))
    try:
        yield
    finally:
        random.setstate(states[0])
        np.random.set_state(states[1])
        torch.set_rng_state(states[2])


def _hash(numbers: Sequence[int]) -> np.ndarray:
    return np.random.SeedSequence(numbers).generate_state(4)


def _seed_cpu(words: np.ndarray) -> None:
    random.seed(words.tobytes())
    np.random.seed(words)
    torch.default_generator.manual_seed(int(words[0]))


class SampleErrorDataset(Dataset):
    """Wraps a dataset so that the error for a sample that cannot be loaded names its file.

    Args:
        dataset: any map-style dataset; its attributes are forwarded.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        """The sample of an index.

        Raises:
            InputError: the sample cannot be loaded.
        """
        try:
            return self.dataset[index]
        except InputError:
            raise
        except Exception as error:  # decoders and transforms raise many kinds
            raise InputError(f'{self._name(index)} cannot be loaded: {_describe(error)}') from error

    def _name(self, index: int) -> str:
        try:
            info = self.dataset.get_data_info(index)
        except Exception:  # not one of mmengine's datasets
            return f'sample {index} of {type(self.dataset).__name__}'
        paths = [info[key] for key in ('img_path', 'seg_map_path') if info.get(key)]
        return ' with '.join(map(str, paths)) or f'sample {index} of {type(self.dataset).__name__}'

    def __getattr__(self, name: str) -> Any:
        if name.startswith('__') or 'dataset' not in self.__dict__:
            raise AttributeError(name)
        return getattr(self.dataset, name)


def _describe(error: Exception) -> str:
    return f'{one_line(error)} ({type(error).__name__})' if str(error) else type(error).__name__


class SeededDataset(SampleErrorDataset):
    """Wraps a dataset so that every sample is loaded and augmented with its own random seed.

    Args:
        dataset: any map-style dataset; its attributes are forwarded.
        seed: the run's seed and the rank.
    """

    def __init__(self, dataset: Any, seed: tuple[int, ...]) -> None:
        super().__init__(dataset)
        self.seed = seed

    def __getitem__(self, key: Any) -> Any:
        """The sample at an index, or at (index, iteration, position in the batch) from :class:`NumberedBatches`."""
        if not isinstance(key, tuple):
            return super().__getitem__(key)
        index, iteration, place = key
        with seeded(*self.seed, iteration, place + 1):  # 0 is the training step, see preemption.ExactResumeHook
            return super().__getitem__(index)


class NumberedBatches:
    """A batch sampler that adds the iteration to every index, and can start anywhere.

    Args:
        batches: the batch sampler.
        endless: continue with the sampler's next epoch at its end.
    """

    def __init__(self, batches: Any, endless: bool = False) -> None:
        self.batches = batches
        self.sampler: Any = getattr(batches, 'sampler', None)  # mmengine sets its epoch
        self.batch_size = getattr(batches, 'batch_size', None)  # and reads this
        self.endless = endless
        self.start_at(0)

    def start_at(self, iteration: int, skip: int = 0) -> None:
        """Let the next pass begin with ``iteration``, after the first ``skip`` batches."""
        self.iteration = iteration
        self.skip = skip

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[tuple[int, int, int]]]:
        stream = self._stream()
        for _ in range(self.skip):
            next(stream, None)
        self.skip = 0
        for batch in stream:
            yield [(index, self.iteration, place) for place, index in enumerate(batch)]
            self.iteration += 1

    def _stream(self) -> Iterator[Sequence[int]]:
        epoch = 0
        while True:
            batch = None
            for batch in self.batches:
                yield batch
            if not self.endless or batch is None:
                return
            epoch += 1
            if hasattr(self.sampler, 'set_epoch'):
                self.sampler.set_epoch(epoch)


def resumable(loader: DataLoader, seed: tuple[int, ...], endless: bool = False) -> DataLoader:
    """A dataloader like ``loader`` with a :class:`SeededDataset` and :class:`NumberedBatches`.

    Args:
        loader: the dataloader; without a batch sampler (iterable datasets) it is returned as it is.
        seed: the run's seed and the rank.
        endless: see :class:`NumberedBatches`.
    """
    if loader.batch_sampler is None:
        return loader
    return _rebuilt(loader, SeededDataset(loader.dataset, seed), NumberedBatches(loader.batch_sampler, endless))


def with_sample_errors(loader: DataLoader) -> DataLoader:
    """A dataloader like ``loader`` with a :class:`SampleErrorDataset`."""
    if loader.batch_sampler is None or isinstance(loader.dataset, SampleErrorDataset):
        return loader
    return _rebuilt(loader, SampleErrorDataset(loader.dataset), loader.batch_sampler)


def _rebuilt(loader: DataLoader, dataset: Dataset, batch_sampler: Any) -> DataLoader:
    """A new dataloader with the options of an existing one, which torch does not allow to be changed."""
    workers = {}
    if loader.num_workers:
        workers = {
            'prefetch_factor': loader.prefetch_factor,
            'persistent_workers': loader.persistent_workers,
            'multiprocessing_context': loader.multiprocessing_context,
        }
    return DataLoader(
        dataset,
        batch_sampler=batch_sampler,
        num_workers=loader.num_workers,
        collate_fn=loader.collate_fn,
        pin_memory=loader.pin_memory,
        timeout=loader.timeout,
        worker_init_fn=loader.worker_init_fn,
        generator=loader.generator,
        **workers,
    )


def start_worker(_: int) -> None:
    """Take a data worker out of the process group.

    Ctrl-C and torchrun send signals to the whole group. The workers must not receive them, because all ranks have to
    finish the current iteration.
    """
    os.setpgrp()


def collate_shared(samples: Sequence[Any], collate: dict[str, Any]) -> Any:
    """Collate samples, and in a data worker move the tensors to shared memory.

    PyTorch moves them in a background thread, where an error (a full /dev/shm) is printed and the batch lost, so that
    training waits forever. An error here reaches the training process.

    Args:
        samples: of the dataset.
        collate: the collate function, ``dict(type=...)`` with its arguments.
    """
    options = dict(collate)
    kind = options.pop('type')
    function: Callable = FUNCTIONS.get(kind) if isinstance(kind, str) else kind
    batch = function(samples, **options)
    if torch.utils.data.get_worker_info() is not None:
        _TensorSharer(_Nowhere()).dump(batch)
    return batch


class _Nowhere:
    """A file that discards what is written to it."""

    def write(self, data: bytes) -> int:
        return len(data)


class _TensorSharer(pickle.Pickler):
    """Moves all tensors in nested objects to shared memory; pickling serves only to find them."""

    def reducer_override(self, obj: Any) -> Any:
        if isinstance(obj, Tensor):
            if obj.device.type == 'cpu' and obj.layout == torch.strided:
                obj.share_memory_()
            return int, ()
        if isinstance(obj, np.ndarray) and obj.dtype != object:
            return int, ()
        return NotImplemented
