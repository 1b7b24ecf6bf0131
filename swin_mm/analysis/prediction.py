"""What a model of mmdet or mmseg sees in pictures: predicted, drawn with a legend, and saved."""

import colorsys
import io
import json
import re
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stdout
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
from matplotlib import get_data_path
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from mmengine.structures import BaseDataElement
from PIL import Image, ImageDraw, ImageFont
from torch import nn

from swin_mm.engine.runner import load_complete
from swin_mm.engine.tta import apply_tta
from swin_mm.openmmlab.config import config_errors, test_dataset
from swin_mm.openmmlab.loading import read_for_mmengine
from swin_mm.utils.errors import InputError
from swin_mm.utils.files import atomic_write

DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}


class View(NamedTuple):
    """An image or a frame of a video."""

    name: str  # of its outputs, without suffix
    picture: np.ndarray  # (H, W, 3) RGB
    data: dict  # what the test pipeline made of it


class Predictor:
    """A model with its weights, built by mmdet's or mmseg's inferencer.

    Args:
        cfg: The config; it is changed.
        checkpoint: File or address.
        device: As torch names it.
        dtype: See :func:`compute_in`.
        tta: Test-time augmentation.
        score_thr: Objects of lower score are left out.

    Raises:
        InputError: the config does not predict objects or segments, or the checkpoint is not one of it.
        CheckpointError: the checkpoint cannot be read.
    """

    def __init__(
        self, cfg: Config, checkpoint: str, device: str, dtype: str = 'fp32', tta: bool = False, score_thr: float = 0.3
    ) -> None:
        self.detects = cfg.get('default_scope') == 'mmdet'
        if cfg.get('default_scope') not in ('mmdet', 'mmseg') or 'test_dataloader' not in cfg:
            raise InputError(
                f'{cfg.filename} does not predict objects or segments: default_scope should be mmdet or mmseg, and '
                'there should be a test_dataloader, whose pipeline prepares the images'
            )
        self.score_thr = score_thr
        content = read_for_mmengine(checkpoint)
        init_default_scope(cfg.default_scope)
        if tta:
            apply_tta(cfg)
        dataset = cfg.test_dataloader.dataset = test_dataset(cfg)
        dataset.pipeline = _without_annotations(dataset.pipeline)
        cfg.visualizer = {'type': f'{"Det" if self.detects else "Seg"}LocalVisualizer', 'alpha': 0.5}
        if self.detects:
            from mmdet.apis import DetInferencer as Inferencer
        else:
            from mmseg.apis import MMSegInferencer as Inferencer
        with config_errors(cfg):
            metainfo = DATASETS.build(dict(dataset, lazy_init=True)).metainfo
            with redirect_stdout(io.StringIO()), warnings.catch_warnings():
                warnings.simplefilter('ignore')  # that there are no weights yet
                self.inferencer = Inferencer(cfg, None, device=device, show_progress=False)
            load_complete(self.inferencer.model, content['state_dict'], checkpoint)
        meta = content.get('meta') or {}
        self.classes, self.palette = _classes(metainfo, meta.get('dataset_meta') or meta)
        self.inferencer.visualizer.dataset_meta = {'classes': self.classes, 'palette': self.palette}
        compute_in(dtype, self.inferencer.model.module if tta else self.inferencer.model)

    def view(self, name: str, picture: np.ndarray, path: str | None = None) -> View:
        """Prepare an RGB picture; where it has a path, the pipeline reads that in its own way."""
        source = np.ascontiguousarray(picture[..., ::-1]) if path is None else path
        return View(name, picture, self.inferencer.pipeline(source))

    def predict(self, views: Iterable[View], batch_size: int = 1) -> Iterator[tuple[View, BaseDataElement]]:
        """Predict in batches; one sample for each view, on the CPU."""
        views = iter(views)
        while batch := list(islice(views, batch_size)):
            # mmdet pads images to one size, mmseg wants them to have it.
            for _, group in groupby(batch, lambda view: self.detects or _shapes(view.data['inputs'])):
                group = list(group)
                samples = self.inferencer.forward(self.inferencer.collate_fn([view.data for view in group]))
                yield from zip(group, map(self._tidy, samples), strict=True)

    def _tidy(self, sample: BaseDataElement) -> BaseDataElement:
        sample = sample.cpu()
        if 'pred_panoptic_seg' in sample:
            sample.pop('pred_instances', None)  # the same objects before they were merged
        elif 'pred_instances' in sample:
            sample.pred_instances = sample.pred_instances[sample.pred_instances.scores >= self.score_thr]
        return sample

    def draw(self, view: View, sample: BaseDataElement) -> np.ndarray:
        """The picture with the prediction on it and a legend beside it, (H, W, 3) RGB."""
        labels = _labels(sample)
        counts = Counter(labels[labels < len(self.classes)].tolist())  # one more is void
        drawn = view.picture
        if counts:
            how = {'pred_score_thr': 0.0} if self.detects else {'with_labels': False}
            self.inferencer.visualizer.add_datasample('', drawn, sample, draw_gt=False, **how)
            drawn = self.inferencer.visualizer.get_image()
        amount = str if labels.ndim == 1 else lambda pixels: f'{pixels / labels.size:.1%}'
        rows = [(self.palette[i], f'{self.classes[i]}  {amount(n)}') for i, n in counts.most_common()]
        return _with_legend(drawn, rows, max(self.classes, key=len) + '  00.0%')

    def save(self, view: View, sample: BaseDataElement, folder: Path) -> None:
        """Write objects as JSON, labels of pixels as PNG, panoptic segments as both, to files called after the view."""
        pixels = record = None
        if 'pred_sem_seg' in sample:
            few = len(self.classes) <= 256
            pixels = Image.fromarray(_labels(sample).astype(np.uint8 if few else np.uint16))
            if few:
                pixels.putpalette(np.uint8(self.palette).ravel().tolist())
        elif 'pred_panoptic_seg' in sample:
            pixels, record = self._segments(sample.pred_panoptic_seg.sem_seg[0].numpy())
        else:
            record = self.inferencer.pred2dict(sample)
            record['names'] = [self.classes[label] for label in record['labels']]
        if pixels:
            with atomic_write(folder / f'{view.name}.png') as file:
                pixels.save(file)
        if record:
            with atomic_write(folder / f'{view.name}.json') as file:
                height, width = view.picture.shape[:2]
                file.write_text(json.dumps({'height': height, 'width': width, **record}))

    def _segments(self, ids: np.ndarray) -> tuple[Image.Image, dict[str, Any]]:
        """COCO's format: the PNG's red + 256 green is the number of a segment, 0 is void."""
        ids, index, areas = np.unique(ids, return_inverse=True, return_counts=True)
        known = _label(ids) < len(self.classes)
        numbers = np.where(known, known.cumsum(), 0)
        info = [
            {'id': number, 'category_id': label, 'name': self.classes[label], 'area': area}
            for number, label, area in zip(numbers.tolist(), _label(ids).tolist(), areas.tolist(), strict=True)
            if number
        ]
        pixels = numbers[index]
        pixels = np.stack([pixels & 255, pixels >> 8, pixels & 0], axis=-1).astype(np.uint8)
        return Image.fromarray(pixels), {'segments_info': info}


