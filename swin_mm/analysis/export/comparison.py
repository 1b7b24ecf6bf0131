"""Comparison of an exported file with the model that it was made from, on the same images.

Shapes: B batch, N objects of an image.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from swin_mm.utils.errors import one_line

Run = Callable[[Tensor], Iterable[Tensor]]
PARTNERS = 0.9  # IoU from which two boxes of the same class can be the same object

METRIC = 'difference on the test set, in points'
QUERIES = 'queries: largest difference / largest value'
LEVELS = "largest difference from OpenCV's resizing, of 255"

# What is compared -> the largest accepted value.
TOLERANCES = {
    'largest difference / largest value': 1e-4,
    QUERIES: 1e-2,  # attention is masked where a logit is below 0, which rounding may decide
    'share of pixels with another label': 1e-3,
    'share of objects without a partner': 0.02,
    'largest difference of scores': 1e-3,
    'largest 1 - IoU of boxes': 0.02,
    'mean 1 - IoU of masks': 0.01,
    METRIC: 0.5,
    LEVELS: 1.0,
}


class Difference(NamedTuple):
    """How far one output of the file is from PyTorch's on one batch of images.

    Args:
        images: shape of the batch; of a metric, the number of images.
        output: name of the output, or a metric with PyTorch's value and that of the file.
        shape: shape of PyTorch's output; for objects, how many there are in the batch.
        measure: what was compared, a key of ``TOLERANCES``.
        value: the result; infinite where shapes differ or the file does not run.
        error: why the file does not run, or nothing.
    """

    images: tuple[int, ...]
    output: str
    shape: tuple[int, ...]
    measure: str
    value: float
    error: str = ''

    @property
    def within_tolerance(self) -> bool:
        """Whether the value is accepted."""
        return self.value <= TOLERANCES[self.measure]


def compare(
    names: list[str], images: Tensor, expected: list[Tensor], run: Run, mask_threshold: float | None = None
) -> list[Difference]:
    """Run the file on a batch, and compare its outputs with PyTorch's.

    Args:
        names: of the outputs.
        images: what the file takes.
        expected: PyTorch's outputs; objects are padded with scores of 0, and masks are (B, N, H, W) bool.
        run: runs the file.
        mask_threshold: of masks.
    """
    shape, error = tuple(images.shape), ''
    actual: list[Any] = []
    try:
        actual = list(run(images))
        if len(actual) != len(names):
            error = f'{len(actual)} outputs instead of {len(names)}'
    except Exception as failure:  # runtimes raise many kinds
        error = root_cause(failure)
    if 'scores' in names:
        if error:
            return [Difference(shape, 'boxes', (), 'share of objects without a partner', math.inf, error)]
        return compare_objects(shape, expected, actual, mask_threshold)
    differences = []
    for i, (name, e) in enumerate(zip(names, expected, strict=True)):
        same_shape = not error and actual[i].shape == e.shape
        if name == 'labels':
            measure = 'share of pixels with another label'
            value = (actual[i] != e).float().mean().item() if same_shape else math.inf
        else:
            measure = QUERIES if name in ('class_logits', 'mask_logits') else 'largest difference / largest value'
            largest = e.abs().max().item() or 1
            value = (actual[i] - e).abs().max().item() / largest if same_shape else math.inf
        differences.append(
            Difference(shape, name, tuple(e.shape), measure, math.inf if math.isnan(value) else value, error)
        )
    return differences


def compare_objects(
    shape: tuple[int, ...], expected: list[Tensor], actual: list[Tensor], mask_threshold: float | None
) -> list[Difference]:
    """Compare boxes, scores and masks of objects that correspond."""
    alone, total = 0, 0
    scores, boxes, masks = [0.0], [0.0], []
    for index in range(shape[0]):
        want, have = ([output[index][outputs[1][index] > 0] for output in outputs] for outputs in (expected, actual))
        pairs, overlap = partners(want, have)
        total += len(want[1])
        alone += len(want[1]) + len(have[1]) - 2 * len(pairs)
        for i, j in pairs:
            scores.append(abs(want[1][i] - have[1][j]).item())
            boxes.append(1 - overlap[i, j].item())
        if len(want) > 3 and pairs:
            assert mask_threshold is not None
            rows, columns = (list(side) for side in zip(*pairs, strict=True))
            found = have[3][columns]
            if found.shape[-2:] != shape[-2:]:
                found = paste_masks(found, have[0][columns], (shape[-2], shape[-1]))
            same, other = want[3][rows].bool(), found >= mask_threshold
            both, either = (same & other).sum((1, 2)), (same | other).sum((1, 2))
            masks += (1 - both / either.clamp(min=1)).where(either > 0, 0).tolist()
    values = {
        'share of objects without a partner': ('boxes', alone / max(2 * total, 1)),
        'largest difference of scores': ('scores', max(scores)),
        'largest 1 - IoU of boxes': ('boxes', max(boxes)),
    }
    if len(expected) > 3:
        values['mean 1 - IoU of masks'] = ('masks', sum(masks) / max(len(masks), 1))
    return [Difference(shape, name, (total,), measure, value) for measure, (name, value) in values.items()]


def partners(want: list[Tensor], have: list[Tensor]) -> tuple[list[tuple[int, int]], Tensor]:
    """Pairs of the same class, of a high IoU and of scores close to each other; and all IoUs.

    Args:
        want: boxes (N, 4), scores (N) and labels (N) of one image.
        have: the same of the other side.
    """
    overlap = pairwise_iou(want[0], have[0])
    likeness = overlap - (want[1][:, None] - have[1]).abs()
    likeness = likeness.masked_fill((want[2][:, None] != have[2]) | (overlap < PARTNERS), -math.inf)
    pairs = []
    for i in range(len(want[1])):
        if len(have[1]) and (j := int(likeness[i].argmax())) >= 0 and likeness[i, j] > -math.inf:
            pairs.append((i, j))
            likeness[:, j] = -math.inf
    return pairs, overlap


def pairwise_iou(one: Tensor, other: Tensor) -> Tensor:
    """IoU of boxes: (N, 4), (M, 4) -> (N, M); two empty boxes at one place have 1."""
    low = torch.maximum(one[:, None, :2], other[None, :, :2])
    high = torch.minimum(one[:, None, 2:], other[None, :, 2:])
    common = (high - low).clamp(min=0).prod(-1)
    area, other_area = (one[:, 2:] - one[:, :2]).prod(-1), (other[:, 2:] - other[:, :2]).prod(-1)
    union = area[:, None] + other_area - common
    same = (one[:, None] - other).abs().amax(-1) < 1e-2
    return torch.where(union > 0, common / union.clamp(min=1e-9), same.to(union))


def paste_masks(masks: Tensor, boxes: Tensor, size: tuple[int, int]) -> Tensor:
    """Probabilities inside boxes, (N, h, w) and (N, 4), to probabilities in an image of (height, width)."""
    low, span = boxes[:, :2], (boxes[:, 2:] - boxes[:, :2]).clamp(min=1e-6)
    rows = (torch.arange(size[0]) + 0.5 - low[:, 1:]) / span[:, 1:] * 2 - 1  # (N, H)
    columns = (torch.arange(size[1]) + 0.5 - low[:, :1]) / span[:, :1] * 2 - 1
    pasted = []
    for mask, y, x in zip(masks, rows, columns, strict=True):  # one by one, to save memory
        grid = torch.stack((x[None].expand(len(y), -1), y[:, None].expand(-1, len(x))), dim=-1)
        pasted.append(F.grid_sample(mask[None, None], grid[None], align_corners=False)[0, 0])
    return torch.stack(pasted)


def root_cause(error: BaseException) -> str:
    """The first error in the chain, in one line of at most 300 characters."""
    while error.__cause__ is not None:
        error = error.__cause__
    return one_line(error)[:300]
