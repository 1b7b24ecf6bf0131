"""The module that is exported: a backbone or a whole model, with what comes before and after it.

Shapes: B batch, C channels or classes, N objects of an image.
"""

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from swin_mm.analysis.export.dino import DinoTransformer
from swin_mm.analysis.export.metadata import Input
from swin_mm.analysis.export.operators import CUSTOM, PLAIN
from swin_mm.analysis.export.query_heads import Mask2FormerQueries
from swin_mm.analysis.export.replacements import DETECTORS, HEADS, class_name, exportable_copy
from swin_mm.analysis.export.uper_head import UPerHead
from swin_mm.utils.errors import InputError

HALF = 0.5 + 2**-10  # halves are rounded up, also where a runtime's error puts them below a half
PARTS = ('predictions', 'model', 'backbone')


class Preprocess(nn.Module):
    """Normalise images, and pad them at the right and at the bottom, as the config's data preprocessor does.

    Args:
        described: the input of the file, with mean and std in its order of channels.
        flip: whether the model takes the opposite order of channels.
        divisor: pad height and width to multiples of it.
        value: of the padding, in the normalised image.
    """

    mean: Tensor
    std: Tensor

    def __init__(self, described: Input, flip: bool = False, divisor: int = 1, value: float = 0) -> None:
        super().__init__()
        self.flip, self.divisor, self.value = flip, divisor, value
        self.register_buffer('mean', torch.tensor(described.mean or (0.0,)).view(-1, 1, 1), persistent=False)
        self.register_buffer('std', torch.tensor(described.std or (1.0,)).view(-1, 1, 1), persistent=False)

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) of any type -> float, of a height and width that the divisor divides."""
        image = (image.float() - self.mean) / self.std
        if self.flip:
            image = image.flip(1)
        if self.divisor > 1:
            height, width = (
                (size + self.divisor - 1) // self.divisor * self.divisor - size for size in image.shape[2:]
            )
            image = F.pad(image, (0, width, 0, height), value=self.value)
        return image


class Resize(nn.Module):
    """Resize images as the ``Resize`` step of a test pipeline does, and pad them as a ``Pad`` step after it.

    Sizes are computed in integers, so that a graph computes them exactly for any size of image. Pixels are whole
    numbers, as OpenCV gives them.

    Args:
        scale: (width, height).
        keep_ratio: make the image as large as fits into the scale, or its transpose; otherwise exactly so large.
        pad: (width, height) after padding at the right and at the bottom; None without.
        value: of the padding.
    """

    def __init__(
        self, scale: tuple[int, int], keep_ratio: bool, pad: tuple[int, int] | None = None, value: float = 0
    ) -> None:
        super().__init__()
        self.scale, self.keep_ratio, self.pad, self.value = scale, keep_ratio, pad, value

    def size(self, height: int, width: int) -> tuple[int, int]:
        """The (height, width) that an image is resized to, without padding; both may be symbolic.

        mmcv rounds the sides of half a pixel in floating point, where they may come out one pixel smaller.
        """
        if not self.keep_ratio:
            return self.scale[1], self.scale[0]
        long, short = torch.sym_max(height, width), torch.sym_min(height, width)
        most, least = max(self.scale), min(self.scale)

        def scaled(side: int) -> int:  # side * min(most / long, least / short), rounded
            result = torch.sym_min((2 * side * most + long) // (2 * long), (2 * side * least + short) // (2 * short))
            return torch.sym_max(1, result)  # torch.export needs to know that it is positive

        return scaled(height), scaled(width)

    def forward(self, image: Tensor) -> Tensor:
        """(B, C, H, W) of any type -> float."""
        size = self.size(image.shape[2], image.shape[3])
        image = F.interpolate(image.float(), size=size, mode='bilinear', align_corners=False)
        image = (image + HALF).floor()
        if self.pad is not None:
            image = F.pad(image, (0, self.pad[0] - size[1], 0, self.pad[1] - size[0]), value=self.value)
        return image


class Exportable(nn.Module):
    """Images (B, C, H, W) to a tuple of tensors.

    Args:
        model: a model, or a backbone. It is not changed.
        part: 'backbone' if ``model`` is one; 'model' for logits of a segmentor, maps of a one-stage detector, or
            logits of a panoptic model's queries; 'predictions' for final labels, boxes and masks. Of a panoptic model
            that predicts no instances, 'predictions' are those of 'model': what is merged to segments.
        preprocess: comes before the model; None if the caller normalises and pads.
        onnx: whether it is for ONNX; otherwise it uses operators of PyTorch only.
        resize: comes before everything, and predictions are in pixels of the image before it; None if the caller
            resizes.

    Raises:
        InputError: the part cannot be exported.
    """

    def __init__(
        self,
        model: nn.Module,
        part: str,
        preprocess: Preprocess | None = None,
        onnx: bool = True,
        resize: Resize | None = None,
    ) -> None:
        super().__init__()
        self.part, self.preprocess, self.resize = part, preprocess, resize
        self.is_segmentor = hasattr(model, 'encode_decode')
        self.has_queries = hasattr(model, 'panoptic_fusion_head')
        if part == 'predictions' and self.has_queries and not predicts_instances(model):
            self.part = part = 'model'
        if part == 'model' and getattr(model, 'with_roi_head', False):
            raise InputError(
                f'--part model: {type(model).__name__} selects boxes between its two stages, so there are no maps '
                'before the selection; --part predictions and --part backbone work'
            )
        heads = self.is_segmentor or part == 'predictions' or (part == 'model' and self.has_queries)
        if heads and not self.is_segmentor and class_name(model) not in DETECTORS:
            require_replacements(model)
        self.model: Any = exportable_copy(model, CUSTOM if onnx else PLAIN, heads, pooling=onnx)
        if isinstance(self.model, DinoTransformer) and preprocess is not None and preprocess.divisor > 1:
            raise InputError('--preprocess: DINO marks padded pixels, which a file cannot: set pad_size_divisor=1')

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        """The outputs, in the order of :meth:`output_names`."""
        raw = (image.shape[2], image.shape[3])
        if self.resize is not None:
            image = self.resize(image)
        size = (image.shape[2], image.shape[3])
        x = image if self.preprocess is None else self.preprocess(image)
        if self.part == 'backbone':
            return tuple(flatten(self.model(x)))
        if self.is_segmentor:
            logits = self.model.encode_decode(x, [{'img_shape': x.shape[2:]}])[..., : size[0], : size[1]]
            if self.resize is not None:
                logits = F.interpolate(logits, size=raw, mode='bilinear', align_corners=self.model.align_corners)
            return (logits,) if self.part == 'model' else (to_labels(self.model, logits),)
        if self.part == 'model' and not self.has_queries:
            return tuple(flatten(self.model(x, mode='tensor')))
        feats = self.model.extract_feat(x)
        if self.has_queries:
            logits, masks = self.model.panoptic_head(feats, size, (x.shape[2], x.shape[3]))
            if self.resize is not None:
                masks = F.interpolate(masks, size=raw, mode='bilinear', align_corners=False)
            return (logits, masks) if self.part == 'model' else self.model.panoptic_fusion_head(logits, masks)
        if isinstance(self.model, DinoTransformer):
            objects = self.model(feats, size)
        elif hasattr(self.model, 'roi_head'):
            boxes, scores, _ = self.model.rpn_head(feats, size)
            objects = self.model.roi_head(feats, boxes, scores, size)
        else:
            objects = self.model.bbox_head(feats, size)
        if self.resize is not None:
            height, width = self.resize.size(*raw)
            one = objects[0].new_ones(())
            ratio = torch.stack((one * raw[1] / width, one * raw[0] / height) * 2)
            objects = (objects[0] * ratio, *objects[1:])
        return objects

    @property
    def task(self) -> str:
        """What is predicted, as in the metadata."""
        if self.part == 'backbone':
            return 'backbone'
        if self.is_segmentor:
            return 'semantic'
        if self.part == 'model' and self.has_queries:
            return 'queries'
        return 'instance' if self.mask_format else 'detection'

    @property
    def mask_format(self) -> str | None:
        """How masks are given, if there are masks."""
        if self.part != 'predictions' or self.is_segmentor:
            return None
        if self.has_queries:
            return 'image'
        head = getattr(getattr(self.model, 'roi_head', None), 'head', None)
        return 'box28' if head is not None and head.with_mask else None

    @property
    def mask_threshold(self) -> float | None:
        """What is above it belongs to the object."""
        if self.mask_format == 'box28':
            return float(self.model.roi_head.head.test_cfg.mask_thr_binary)
        return 0.5 if self.mask_format == 'image' else None

    @property
    def defers_guards(self) -> bool:
        """Whether the graph only seems to depend on sizes of 1, so that torch.export may assume that there are none.

        Some heads reshape or scale maps. torch.export decides there by whether a side is 1 if the result is a copy,
        which does not change it; the comparison covers batches of 1.
        """
        return any(
            isinstance(module, Mask2FormerQueries | DinoTransformer | UPerHead)
            or class_name(module) == 'mmdet.FCOSHead'
            for module in self.modules()
        )

    def output_names(self, count: int) -> list[str]:
        """The names of ``count`` outputs."""
        if self.part == 'backbone':
            return [f'stage{i}' for i in getattr(self.model, 'out_indices', range(count))]
        if self.is_segmentor:
            return ['labels' if self.part == 'predictions' else 'logits']
        if self.part == 'predictions':
            return ['boxes', 'scores', 'labels', 'masks'][:count]
        if self.has_queries:
            return ['class_logits', 'mask_logits']
        return [f'output{i}' for i in range(count)]


def predicts_instances(model: Any) -> bool:
    """Whether a model of queries predicts instances, not only panoptic segments."""
    return bool(model.panoptic_fusion_head.test_cfg.get('instance_on', False))


def to_labels(model: Any, logits: Tensor) -> Tensor:
    """Logits (B, C, H, W) to class ids (B, H, W), as mmseg's ``postprocess_result`` does."""
    if logits.shape[1] > 1:
        return logits.argmax(1)
    return (logits[:, 0].sigmoid() > model.decode_head.threshold).long()


def require_replacements(model: nn.Module) -> None:
    """Check that the heads of a detector have replacements.

    Raises:
        InputError: names the head that has none.
    """
    heads = {name: child for name, child in model.named_children() if name.endswith('_head')}
    known = {'bbox_head'}, {'rpn_head', 'roi_head'}, {'panoptic_head', 'panoptic_fusion_head'}
    missing = [class_name(head) for head in heads.values() if class_name(head) not in HEADS]
    if missing or set(heads) not in known:
        what = ', '.join(missing) or f'{type(model).__name__} with {", ".join(heads) or "no head"}'
        raise InputError(
            f'{what}: its predictions have no exportable replacement (see swin_mm/analysis/export/replacements.py); '
            '--part backbone works'
        )


def flatten(outputs: Any) -> Iterator[Tensor]:
    """The tensors in nested tuples, lists and dicts, in their order."""
    if isinstance(outputs, dict):
        outputs = list(outputs.values())
    if not isinstance(outputs, tuple | list):
        yield outputs
        return
    for output in outputs:
        yield from flatten(output)
