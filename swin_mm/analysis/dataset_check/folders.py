"""Datasets of mmseg: which files in the folders are read, and what the values of label maps mean."""

import os
import tempfile
from collections import Counter
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
from mmengine import fileio
from mmengine.registry import TRANSFORMS
from PIL import Image

from swin_mm.analysis.dataset_check.findings import LABELS, MISSING, UNUSED, Finding, listed
from swin_mm.analysis.dataset_check.samples import LabelValues

IMAGE_SUFFIXES = ('.bmp', '.gif', '.jp2', '.jpeg', '.jpg', '.png', '.ppm', '.tif', '.tiff', '.webp')


def unused_files(dataset: Any) -> Iterator[Finding]:
    """Images and label maps in the folders of a ``BaseSegDataset`` that it does not read.

    A dataset with a list of names leaves out the other files on purpose.
    """
    if dataset.ann_file and not os.path.isdir(dataset.ann_file):
        return
    image_folder, map_folder = (dataset.data_prefix.get(key) for key in ('img_path', 'seg_map_path'))
    images, maps = _files(image_folder, dataset), _files(map_folder, dataset) if map_folder else []
    same = bool(map_folder) and os.path.abspath(image_folder) == os.path.abspath(map_folder)
    used = {name[: -len(dataset.img_suffix)] for name in images if name.endswith(dataset.img_suffix)}
    unread = set()
    for name in sorted(images):
        path, (stem, suffix) = os.path.join(image_folder, name), os.path.splitext(name)
        is_map = name.endswith(dataset.seg_map_suffix) if same else map_folder and _is_inside(path, map_folder)
        if suffix.lower() in IMAGE_SUFFIXES and not name.endswith(dataset.img_suffix) and not is_map:
            unread.add(stem)
            yield Finding(UNUSED, f'{path} is not read: the dataset reads images that end with {dataset.img_suffix!r}')
    for name in sorted(maps):
        path, stem = os.path.join(map_folder, name), name.removesuffix(dataset.seg_map_suffix)
        if not name.endswith(dataset.seg_map_suffix) or stem in used or stem in unread:
            continue
        if same or not _is_inside(path, image_folder):
            yield Finding(UNUSED, f'{path} is not read: there is no image {stem}{dataset.img_suffix} in {image_folder}')


def why_empty(dataset: Any) -> str:
    """Why a ``BaseSegDataset`` has no images: the suffix that it looks for, and what the folder holds."""
    folder, suffix = dataset.data_prefix.get('img_path'), dataset.img_suffix
    if dataset.ann_file and not os.path.isdir(dataset.ann_file):
        return f'{dataset.ann_file} lists no images'
    found = Counter(os.path.splitext(name)[1] for name in _files(folder, dataset))
    what = ', '.join(f'{count} {end!r}' for end, count in found.most_common(5)) or 'nothing'
    return f'no images: no file in {folder} ends with {suffix!r} (img_suffix of the dataset); it holds {what}'


def missing_file_findings(paths: Iterable[str]) -> list[Finding]:
    """A finding for each missing file, with a similar one that its folder holds, such as a.JPG for a.jpg."""
    similar: dict[str, dict[str, str]] = {}
    findings = []
    for path in paths:
        folder, name = os.path.split(path)
        if folder not in similar:
            names = os.listdir(folder or '.') if os.path.isdir(folder or '.') else []
            similar[folder] = {os.path.splitext(other)[0].lower(): other for other in names}
        other = similar[folder].get(os.path.splitext(name)[0].lower())
        findings.append(Finding(MISSING, f'{path} (there is {listed([other])})' if other else path))
    return findings


def label_values(dataset: Any, step: dict) -> tuple[LabelValues, list[Finding]]:
    """The labels that the pipeline's own ``LoadAnnotations`` makes of the 256 values of a map.

    Args:
        dataset: A ``BaseSegDataset``.
        step: The config of its ``LoadAnnotations``.
    """
    findings = []
    step = {**step, 'backend_args': None, 'imdecode_backend': 'pillow'}
    reduces = step.pop('reduce_zero_label', None)
    if reduces is not None and bool(reduces) != bool(dataset.reduce_zero_label):
        what = f'reduce_zero_label is {dataset.reduce_zero_label} in the dataset and {reduces} in LoadAnnotations'
        findings.append(Finding(LABELS, f'{what}; mmseg needs the same in both'))
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, 'values.png'))
        Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(path)
        known = {'label_map': dataset.label_map, 'reduce_zero_label': dataset.reduce_zero_label, 'seg_fields': []}
        labels = TRANSFORMS.build(step)({'seg_map_path': path, **known})['gt_seg_map'].ravel()
    return LabelValues(labels, len(dataset.metainfo.get('classes') or ()), dataset.ignore_index), findings


def _files(folder: str, dataset: Any) -> list[str]:
    """Paths of all files below a folder, relative to it."""
    return list(fileio.list_dir_or_file(folder, list_dir=False, recursive=True, backend_args=dataset.backend_args))


def _is_inside(path: str, folder: str) -> bool:
    return os.path.abspath(path).startswith(os.path.join(os.path.abspath(folder), ''))
