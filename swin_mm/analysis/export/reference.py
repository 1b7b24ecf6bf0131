"""What the original model predicts, in the form of an exported file's outputs; and the images to compare on.

Shapes: B batch, N objects of an image.
"""

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, TRANSFORMS, init_default_scope
from torch import Tensor
from torch.nn import functional as F
from torch.nn.utils.rnn import pad_sequence

from swin_mm.analysis.export.whole import flatten, predicts_instances, to_labels
from swin_mm.engine.images import image_reader, test_pipeline
from swin_mm.openmmlab.config import config_errors, test_dataset, type_name

MAX_IMAGES = 3


@torch.no_grad()
def reference_outputs(
    model: Any,
    part: str,
    x: Tensor,
    size: tuple[int, int],
    raw: tuple[int, int] | None = None,
    resized_size: tuple[int, int] | None = None,
) -> list[Tensor]:
    """The outputs of the original model on a batch.

    Args:
        model: it is not changed.
        part: one of ``PARTS``.
        x: images, normalised and padded.
        size: (height, width) without padding.
        raw: (height, width) before resizing, in whose pixels predictions are given; None for ``size``.
        resized_size: (height, width) after resizing, before padding by the test pipeline; None for ``size``.

    Returns:
        Tensors in the order of the file's outputs. Objects are padded to a common number with scores of 0; their masks
        are (B, N, height, width) bool.
    """
    if part == 'backbone':
        return list(flatten(model(x)))
    if hasattr(model, 'encode_decode'):
        logits = model.encode_decode(x, [{'img_shape': x.shape[2:]} for _ in x])[..., : size[0], : size[1]]
        if raw is not None:
            logits = F.interpolate(logits, raw, mode='bilinear', align_corners=model.align_corners)
        return [logits if part == 'model' else to_labels(model, logits)]
    queries = hasattr(model, 'panoptic_fusion_head')
    if part == 'model' and not queries:
        return list(flatten(model(x, mode='tensor')))
    from mmdet.structures import DetDataSample

    padded = tuple(x.shape[2:])
    after = resized_size or size
    scale_factor = (after[1] / raw[1], after[0] / raw[0]) if raw is not None else (1.0, 1.0)
    meta = dict(
        img_shape=size, ori_shape=raw or size, scale_factor=scale_factor, batch_input_shape=padded, pad_shape=padded
    )
    empty = [DetDataSample(metainfo=dict(meta)) for _ in x]
    if queries and (part == 'model' or not predicts_instances(model)):
        logits, masks = model.panoptic_head.predict(model.extract_feat(x), empty)
        masks = masks[..., : size[0], : size[1]]
        return [logits, masks if raw is None else F.interpolate(masks, raw, mode='bilinear', align_corners=False)]
    samples = model.predict(x, empty, rescale=True)
    objects = [sample.pred_instances for sample in samples]
    outputs = [[each.bboxes for each in objects], [each.scores for each in objects], [each.labels for each in objects]]
    if any('masks' in each for each in objects):
        outputs.append([each.masks for each in objects])
    return [pad_sequence(output, batch_first=True) for output in outputs]


def find_images(cfg: Config, paths: Sequence[str | Path] = ()) -> list[str]:
    """Up to ``MAX_IMAGES`` image files: the given ones, else the first of the config's test set, else none.

    Raises:
        InputError: the config's test set cannot be read although its files are there.
    """
    if paths:
        return [str(path) for path in paths][:MAX_IMAGES]
    if not cfg.get('test_dataloader'):
        return []
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    with config_errors(cfg):
        try:
            dataset = DATASETS.build(dict(test_dataset(cfg), pipeline=[]))
        except (FileNotFoundError, NotADirectoryError):
            return []  # the data is not on this machine
    files = (dataset.get_data_info(i).get('img_path') for i in range(min(len(dataset), MAX_IMAGES)))
    return [str(file) for file in files if file and Path(file).is_file()]


def prepared_images(cfg: Config, files: Sequence[str], resize: bool = True) -> list[np.ndarray]:
    """Images (H, W, channels) as the config's test pipeline gives them to the model, before normalisation.

    Args:
        cfg: the config.
        files: image files.
        resize: whether to resize and pad them.

    Raises:
        InputError: a file cannot be read, or the pipeline cannot be built.
    """
    read = image_reader(cfg)
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    steps = [step for step in test_pipeline(cfg) if not type_name(step).startswith(('Load', 'Pack'))]
    if any(type_name(step) not in ('Resize', 'Pad') for step in steps):
        steps = [step for step in steps if type_name(step) == 'Resize']
    with config_errors(cfg):
        transforms = [TRANSFORMS.build(dict(step)) for step in steps] if resize else []
    prepared = []
    for file in files:
        image = read(file)
        results: Any = dict(img=image, img_path=file, img_shape=image.shape[:2], ori_shape=image.shape[:2])
        for transform in transforms:
            results = transform(results)
        prepared.append(np.ascontiguousarray(results['img']))
    return prepared


def batches(images: Sequence[np.ndarray], size: tuple[int, int] | None, fit: Callable[[int], int]) -> list[np.ndarray]:
    """Batches (B, H, W, channels) at several sizes, made from images of the test pipeline.

    Args:
        images: (H, W, channels).
        size: (width, height) to keep to; None for several.
        fit: the next side that the file takes.
    """
    height, width = images[0].shape[:2]
    if size:
        sizes = [(1, size), (2, size)]
    else:
        # as it is; two at once, smaller, in the other orientation; odd sides
        sizes = [(1, (width, height)), (2, (round(height * 0.6), round(width * 0.45))), (1, (width // 3 | 1, 97))]
        sizes = [(count, (fit(max(w, 32)), fit(max(h, 32)))) for count, (w, h) in sizes]
    result = []
    for count, shape in sizes:
        chosen = [images[i % len(images)] for i in range(count)]
        result.append(np.stack([image if image.shape[1::-1] == shape else resized(image, shape) for image in chosen]))
    return result


def resized(image: np.ndarray, size: tuple[int, int]) -> np.ndarray:
    """An image resized to (width, height)."""
    image = mmcv.imresize(image, size)
    return image if image.ndim == 3 else image[..., None]


def noise(channels: int) -> list[np.ndarray]:
    """Two images of smooth noise, for models whose data is not at hand."""
    random = np.random.default_rng(0)
    coarse = random.integers(0, 256, (2, 12, 16, channels), dtype=np.uint8)
    return [resized(image, (256, 192)) for image in coarse]