def compute_in(dtype: str, model: nn.Module) -> None:
    """Have a model compute in a key of ``DTYPES``.

    bf16 and fp16 are autocast, of a segmentor's network, of a detector's backbone and neck: boxes of 8 bits would be
    off by pixels, and mmcv's operators on them want fp32.
    """
    if dtype == 'fp32':
        return
    name = 'encode_decode' if hasattr(model, 'encode_decode') else 'extract_feat'
    device = next(model.parameters()).device.type
    setattr(model, name, _autocast(getattr(model, name), device, DTYPES[dtype]))


def _autocast(function: Callable, device: str, dtype: torch.dtype) -> Callable:
    """Have a function compute in ``dtype`` where that is safe, and return fp32."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, dtype):
            result = function(*args, **kwargs)
        return result.float() if isinstance(result, torch.Tensor) else tuple(map(torch.Tensor.float, result))

    return call


def _label(ids: np.ndarray) -> np.ndarray:
    """Class numbers of panoptic segments."""
    from mmdet.evaluation import INSTANCE_OFFSET

    return ids % INSTANCE_OFFSET


def _labels(sample: BaseDataElement) -> np.ndarray:
    """Class numbers, of pixels (H, W) or of objects (n,)."""
    if 'pred_sem_seg' in sample:
        return sample.pred_sem_seg.data[0].numpy()
    if 'pred_panoptic_seg' in sample:
        return _label(sample.pred_panoptic_seg.sem_seg[0].numpy())
    return sample.pred_instances.labels.numpy()


def _shapes(inputs: Any) -> list:
    """The sizes of an image, or of its augmented views."""
    return [view.shape for view in inputs] if isinstance(inputs, list) else inputs.shape


def _without_annotations(node: Any) -> Any:
    """Leave out the steps of a pipeline, at any depth, that read annotations: there are none."""
    if isinstance(node, dict):
        return {key: _without_annotations(value) for key, value in node.items()}
    if not isinstance(node, list):
        return node
    steps = [s for s in node if not (isinstance(s, dict) and re.search(r'Load\w*Annotation', str(s.get('type'))))]
    return [step for step in map(_without_annotations, steps) if step != []]


def _classes(config: dict, checkpoint: dict) -> tuple[list[str], list]:
    """Names and colours; what the checkpoint was trained on counts for more than the config."""
    metainfo = config | {key.lower(): value for key, value in checkpoint.items() if value is not None}
    classes = metainfo.get('classes')
    if not classes:
        raise InputError("neither checkpoint nor config names the classes: set the dataset's metainfo.classes")
    palette = metainfo.get('palette')
    if isinstance(palette, str) or len(palette or ()) < len(classes):
        hues = (index * 0.618 % 1 for index in range(len(classes)))  # neighbours differ
        palette = [[round(255 * part) for part in colorsys.hsv_to_rgb(hue, 0.75, 0.95)] for hue in hues]
    return list(classes), [tuple(colour) for colour in palette[: len(classes)]]


def _with_legend(picture: np.ndarray, rows: list[tuple], longest: str) -> np.ndarray:
    """Put a panel with (colour, text) rows to the right; its size depends on the picture's and ``longest`` alone."""
    height, width = picture.shape[:2]
    size = round(min(max(height / 28, 12), 32))
    line = size * 8 // 5
    font = ImageFont.truetype(str(Path(get_data_path(), 'fonts/ttf/DejaVuSans.ttf')), size)
    panel = round(font.getlength(longest)) + 3 * line
    whole = [(side + 1) // 2 * 2 for side in (width + panel, max(height, 8 * line))]  # codecs want even sizes
    canvas = Image.new('RGB', whole, 'white')
    canvas.paste(Image.fromarray(picture))
    room = whole[1] // line
    if len(rows) > room:
        rows = [*rows[: room - 1], ((255, 255, 255), f'and {len(rows) - room + 1} more')]
    pen = ImageDraw.Draw(canvas)
    for index, (colour, text) in enumerate(rows):
        left, top = width + line // 2, index * line + (line - size)
        pen.rectangle((left, top, left + size, top + size), fill=colour)
        pen.text((left + line, top + size // 2), text, 'black', font, anchor='lm')
    return np.asarray(canvas)
