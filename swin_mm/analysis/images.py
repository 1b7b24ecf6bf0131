"""Reading images as a config's test pipeline does, and displaying images of any depth and number of channels."""

import warnings
from collections.abc import Callable
from typing import Any

import mmcv
import numpy as np
from mmengine.config import Config
from mmengine.registry import TRANSFORMS, init_default_scope
from PIL import Image, UnidentifiedImageError

from swin_mm.openmmlab.config import test_dataset
from swin_mm.utils.errors import InputError, one_line


def test_pipeline(cfg: Config) -> list[dict]:
    """The steps of the config's test pipeline; an empty list if the config has no test_dataloader."""
    return list(test_dataset(cfg).get('pipeline', ())) if cfg.get('test_dataloader') else []


def image_reader(cfg: Config) -> Callable[[str], np.ndarray]:
    """A function that reads image files as the ``LoadImageFromFile`` step of the test pipeline does.

    Without such a step images are read as 8-bit BGR. The result is (H, W, channels), in the depth and with the channels
    of the file if the step has ``color_type='unchanged'``; colours are in the order BGR. Missing, damaged and unknown
    files raise InputError.
    """
    step = next((s for s in test_pipeline(cfg) if str(s['type']).endswith('LoadImageFromFile')), None)
    loader = None
    if step is not None:
        init_default_scope(cfg.get('default_scope') or 'mmengine')
        loader = TRANSFORMS.build(dict(step))

    def read(path: str) -> np.ndarray:
        try:
            require_intact(path)
            image = loader({'img_path': path})['img'] if loader else mmcv.imread(path)
        except Exception as error:  # decoders raise many kinds
            raise InputError(f'image {path} cannot be read: {one_line(error)}') from error
        if image is None:
            raise InputError(f'image {path} cannot be decoded: expected a JPEG, PNG or TIFF file')
        return image if image.ndim == 3 else image[..., None]

    return read


def require_intact(path: str) -> None:
    """Decode a file with Pillow, because OpenCV fills the missing part of a truncated file without an error.

    Formats that Pillow does not know (such as 16-bit TIFF with four channels) pass.

    Raises:
        OSError: the file is missing or truncated.
    """
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # warns of large images
        try:
            with Image.open(path) as image:
                image.load()
        except (UnidentifiedImageError, Image.DecompressionBombError):
            pass


def displayable(image: np.ndarray) -> np.ndarray:
    """An image of any depth and number of channels as (H, W, 3) uint8 RGB.

    8-bit values are kept; others are stretched so that the 1st and 99th percentile become black and white. Of more
    than three channels the first three are shown.

    Args:
        image: (H, W) or (H, W, channels), colours in the order BGR as OpenCV reads them.
    """
    image = image if image.ndim == 3 else image[..., None]
    image = image[..., 2::-1] if image.shape[2] >= 3 else image[..., :1].repeat(3, axis=2)
    if image.dtype != np.uint8:
        low, high = np.nanpercentile(image, (1, 99))
        scaled = (image.astype(np.float32) - low) / max(high - low, np.finfo(np.float32).tiny)
        image = (np.nan_to_num(scaled).clip(0, 1) * 255).round().astype(np.uint8)
    return np.ascontiguousarray(image)


def preprocessor_settings(cfg: Config) -> dict[str, Any]:
    """The settings of the data preprocessor: inside the model, or beside it as classifiers have it."""
    return cfg.get('model', {}).get('data_preprocessor') or cfg.get('data_preprocessor') or {}
