"""Decode the files of one sample and check its annotations; this runs in the worker processes."""

import io
import os
import warnings
from dataclasses import dataclass, field
from hashlib import blake2b

import mmcv
import numpy as np
from mmengine import fileio
from PIL import Image, UnidentifiedImageError
from PIL.TiffImagePlugin import ImageFileDirectory_v2

from swin_mm.analysis.dataset_check.findings import (
    BOXES,
    CHANNELS,
    LABELS,
    MASKS,
    NO_LABELS,
    SIZES,
    UNREADABLE,
    Finding,
    listed,
    plural,
    short,
)
from swin_mm.analysis.dataset_check.masks import Extent, MaskError, mask_extent, overlap

# Pillow knows further formats, some of which it hands to other programs (EPS to Ghostscript).
FORMATS = {'BMP', 'GIF', 'JPEG', 'JPEG2000', 'PNG', 'PPM', 'TIFF', 'WEBP'} & {*Image.registered_extensions().values()}
TIFF_MAGIC = (b'II*\0', b'MM\0*')
EXIF_ORIENTATION = 0x0112  # from 5 on, width and height are exchanged


@dataclass(frozen=True)
class Sample:
    """An image and what a dataset says about it.

    Args:
        image: Path.
        size: (width, height) by the annotation file.
        label_map: Path of a map of class numbers or of segment ids.
        annotations: COCO's annotations, those with all required keys.
    """

    image: str
    size: tuple[int, int] | None = None
    label_map: str | None = None
    annotations: list[dict] | None = None


@dataclass(frozen=True)
class LabelValues:
    """What the values of a label map mean.

    Args:
        labels: (256,) the label that the loader makes of each value.
        num_classes: Labels below this are classes.
        ignore_index: The label that the loss ignores.
    """

    labels: np.ndarray
    num_classes: int
    ignore_index: int

    @property
    def is_ignored(self) -> np.ndarray:
        """(256,) whether a value is ignored."""
        return self.labels == self.ignore_index

    @property
    def is_class(self) -> np.ndarray:
        """(256,) whether a value is a class."""
        return (self.labels < self.num_classes) & ~self.is_ignored

    def describe(self) -> str:
        """Which values are allowed, in words."""
        return f'classes are the values {_ranges(self.is_class)}; ignored: {_ranges(self.is_ignored)}'


@dataclass(frozen=True)
class Task:
    """What to look for in the samples of a dataset.

    Args:
        values: For maps of class numbers.
        segments: Whether the maps hold the ids of panoptic segments.
        masks: Whether training needs a mask with each annotation.
        backend: mmcv's decoder of label maps.
        backend_args: For mmengine's file reader.
    """

    values: LabelValues | None = None
    segments: bool = False
    masks: bool = False
    backend: str = 'pillow'
    backend_args: dict | None = None


@dataclass
class Facts:
    """What was found in a sample."""

    findings: list[Finding] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # paths
    size: tuple[int, int] | None = None  # (width, height) of the image
    digest: bytes | None = None  # of the image file
    counts: np.ndarray | None = None  # (256,) pixels of the label map by value

    @property
    def is_clean(self) -> bool:
        """Whether training can use the sample."""
        return not self.findings and not self.missing and self.size is not None


def inspect_sample(sample: Sample, task: Task) -> Facts:
    """Decode the files of a sample and check its annotations."""
    facts = Facts()
    content, image = _decode(sample.image, task, facts)
    if content is not None:
        facts.digest = blake2b(content, digest_size=16).digest()
    del content
    note = ''
    if image is not None:
        facts.size = _size(image)
        if _is_turned(image):
            facts.size, note = facts.size[::-1], ' (as its EXIF orientation turns it)'
        if sample.size and facts.size != sample.size:
            message = f'{sample.image} is {_by(facts.size)}{note}; the annotation file says {_by(sample.size)}'
            facts.findings.append(Finding(SIZES, message))
    if sample.label_map:
        _inspect_map(sample, task, facts, note)
    # Masks are checked against the size that the file states, which may be anything: not much larger than the image.
    size = sample.size if sample.size and sample.size[0] * sample.size[1] <= _pixel_limit() else None
    for annotation in sample.annotations or ():
        for kind, what in _annotation_faults(annotation, size, task.masks):
            facts.findings.append(Finding(kind, f'annotation {short(annotation["id"])} of {sample.image}: {what}'))
    return facts


def read_file(path: str, backend_args: dict | None) -> bytes:
    """The content of a regular file, or of what a remote backend gives.

    Raises:
        OSError: it cannot be read, or is a pipe or a device, which might never end.
    """
    if os.path.exists(path) and not os.path.isfile(path):
        raise OSError('is not a regular file')
    return fileio.get(path, backend_args=backend_args)


