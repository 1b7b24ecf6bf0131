"""Predict with a detector or segmentor on images and videos, and draw and save the predictions.

Labels are always class ids, indices into ``classes`` from 0, whatever ids the annotations of the data set use.
"""

import glob
import hashlib
import json
import os
import warnings
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import groupby, islice
from pathlib import Path
from typing import Any, NamedTuple

import cv2
import numpy as np
from mmcv import VideoReader
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from mmengine.structures import BaseDataElement
from PIL import Image

from swin_mm.engine.drawing import class_ids_of_segments, classes_and_palette, draw_prediction
from swin_mm.engine.images import WindowedImage, displayable, image_reader, overview, without_annotations
from swin_mm.engine.inference import prepare_for_inference
from swin_mm.engine.runner import load_complete
from swin_mm.engine.tiles import encode_mask, is_larger, predict_tiles, require_tile, resized_sample
from swin_mm.engine.tta import apply_tta
from swin_mm.openmmlab.config import config_errors, test_dataset
from swin_mm.openmmlab.loading import read_for_mmengine
from swin_mm.utils.errors import InputError
from swin_mm.utils.files import atomic_write

IMAGES = ('.bmp', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp')
VIDEOS = ('.avi', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.webm', '.wmv')
LONGEST_NAME = 245  # bytes; file systems take 255, with the suffix
LARGEST_PICTURE = 4096  # pixels a side, of the drawings of tiled images


class View(NamedTuple):
    """An image, or a frame of a video."""

    name: str  # name of its outputs, without suffix
    image: np.ndarray | WindowedImage  # (H, W, channels) as it was read, in the order BGR

    @property
    def picture(self) -> np.ndarray:
        """The image to draw on, (H, W, 3) RGB."""
        return displayable(self.image[:, :])


class Predictor:
    """A model with its weights, built by mmdet's or mmseg's inferencer.

    Args:
        cfg: the config; it is changed.
        checkpoint: file or address; None if the config's model is an exported file, see
            :func:`swin_mm.analysis.runtime.use_exported`.
        device: a torch device, such as 'cuda:0'.
        dtype: see :func:`swin_mm.engine.inference.set_autocast`.
        tta: test-time augmentation.
        score_thr: leave out objects of a lower score.
        tile: predict on tiles of this many pixels a side, and merge; None for whole images.
        overlap: share of a tile that it has in common with the next.

    Raises:
        InputError: the config does not predict objects or segments, or does not fit the options.
        CheckpointError: the checkpoint cannot be read, or does not cover the model.
    """

    def __init__(
        self,
        cfg: Config,
        checkpoint: str | None,
        device: str,
        dtype: str = 'fp32',
        tta: bool = False,
        score_thr: float = 0.3,
        tile: int | None = None,
        overlap: float = 0.2,
    ) -> None:
        self.detects = cfg.get('default_scope') == 'mmdet'
        if cfg.get('default_scope') not in ('mmdet', 'mmseg') or 'test_dataloader' not in cfg:
            raise InputError(
                f'{cfg.filename} does not predict objects or segments: default_scope should be mmdet or mmseg, and '
                'there should be a test_dataloader, whose pipeline prepares the images'
            )
        if tile is not None:
            require_tile(tile, overlap)
        self.score_thr, self.tile, self.overlap = score_thr, tile, overlap
        content: dict[str, Any] = read_for_mmengine(checkpoint) if checkpoint else {}
        init_default_scope(cfg.default_scope)
        with config_errors(cfg):
            self.read = image_reader(cfg, windows_above=tile)
        if tta:
            apply_tta(cfg)
        dataset = cfg.test_dataloader.dataset = test_dataset(cfg)
        dataset.pipeline = without_annotations(dataset.pipeline)
        cfg.visualizer = {'type': f'{"Det" if self.detects else "Seg"}LocalVisualizer'}  # inferencers ask for one
        if self.detects:
            from mmdet.apis import DetInferencer as Inferencer
        else:
            from mmseg.apis import MMSegInferencer as Inferencer
        with config_errors(cfg), warnings.catch_warnings():
            warnings.simplefilter('ignore')  # they warn that there are no weights, which come next
            metainfo = DATASETS.build(dict(dataset, lazy_init=True)).metainfo
            self.inferencer = Inferencer(cfg, None, device=device)
        if checkpoint:
            load_complete(self.inferencer.model, content['state_dict'], checkpoint)
        self.inferencer.model = prepare_for_inference(self.inferencer.model, dtype)
        # An exported file has names and colours of its own.
        meta = content.get('meta') or getattr(self.inferencer.model, 'file_meta', {})
        self.classes, self.palette = classes_and_palette(metainfo, meta.get('dataset_meta') or meta)

    def predict(self, views: Iterable[View], batch_size: int = 1) -> Iterator[tuple[View, BaseDataElement]]:
        """Predict in batches; one sample for each view, on the CPU.

        The masks of tiled views are a list of :class:`swin_mm.engine.tiles.PlacedMask`.
        """
        views = iter(views)
        while batch := list(islice(views, batch_size)):
            for tiled, group in groupby(batch, lambda v: is_larger(v.image, self.tile)):
                if tiled:
                    yield from ((view, self._predict_tiles(view.image, batch_size)) for view in group)
                else:
                    whole = list(group)
                    yield from zip(whole, self._predict_images([view.image[:, :] for view in whole]), strict=True)

    def _predict_images(self, images: list[np.ndarray]) -> Iterator[BaseDataElement]:
        prepared = (self.inferencer.pipeline(np.ascontiguousarray(image)) for image in images)
        # mmdet pads images to a common size; mmseg requires one.
        for _, group in groupby(prepared, lambda data: self.detects or _shapes(data['inputs'])):
            yield from map(self._clean, self.inferencer.forward(self.inferencer.collate_fn(list(group))))

    def _predict_tiles(self, image: np.ndarray | WindowedImage, batch_size: int) -> BaseDataElement:
        assert self.tile is not None
        found = predict_tiles(image, self._predict_images, self.tile, self.overlap, batch_size, len(self.classes))
        if self.detects:
            from mmdet.structures import DetDataSample as Sample
        else:
            from mmseg.structures import SegDataSample as Sample
        return Sample(**found)

    def _clean(self, sample: BaseDataElement) -> BaseDataElement:
        sample = sample.cpu()
        if 'pred_panoptic_seg' in sample:
            sample.pop('pred_instances', None)  # the same objects before they were merged
        elif 'pred_instances' in sample:
            sample.pred_instances = sample.pred_instances[sample.pred_instances.scores >= self.score_thr]
        return sample

    def draw(self, view: View, sample: BaseDataElement) -> np.ndarray:
        """The picture with the prediction and a legend, (H, W, 3) RGB."""
        if not is_larger(view.image, self.tile):
            return draw_prediction(view.picture, sample, self.classes, self.palette)
        picture = displayable(overview(view.image, LARGEST_PICTURE))
        sample = resized_sample(sample, max(picture.shape[:2]) / max(view.image.shape[:2]))
        return draw_prediction(picture, sample, self.classes, self.palette)

    def save(self, view: View, sample: BaseDataElement, folder: Path) -> None:
        """Write the prediction to files named after the view, see :func:`save_prediction`."""
        save_prediction(sample, view.image.shape[:2], self.classes, self.palette, folder / view.name)


def predict_files(
    predictor: Predictor,
    names: dict[str, str],
    out: Path,
    batch_size: int = 1,
    on_done: Callable[[int], None] = lambda count: None,
    on_skip: Callable[[str, str], None] = lambda path, reason: None,
) -> None:
    """Predict on images and videos, and write pictures to ``out/vis`` and predictions to ``out/pred``.

    Args:
        predictor: the model.
        names: name of the outputs for each path, see :func:`name_outputs`.
        out: folder to write to.
        batch_size: images at a time.
        on_done: called with the number of images or frames that are done.
        on_skip: called with a path that cannot be decoded, and the reason.

    Raises:
        InputError: a file cannot be written.
    """
    rows = enumerate(zip(predictor.classes, predictor.palette, strict=True))
    with atomic_write(out / 'classes.json') as file:
        file.write_text(json.dumps([{'id': i, 'name': name, 'color': rgb} for i, (name, rgb) in rows]))

    def read(paths: Iterable[str]) -> Iterator[View]:
        for path in paths:
            try:
                view = View(names[path], predictor.read(path))
            except InputError as error:
                on_skip(path, str(error))
                continue
            yield view

    def predict(views: Iterable[View]) -> Iterator[tuple[str, np.ndarray]]:
        for view, sample in predictor.predict(views, batch_size):
            predictor.save(view, sample, out / 'pred')
            yield view.name, predictor.draw(view, sample)
            on_done(1)

    for video, paths in groupby(names, is_video):
        if not video:
            for name, drawn in predict(read(paths)):
                with atomic_write(out / f'vis/{name}.jpg') as file:
                    Image.fromarray(drawn).save(file, quality=95, subsampling=0)
            continue
        for path in paths:
            frames = VideoReader(path)
            views = (View(f'{names[path]}/{i:06}', frame) for i, frame in enumerate(frames))
            try:
                write_video(out / f'vis/{names[path]}.mp4', frames.fps, (drawn for _, drawn in predict(views)))
            except EOFError as error:
                on_skip(path, str(error))


def find_inputs(inputs: Iterable[str]) -> list[str]:
    """Every image and video among files, folders and globs, in their order.

    Raises:
        InputError: an entry contains none.
    """
    paths = []
    for entry in inputs:
        if os.path.isfile(entry):
            paths.append(entry)
            continue
        inside = glob.glob(os.path.join(glob.escape(entry), '*') if os.path.isdir(entry) else entry, recursive=True)
        found = sorted(path for path in inside if path.lower().endswith((*IMAGES, *VIDEOS)))
        if not found:
            raise InputError(f'{entry}: no image or video found (looked for {" ".join((*IMAGES, *VIDEOS))})')
        paths += found
    return list(dict.fromkeys(paths))


def name_outputs(paths: list[str]) -> dict[str, str]:
    """A name for the outputs of each path, relative to the folder that all share.

    The suffix is left out unless two names would be equal. Parts too long for a file name with another suffix are cut,
    with a hash in place of their end.
    """
    top = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    names = {path: os.path.relpath(os.path.abspath(path), top) for path in paths}
    stems = Counter(os.path.splitext(name)[0] for name in names.values())
    for path, name in names.items():
        stem = os.path.splitext(name)[0]
        names[path] = os.path.join(*map(_shorten, Path(stem if stems[stem] == 1 else name).parts))
    return names


def is_video(path: str) -> bool:
    """Whether a path has the suffix of a video."""
    return path.lower().endswith(VIDEOS)


def count_pictures(path: str) -> int:
    """The number of frames of a video; 1 for an image."""
    # OpenCV 5 gives a negative number for what it cannot read.
    return max(VideoReader(path).frame_cnt, 1) if is_video(path) else 1


def write_video(path: Path, fps: float, pictures: Iterable[np.ndarray]) -> None:
    """Write RGB pictures of one even size as an MP4 file.

    Raises:
        EOFError: there are none.
        InputError: the file cannot be written.
    """
    with atomic_write(path) as file:
        writer, count = None, 0
        for picture in pictures:
            if writer is None:
                code = cv2.VideoWriter_fourcc(*'mp4v')  # type: ignore[attr-defined]  # missing in OpenCV's stubs
                size = picture.shape[1::-1]
                writer = cv2.VideoWriter(str(file), code, fps or 25, size)
            writer.write(picture[..., ::-1])
            count += 1
        if writer is None:
            raise EOFError('no frame can be read')
        writer.release()
        # OpenCV reports no error when writing fails.
        if int(cv2.VideoCapture(str(file)).get(cv2.CAP_PROP_FRAME_COUNT)) != count:
            raise OSError(f'not all of {count} frames were written; is the disk full?')


def save_prediction(
    sample: BaseDataElement, size: tuple[int, int], classes: Sequence[str], palette: Sequence[tuple], path: Path
) -> None:
    """Write a prediction: objects as JSON, class ids of pixels as PNG, panoptic segments as both.

    Args:
        sample: of mmdet or mmseg, on the CPU.
        size: (height, width) of the image.
        classes: names by class id.
        palette: colours by class id.
        path: of the files, without suffix.

    Raises:
        InputError: a file cannot be written.
    """
    pixels: Image.Image | None = None
    record: dict[str, Any] | None = None
    if 'pred_sem_seg' in sample:
        few = len(classes) <= 256
        pixels = Image.fromarray(sample.pred_sem_seg.data[0].numpy().astype(np.uint8 if few else np.uint16, copy=False))
        if few:
            pixels.putpalette(np.asarray(palette, np.uint8).ravel().tolist())
    elif 'pred_panoptic_seg' in sample:
        pixels, record = _coco_panoptic(sample.pred_panoptic_seg.sem_seg[0].numpy(), classes)
    else:
        objects = sample.pred_instances
        labels = objects.labels.tolist()
        record = {'labels': labels, 'scores': objects.scores.tolist(), 'bboxes': objects.bboxes.tolist()}
        if 'masks' in objects:
            record['masks'] = [encode_mask(mask, size) for mask in objects.masks]
        record['names'] = [classes[label] for label in labels]
    if pixels:
        with atomic_write(path.with_name(f'{path.name}.png')) as file:
            pixels.save(file)
    if record:
        with atomic_write(path.with_name(f'{path.name}.json')) as file:
            file.write_text(json.dumps({'height': size[0], 'width': size[1], **record}))


def _coco_panoptic(ids: np.ndarray, classes: Sequence[str]) -> tuple[Image.Image, dict[str, Any]]:
    """COCO's format: the PNG's red + 256 green is the number of a segment, 0 is void."""
    shape = ids.shape
    ids, index, areas = np.unique(ids, return_inverse=True, return_counts=True)
    known = class_ids_of_segments(ids) < len(classes)
    numbers = np.where(known, known.cumsum(), 0)
    info = [
        {'id': number, 'category_id': label, 'name': classes[label], 'area': area}
        for number, label, area in zip(
            numbers.tolist(), class_ids_of_segments(ids).tolist(), areas.tolist(), strict=True
        )
        if number
    ]
    pixels = numbers[index.reshape(shape)]  # numpy 1 flattens the index
    pixels = np.stack([pixels & 255, pixels >> 8, pixels & 0], axis=-1).astype(np.uint8)
    return Image.fromarray(pixels), {'segments_info': info}


def _shapes(inputs: Any) -> list:
    """The sizes of an image, or of its augmented views."""
    return [view.shape for view in inputs] if isinstance(inputs, list) else inputs.shape


def _shorten(part: str) -> str:
    content = os.fsencode(part)
    if len(content) <= LONGEST_NAME:
        return part
    return content[: LONGEST_NAME - 9].decode(errors='ignore') + '~' + hashlib.sha1(content).hexdigest()[:8]
