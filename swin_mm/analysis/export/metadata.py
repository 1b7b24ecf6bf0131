"""What a program needs to know to use an exported file; it travels inside the file, as JSON under one key."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope

from swin_mm.engine.drawing import classes_and_palette
from swin_mm.engine.images import preprocessor_settings, test_pipeline
from swin_mm.openmmlab.config import config_errors, test_dataset, type_name
from swin_mm.utils.errors import InputError

KEY = 'swin_mm'
VERSION = 1


@dataclass(frozen=True)
class Input:
    """What the file takes: a batch of images, (B, channels, H, W).

    Args:
        channels: order of the colours, 'RGB' or 'BGR'.
        dtype: 'uint8' if the file normalises, else 'float32'.
        normalize_inside: whether the file normalises and pads; otherwise the caller does.
        mean: of each channel, in the order of ``channels``; the normalised image is (image - mean) / std.
        std: of each channel.
        size_divisor: what height and width must be divisible by after padding at the right and at the bottom; 1 if
            the file pads.
        resize_inside: what the file does to images of any size, as ``Metadata.resize``; None if the caller resizes.
    """

    channels: str
    dtype: str
    normalize_inside: bool
    mean: tuple[float, ...]
    std: tuple[float, ...]
    size_divisor: int
    name: str = 'image'
    layout: str = 'NCHW'
    resize_inside: dict[str, Any] | None = None


@dataclass(frozen=True)
class Metadata:
    """The content of the key ``swin_mm``.

    Args:
        task: 'semantic', 'detection', 'instance', 'queries' or 'backbone'.
        classes: names by class id.
        palette: colours by class id, (r, g, b).
        input: what the file takes.
        resize: ``scale`` (w, h) and ``keep_ratio`` of the config's test pipeline, which the caller applies before;
            None if it does not resize, or the file does.
        outputs: their names, in their order.
        mask_format: of an output ``masks``: 'box28' are probabilities inside the box, 'image' in the whole image.
        mask_threshold: what is above it belongs to the object.
    """

    task: str
    classes: tuple[str, ...]
    palette: tuple[tuple[int, ...], ...]
    input: Input
    resize: dict[str, Any] | None
    outputs: tuple[str, ...]
    mask_format: str | None = None
    mask_threshold: float | None = None

    def dumps(self) -> str:
        """As JSON."""
        return json.dumps({'version': VERSION, **asdict(self)})


def names_and_colours(cfg: Config, checkpoint_meta: dict) -> tuple[tuple[str, ...], tuple[tuple[int, ...], ...]]:
    """Names and colours by class id, as :mod:`swin_mm.analysis.prediction` uses them; empty if they are unknown."""
    metainfo: dict[str, Any] = {}
    if cfg.get('test_dataloader'):
        init_default_scope(cfg.get('default_scope') or 'mmengine')
        with config_errors(cfg):
            metainfo = dict(DATASETS.build(dict(test_dataset(cfg), pipeline=[], lazy_init=True)).metainfo)
    try:
        classes, palette = classes_and_palette(metainfo, checkpoint_meta.get('dataset_meta') or checkpoint_meta)
    except InputError:
        return (), ()
    return tuple(classes), tuple(tuple(map(int, colour)) for colour in palette)


def describe_input(cfg: Config, preprocess: bool) -> Input:
    """The input of a file, from the config's data preprocessor.

    Args:
        cfg: the config.
        preprocess: whether the file normalises and pads.

    Raises:
        InputError: the preprocessor does what a file cannot.
    """
    settings = preprocessor_settings(cfg)
    test_cfg = settings.get('test_cfg') or {}
    if preprocess and test_cfg.get('size'):
        raise InputError(
            f'--preprocess: data_preprocessor.test_cfg.size={test_cfg["size"]} pads to one size; leave out --preprocess'
        )
    mean, std = settings.get('mean'), settings.get('std')
    divisor = test_cfg.get('size_divisor') or settings.get('pad_size_divisor') or 1
    channels = 'RGB' if settings.get('bgr_to_rgb') else 'BGR'
    if preprocess and channels == 'BGR':
        mean, std = _reversed(mean), _reversed(std)
    return Input(
        channels='RGB' if preprocess else channels,
        dtype='uint8' if preprocess else 'float32',
        normalize_inside=preprocess,
        mean=tuple(map(float, mean or ())),
        std=tuple(map(float, std or ())),
        size_divisor=1 if preprocess else int(divisor),
    )


def _reversed(values: Sequence[float] | None) -> Sequence[float] | None:
    return values and values[::-1]


def resize_of(cfg: Config) -> dict[str, Any] | None:
    """The scale (w, h) and ``keep_ratio`` of the Resize step of the config's test pipeline, if it has one."""
    step = next((step for step in test_pipeline(cfg) if type_name(step) == 'Resize' and step.get('scale')), None)
    if step is None:
        return None
    scale = step['scale']
    width, height = (scale, scale) if isinstance(scale, int) else scale
    return {'scale': [int(width), int(height)], 'keep_ratio': bool(step.get('keep_ratio'))}