def _decode(path: str, task: Task, facts: Facts) -> tuple[bytes | None, Image.Image | np.ndarray | None]:
    """Read and decode an image; what goes wrong is added to the facts."""
    content = None
    try:
        content = read_file(path, task.backend_args)
        return content, _decode_bytes(content)
    except FileNotFoundError:
        facts.missing.append(path)
    except Image.DecompressionBombError:
        limit = f'{_pixel_limit() // 10**6} million pixels'
        facts.findings.append(Finding(UNREADABLE, f'{path}: more than {limit} are not decoded; cut it into tiles'))
    except Exception as error:  # decoders raise many kinds
        facts.findings.append(Finding(UNREADABLE, f'{path}: {error or type(error).__name__}'))
    return content, None


def _decode_bytes(content: bytes) -> Image.Image | np.ndarray:
    """Decode all pixels.

    Raises:
        Image.DecompressionBombError: there are more than Pillow's limit.
        Exception: something else that a decoder raises.
    """
    if not content:
        raise ValueError('the file is empty')
    if content.startswith(b'version https://git-lfs'):
        raise ValueError('a pointer of Git LFS instead of the file; fetch it with: git lfs pull')
    with warnings.catch_warnings():
        warnings.simplefilter('ignore')  # half the limit, and oddities of metadata
        try:
            image = Image.open(io.BytesIO(content), formats=sorted(FORMATS))
        except UnidentifiedImageError:
            if not content.startswith(TIFF_MAGIC):
                raise ValueError(f'not an image in any of the formats {", ".join(sorted(FORMATS))}') from None
            return _decode_tiff(content)
        image.load()
        return image


def _decode_tiff(content: bytes) -> np.ndarray:
    """Decode a TIFF of a pixel type that Pillow does not have, such as floating-point colours, as mmcv does."""
    tags = ImageFileDirectory_v2(content[:8])
    stream = io.BytesIO(content)
    stream.seek(tags.next)
    tags.load(stream)
    if tags[256] * tags[257] > _pixel_limit():
        raise Image.DecompressionBombError
    array = mmcv.imfrombytes(content, flag='unchanged')
    if array is None:
        raise ValueError('a TIFF that OpenCV cannot decode')
    return array


def _pixel_limit() -> int:
    return 2 * (Image.MAX_IMAGE_PIXELS or 2**30)  # Pillow warns at half of this


def _size(image: Image.Image | np.ndarray) -> tuple[int, int]:
    """(width, height)."""
    return image.size if isinstance(image, Image.Image) else (image.shape[1], image.shape[0])


def _is_turned(image: Image.Image | np.ndarray) -> bool:
    return isinstance(image, Image.Image) and image.getexif().get(EXIF_ORIENTATION, 1) >= 5


def _by(size: tuple[int, int]) -> str:
    return f'{size[0]} x {size[1]}'


# Label maps


def _inspect_map(sample: Sample, task: Task, facts: Facts, note: str) -> None:
    path = str(sample.label_map)
    content, image = _decode(path, task, facts)
    if content is None or image is None:
        return
    if facts.size and _size(image) != facts.size:
        message = f'{sample.image} is {_by(facts.size)}{note}; its map {path} is {_by(_size(image))}'
        facts.findings.append(Finding(SIZES, message))
    if task.segments:
        facts.findings += _segment_faults(path, image, sample.annotations or [])
    if task.values is None:
        return
    if task.backend == 'pillow':
        values = np.asarray(image)
    else:
        values = mmcv.imfrombytes(content, flag='unchanged', backend=task.backend)
        if values is None:
            facts.findings.append(Finding(UNREADABLE, f'{path}: imdecode_backend={task.backend!r} cannot decode it'))
            return
    values = values.squeeze() if values.ndim > 2 else values
    if values.ndim > 2:
        what = f'{values.shape[2]} channels; expected one channel of class numbers, not colours'
        facts.findings.append(Finding(CHANNELS, f'{path} has {what}'))
    elif values.dtype.kind == 'f':
        facts.findings.append(Finding(LABELS, f'{path} holds floating-point values; expected class numbers of 8 bits'))
    else:
        facts.counts, message = _count_values(values)
        faults = [(LABELS, message), *_label_faults(facts.counts, task.values, not message)]
        facts.findings += [Finding(kind, f'{path}: {what}') for kind, what in faults if what]


def _count_values(values: np.ndarray) -> tuple[np.ndarray, str]:
    """Pixels of a map by value from 0 to 255, and a message about values beyond."""
    if values.dtype.itemsize == 1:
        return np.bincount(values.astype(np.uint8).ravel(), minlength=256), ''
    within = (values >= 0) & (values <= 255)
    counts = np.bincount(values[within].astype(np.uint8), minlength=256)
    if within.all():
        return counts, ''
    outside = values[~within]
    span = f'from {outside.min()} to {outside.max()}' if outside.min() < outside.max() else f'{outside.min()}'
    return counts, f'{plural(outside.size, "pixel")} of value {span}; maps have 8 bits, so values from 0 to 255'


