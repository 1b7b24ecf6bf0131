"""Reading images as a config's test pipeline does, and displaying images of any depth and number of channels."""

import warnings
from collections.abc import Callable, Sequence
from functools import cached_property
from typing import Any

import cv2
import mmcv
import numpy as np
from mmengine.config import Config
from mmengine.registry import TRANSFORMS, init_default_scope
from PIL import Image, UnidentifiedImageError

from swin_mm.openmmlab.config import test_dataset, type_name
from swin_mm.utils.errors import InputError, one_line


def test_pipeline(cfg: Config) -> list[dict]:
    """The steps of the config's test pipeline; an empty list if the config has no test_dataloader."""
    return list(test_dataset(cfg).get('pipeline', ())) if cfg.get('test_dataloader') else []


def loads_annotations(step: dict) -> bool:
    """Whether a step of a pipeline reads annotations."""
    name = type_name(step)
    return name.startswith('Load') and 'Annotation' in name


def without_annotations(node: Any) -> Any:
    """A pipeline without the steps, at any depth, that read annotations."""
    if isinstance(node, dict):
        return {key: without_annotations(value) for key, value in node.items()}
    if not isinstance(node, list):
        return node
    steps = [without_annotations(s) for s in node if not (isinstance(s, dict) and loads_annotations(s))]
    return [step for step in steps if step != []]


class WindowedImage:
    """An image file of which only windows are read, by pyvips, with the pixels that OpenCV would give.

    ``image[rows, columns]`` is an array (h, w, channels), colours in the order BGR. Decoded pixels are not kept in
    memory: pyvips reads tiles and strips of TIFF files as they are needed, and unpacks other formats into a temporary
    file.

    Args:
        path: the file.
        shape: (height, width, channels) of the result; grey files may be repeated to 3 channels.
    """

    def __init__(self, path: str, shape: tuple[int, int, int]) -> None:
        self.path, self.shape = path, shape

    @classmethod
    def open(cls, path: str, above: int, color_type: str = 'color') -> 'WindowedImage | None':
        """Open a large image, or return None if pyvips is missing or might read other pixels than OpenCV.

        Args:
            path: the file.
            above: return None for images with no more pixels a side.
            color_type: as mmcv has it; 'color' for 8 bits and 3 channels, 'unchanged' for what the file has.

        Raises:
            OSError: the file is truncated.
        """
        try:
            import pyvips
        except (ImportError, OSError):  # OSError: pyvips without its library
            return None
        try:
            image = pyvips.Image.new_from_file(path)
            if max(image.width, image.height) <= above:
                return None
            fits = image.interpretation in ('b-w', 'grey16', 'rgb', 'rgb16', 'srgb', 'multiband')
            fits = fits and not (image.get_typeof('orientation') and image.get('orientation') != 1)
            if color_type == 'color':
                fits = fits and image.format == 'uchar' and image.bands in (1, 3)
            else:
                fits = fits and color_type == 'unchanged' and image.format in ('uchar', 'ushort') and image.bands != 2
            if not fits:
                return None
        except pyvips.Error:
            return None  # unknown to pyvips
        try:
            pyvips.Image.new_from_file(path, access='sequential', fail_on='truncated').avg()
        except pyvips.Error as error:
            raise OSError(f'it is truncated or damaged ({error.detail.strip()})') from error
        return cls(path, (image.height, image.width, 3 if color_type == 'color' else image.bands))

    @cached_property
    def _file(self) -> Any:
        import pyvips

        return pyvips.Image.new_from_file(self.path)

    def __getstate__(self) -> dict[str, Any]:
        return {'path': self.path, 'shape': self.shape}

    def __getitem__(self, window: tuple[slice, slice]) -> np.ndarray:
        (top, bottom, _), (left, right, _) = (s.indices(n) for s, n in zip(window, self.shape[:2], strict=True))
        return self._pixels(self._file.crop(left, top, right - left, bottom - top))

    def resized(self, scale: float) -> np.ndarray:
        """The whole image, made smaller."""
        return self._pixels(self._file.resize(scale))

    def _pixels(self, image: Any) -> np.ndarray:
        pixels = image.numpy()
        pixels = pixels if pixels.ndim == 3 else pixels[..., None]
        if pixels.shape[2] >= 3:
            pixels = pixels[..., [2, 1, 0, *range(3, pixels.shape[2])]]
        return np.ascontiguousarray(np.broadcast_to(pixels, (*pixels.shape[:2], self.shape[2])))


def image_reader(cfg: Config, windows_above: int | None = None) -> Callable[[str], Any]:
    """A function that reads image files as the ``LoadImageFromFile`` step of the config's test pipeline does.

    See :func:`pipeline_reader`.
    """
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    return pipeline_reader(test_pipeline(cfg), windows_above)


def pipeline_reader(pipeline: Sequence[dict], windows_above: int | None = None) -> Callable[[str], Any]:
    """A function that reads image files as the ``LoadImageFromFile`` step of a pipeline does.

    Without such a step images are read as 8-bit BGR. The result is (H, W, channels), in the depth and with the channels
    of the file if the step has ``color_type='unchanged'``; colours are in the order BGR. Missing, damaged and unknown
    files raise InputError.

    Args:
        pipeline: the steps.
        windows_above: return a :class:`WindowedImage`, where pyvips can read one, of images with more pixels a side.
    """
    step = next((s for s in pipeline if str(s['type']).endswith('LoadImageFromFile')), None)
    loader = TRANSFORMS.build(dict(step)) if step is not None else None
    options = {key: value for key, value in (step or {}).items() if value not in (None, False)}
    color_type = options.pop('color_type', 'color')
    plain = options.pop('imdecode_backend', 'cv2') == 'cv2' and options.keys() <= {'type', '_scope_'}

    def read(path: str) -> Any:
        try:
            if windows_above is not None and plain:
                windows = WindowedImage.open(path, windows_above, color_type)
                if windows is not None:
                    return windows
            require_intact(path)
            image = loader({'img_path': path})['img'] if loader else mmcv.imread(path)
        except Exception as error:  # decoders raise many kinds
            raise InputError(f'image {path} cannot be read: {one_line(error)}') from error
        if image is None:
            raise InputError(f'image {path} cannot be decoded: expected a JPEG, PNG or TIFF file')
        return image if image.ndim == 3 else image[..., None]

    return read


def overview(image: 'np.ndarray | WindowedImage', side: int) -> np.ndarray:
    """An image (H, W, channels) with at most ``side`` pixels a side."""
    scale = side / max(image.shape[:2])
    if scale >= 1:
        return image[:, :]
    if isinstance(image, WindowedImage):
        return image.resized(scale)
    height, width = (max(1, round(scale * length)) for length in image.shape[:2])
    small = cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA)
    return small if small.ndim == 3 else small[..., None]


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
