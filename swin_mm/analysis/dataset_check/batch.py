"""Running a few samples through the training pipeline and the model's data preprocessor."""

import copy
from collections.abc import Iterator
from typing import Any

import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, MODELS
from mmengine.runner import Runner, set_random_seed

from swin_mm.analysis.dataset_check.findings import PADDING, PIPELINE, Finding
from swin_mm.openmmlab.config import iter_dicts
from swin_mm.utils.errors import one_line

SAMPLES = 8  # at least, where there are so many
MOST_SAMPLES = 32


def contrasting(sizes: dict[int, tuple[int, int]], count: int) -> list[int]:
    """Choose images of the most different sizes, which are the most likely not to fit into one batch.

    Args:
        sizes: (width, height) by key.
        count: How many to choose.
    """
    keys = list(sizes)
    orders = [
        sorted(keys, key=lambda key: sizes[key][0] * sizes[key][1]),
        sorted(keys, key=lambda key: sizes[key][0] / sizes[key][1]),
    ]
    chosen = [order[end] for order in orders for end in (0, -1)] if keys else []
    return list(dict.fromkeys([*chosen, *keys]))[:count]


def sample_count(cfg: Config) -> int:
    """How many samples to run: a batch, or some batches if they are small."""
    return min(MOST_SAMPLES, max(SAMPLES, cfg.train_dataloader.get('batch_size') or 1))


class PipelineError(ValueError):
    """Why a batch cannot be made."""


def check_batches(cfg: Config, leaves: list[dict], dataset: dict) -> list[Finding]:
    """Load batches as training does, and report what fails.

    The random generators are seeded, so that two checks see the same augmentation.

    Args:
        cfg: The config.
        leaves: Configs of the datasets, restricted to the samples to use.
        dataset: The same with the wrappers around them.
    """
    set_random_seed(0)
    options = (cfg.get('model') or {}).get('data_preprocessor')
    images, pixels, total = [], 0, 0
    try:
        for batch in _batches(cfg, leaves, dataset):
            shapes = _shapes(batch)
            if options:
                height, width = _preprocess(cfg, options, batch, shapes)
                total += len(shapes) * height * width
            images += shapes
            pixels += sum(height * width for height, width in shapes)
    except PipelineError as error:
        return [Finding(PIPELINE, str(error))]
    if options and options.get('size') and pixels < total / 2:
        what = f'{1 - pixels / total:.0%} of the pixels in training batches are padding: images are {_distinct(images)}'
        advice = f'after the pipeline and are padded to model.data_preprocessor.size={options["size"]}'
        return [Finding(PADDING, f'{what} {advice}; enlarge the images (Resize), or make the crop and size smaller')]
    return []


def _batches(cfg: Config, leaves: list[dict], dataset: dict) -> Iterator[Any]:
    try:
        built = DATASETS.build(copy.deepcopy(dataset))
        built.full_init()
    except Exception as error:
        raise PipelineError(f'the training dataset cannot be built: {_message(error)}') from error
    # In this process, where errors keep their type, and in the order of the samples.
    loader = {key: value for key, value in cfg.train_dataloader.items() if key in ('batch_size', 'collate_fn')}
    loader.update(dataset=built, num_workers=0, sampler={'type': 'DefaultSampler', 'shuffle': False})
    try:
        yield from Runner.build_dataloader(loader)
    except Exception as error:
        raise PipelineError(_failing_step(leaves) or _in_words(error)) from error


def _shapes(batch: Any) -> list[tuple[int, int]]:
    """(height, width) of each image."""
    inputs = batch.get('inputs') if isinstance(batch, dict) else None
    return [(image.shape[-2], image.shape[-1]) for image in inputs] if isinstance(inputs, (list, torch.Tensor)) else []


def _preprocess(cfg: Config, options: dict, batch: Any, shapes: list[tuple[int, int]]) -> tuple[int, int]:
    """Make tensors of a batch as the model does; their height and width, zeros if it is not one tensor."""
    try:
        stacked = MODELS.build(copy.deepcopy(options))(batch, True)['inputs']
    except Exception as error:
        if 'equal size' in str(error) and shapes:
            raise PipelineError(_unequal_sizes(shapes, options, cfg)) from error
        raise PipelineError(_in_words(error, 'the data_preprocessor')) from error
    return (stacked.shape[-2], stacked.shape[-1]) if isinstance(stacked, torch.Tensor) else (0, 0)


def _unequal_sizes(shapes: list[tuple[int, int]], options: dict, cfg: Config) -> str:
    crops = [step['crop_size'] for step in iter_dicts(cfg.train_dataloader.dataset) if 'crop_size' in step]
    what = f'the images of a batch are {_distinct(shapes)} (height x width) after the pipeline'
    made_equal = f'model.data_preprocessor.size={options.get("size")} pads smaller ones alone'
    if crops:
        advice = f'the crop, crop_size={crops[0]}, does not fit: it should equal size, and images be resized to no less'
    else:
        advice = 'add a RandomCrop of that size, or resize to one size'
    return f'{what} and cannot be stacked: {made_equal}; {advice}'


def _distinct(shapes: list[tuple[int, int]]) -> str:
    return ', '.join(f'{height} x {width}' for height, width in dict.fromkeys(shapes))


def _in_words(error: Exception, where: str = 'the training pipeline') -> str:
    if 'Cannot find valid image' in str(error):
        return f'{where} drops every image that was tried, so that training would stop: no object is left after it'
    return f'{where} fails: {_message(error)}'


def _message(error: Exception) -> str:
    return f'{type(error).__name__}: {one_line(error)}'


def _failing_step(leaves: list[dict]) -> str:
    """Which transform fails on which image; '' if none does when it is tried again."""
    for leaf in leaves:
        dataset = DATASETS.build(copy.deepcopy(leaf))
        dataset.full_init()
        for index in range(len(dataset)):
            data = dataset.get_data_info(index)
            path = data.get('img_path')
            for transform in dataset.pipeline.transforms:
                try:
                    data = transform(data)
                except Exception as error:
                    return _in_words(error, f'{type(transform).__name__} of the training pipeline') + f' ({path})'
                if data is None:
                    break
    return ''