def _label_faults(counts: np.ndarray, values: LabelValues, complete: bool) -> list[tuple[str, str]]:
    """Values that are no class, and maps of which every pixel is ignored.

    Args:
        counts: (256,) pixels by value.
        values: What they mean.
        complete: Whether there are no values beyond these.
    """
    present = counts > 0
    wrong = (present & ~values.is_class & ~values.is_ignored).nonzero()[0]
    if len(wrong):
        each = [f'{v} (label {values.labels[v]}, {plural(int(counts[v]), "pixel")})' for v in wrong[:4]]
        more = f' and {len(wrong) - 4} more' if len(wrong) > 4 else ''
        return [(LABELS, f'value {", ".join(each)}{more}; {values.describe()}')]
    if complete and not (present & values.is_class).any():
        return [(NO_LABELS, f'every pixel is ignored (values {_ranges(present)}); {values.describe()}')]
    return []


def _ranges(mask: np.ndarray) -> str:
    """Which of the values are true: '0, 3-7'; 'none' if none is."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], mask.astype(np.int8), [0]])))
    pairs = [(start, end - 1) for start, end in zip(edges[::2], edges[1::2], strict=True)]
    shown = [f'{first}-{last}' if first < last else f'{first}' for first, last in pairs]
    return ', '.join(shown[:8]) + (', ...' if len(shown) > 8 else '') or 'none'


def _segment_faults(path: str, image: Image.Image | np.ndarray, annotations: list[dict]) -> list[Finding]:
    """Segments of a panoptic map that are not annotated, and the other way round."""
    if not isinstance(image, Image.Image):
        return [Finding(CHANNELS, f'{path} is not an RGB image of segment ids')]
    channels = np.asarray(image.convert('RGB')).astype(np.uint32)
    ids = set(np.unique(channels @ np.array([1, 256, 65536], np.uint32)).tolist()) - {0}
    annotated = {annotation['id'] for annotation in annotations}
    return [
        Finding(LABELS, f'{path}: segments {listed(sorted(lost, key=str), 5)} are not in {where}')
        for lost, where in ((annotated - ids, 'its pixels'), (ids - annotated, 'the annotation file'))
        if lost
    ]


# Annotations


def _annotation_faults(annotation: dict, size: tuple[int, int] | None, needs_mask: bool) -> list[tuple[str, str]]:
    """Why mmdet leaves out a COCO annotation, fails on it, or learns something wrong from it."""
    x, y, w, h = (float(number) for number in annotation['bbox'])
    box = f'box {short(annotation["bbox"])}'
    extent, faults = None, []
    mask = annotation.get('segmentation')
    if not mask:
        faults += [(MASKS, 'no mask')] if needs_mask else []
    elif size:
        try:
            extent = mask_extent(mask, *size)
        except MaskError as error:
            faults.append((MASKS, str(error)))
    if not np.isfinite([x, y, w, h]).all() or w < 1 or h < 1:
        faults.append((BOXES, f'{box} (x, y, width, height) is less than a pixel wide or high'))
    elif what := _box_fault((x, y, w, h), extent, size):
        faults.append((BOXES, f'{box} {what}'))
    elif not float(annotation['area']) > 0:
        faults.append((BOXES, f'area {short(annotation["area"])}; expected a positive number'))
    return faults


def _box_fault(box: Extent, extent: Extent | None, size: tuple[int, int] | None) -> str:
    """Whether a box lies outside the image or does not belong to its mask."""
    x, y, w, h = box
    corners = (x, y, x + w, y + h)
    outside = size and (x < -1 or y < -1 or corners[2] > size[0] + 1 or corners[3] > size[1] + 1)
    # Two pixels either way are rounding, which counts for much in small boxes.
    differs = extent and overlap(corners, extent) < 0.5 and np.abs(np.subtract(corners, extent)).max() > 2
    if differs and extent:
        is_corners = overlap(box, extent) > 0.8
    else:
        is_corners = bool(outside and size and 0 <= x < w <= size[0] + 1 and 0 <= y < h <= size[1] + 1)
    hint = ': it looks like x1, y1, x2, y2, where COCO has x, y, width, height' if is_corners else ''
    if differs and extent and (is_corners or not outside):
        return f'contradicts its mask, which spans {[round(v, 1) for v in extent]} (x1, y1, x2, y2){hint}'
    return f'reaches outside the image of {_by(size)}{hint}' if outside and size else ''
