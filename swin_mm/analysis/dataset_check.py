"""Reading a whole data set before a long training: what is missing, broken or wrong in it, and what it is made of."""

import io
import itertools
import tempfile
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import redirect_stdout
from dataclasses import dataclass, field
from functools import partial
from hashlib import blake2b
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from mmengine import fileio
from mmengine.config import Config
from mmengine.registry import DATASETS, TRANSFORMS, init_default_scope
from PIL import Image
from rich.progress import track

from swin_mm.openmmlab.config import reads_segments
from swin_mm.utils.errors import InputError

LOADING, MISSING, DECODING, SIZES = 'annotation files', 'missing files', 'files that do not decode', 'sizes that differ'
LABELS, BOXES, MASKS = 'labels out of range', 'boxes empty or invalid', 'masks empty or invalid'
CLASSES, SHARED = 'classes of data, config and heads', 'images of train in other parts'
Problems = list[tuple[str, str]]  # one of these kinds, and where and what
NO_HEADS = {'backbone', 'neck', 'rpn_head', 'semantic_head', 'data_preprocessor', 'train_cfg', 'test_cfg'}
TURNED = 0x0112  # the EXIF tag of the orientation; from 5 on width and height change places


class Sample(NamedTuple):
    """An image and what is said about it."""

    image: str
    size: tuple[int, int] | None = None  # (width, height) by the annotation file
    labels: str | None = None  # file of a map of labels or segments
    annotations: list[dict] | None = None  # COCO's


class Facts(NamedTuple):
    """What a worker found in a sample."""

    problems: Problems
    size: tuple[int, int] | None = None  # (width, height) of the image
    digest: bytes | None = None
    counts: np.ndarray | None = None  # pixels by value in the map of labels


@dataclass
class Part:
    """What train, val or test is made of; parts that read the same are one."""

    name: str
    classes: list[str] = field(default_factory=list)
    images: dict[str, bytes | None] = field(default_factory=dict)  # digests by path
    sizes: list[tuple[int, int]] = field(default_factory=list)
    amounts: Counter = field(default_factory=Counter)  # objects or pixels by number of the class
    objects: list[float] = field(default_factory=list)  # square roots of areas of boxes, in pixels
    problems: Problems = field(default_factory=list)


def check(cfg: Config, names: list[str], workers: int | None = None) -> list[Part]:
    """Read all that the dataloaders of some of 'train', 'val' and 'test' would, in as many processes as ``workers``.

    Raises:
        InputError: a dataset is neither of COCO's nor of mmseg's kind.
    """
    init_default_scope(cfg.default_scope)
    parts: dict[str, Part] = {}
    with ProcessPoolExecutor(workers) as pool:
        spread = map if workers == 1 else partial(pool.map, chunksize=16)
        for name in names:
            leaves = list(_leaves(cfg[f'{name}_dataloader'].dataset))
            if (key := str(leaves)) in parts:
                parts[key].name += f', {name}'
                continue
            part = parts[key] = Part(name)
            for leaf in leaves:
                _read(leaf, part, spread)
            for head, count in _heads(cfg.get('model')):
                if count != len(part.classes):
                    what = f'{name}: model.{head} is made for {count} classes, the dataset names {len(part.classes)}'
                    part.problems.append((CLASSES, what))
    _compare(list(parts.values()))
    return list(parts.values())


def _leaves(dataset: dict) -> Iterator[dict]:
    """The datasets inside wrappers."""
    inside = dataset.get('datasets') or ([dataset['dataset']] if 'dataset' in dataset else [])
    for node in inside:
        yield from _leaves(node)
    if not inside:
        yield dataset


def _heads(node: Any, path: str = '') -> Iterator[tuple[str, int]]:
    """How many classes each head of a model has."""
    if isinstance(node, (list, tuple)):
        node = dict(enumerate(node))
    if not isinstance(node, dict):
        return
    if 'num_things_classes' in node:
        yield path, node['num_things_classes'] + node.get('num_stuff_classes', 0)
    elif 'num_classes' in node:
        yield path, node['num_classes']
    for key, child in node.items():
        if key not in NO_HEADS:
            yield from _heads(child, f'{path}.{key}'.lstrip('.'))


def _compare(parts: list[Part]) -> None:
    """Look for images of train in the other parts."""
    train = next((part for part in parts if part.name.startswith('train')), None)
    known = {digest: path for path, digest in train.images.items() if digest} if train else {}
    for part in parts:
        if part is not train:
            for path, digest in part.images.items():
                if digest in known:
                    what = 'is also read' if known[digest] == path else f'is the same as {known[digest]}'
                    part.problems.append((SHARED, f'{path} ({part.name}) {what} in train'))


def _read(leaf: dict, part: Part, spread: Callable) -> None:
    """Add what one dataset holds to a part."""
    try:
        dataset = DATASETS.build({**leaf, 'pipeline': [], 'lazy_init': True, 'serialize_data': False})
    except Exception as error:
        raise InputError(f'the dataset of {part.name} cannot be built: {error} (--debug shows where)') from error
    kinds = {base.__name__ for base in type(dataset).__mro__}
    if not kinds & {'CocoDataset', 'BaseSegDataset'}:
        raise InputError(
            f'{part.name}: {type(dataset).__name__} cannot be checked, only heirs of CocoDataset and of BaseSegDataset'
        )
    part.classes = dataset.metainfo.get('classes') or []
    lut, kept = None, []
    if 'CocoDataset' in kinds:  # it forgets the file, of which it leaves out what is invalid
        dataset.COCOAPI = lambda path: kept.append(type(dataset).COCOAPI(path)) or kept[0]
    try:
        with redirect_stdout(io.StringIO()):
            dataset.full_init()
        if not len(dataset):
            raise ValueError('no images')
        if 'CocoDataset' in kinds:
            samples = _coco_samples(dataset, kept[0].dataset if kept else fileio.load(dataset.ann_file), leaf, part)
        else:
            samples = [Sample(info['img_path'], labels=info.get('seg_map_path')) for info in dataset.data_list]
            lut = _meaning_of_values(dataset, leaf)
    except Exception as error:
        where = dataset.ann_file or dataset.data_prefix
        hint = _who_lacks(error.args[0], kept[0].dataset) if isinstance(error, KeyError) and kept else ''
        part.problems.append((LOADING, f'{where} does not load: {type(error).__name__}: {error}{hint}'))
        return

    work = partial(
        _inspect,
        masks="'with_mask': True" in str(leaf.get('pipeline')),
        segments='CocoPanopticDataset' in kinds,
        backend_args=dataset.backend_args,
    )
    found = track(spread(work, samples), part.name, len(samples))
    for sample, facts in zip(samples, found, strict=True):
        part.problems += facts.problems
        part.images[sample.image] = facts.digest
        part.sizes += [facts.size] if facts.size else []
        if lut is not None and facts.counts is not None:
            for value in facts.counts.nonzero()[0]:
                label, count = int(lut[value % 256]), int(facts.counts[value])  # the loader keeps 8 bits
                if value > 255 or (label >= len(part.classes) and label != dataset.ignore_index):
                    what = f'{count} pixels of value {value}'
                    what += f' (label {label} of {len(part.classes)} classes)' if value < 256 else ', maps have 8 bits'
                    part.problems.append((LABELS, f'{sample.labels}: {what}'))
                elif label != dataset.ignore_index:
                    part.amounts[label] += count


def _who_lacks(key: str, content: dict) -> str:
    """The first entry of a COCO file without a key."""
    kind = 'images' if key in ('file_name', 'height', 'width') else 'annotations'
    entries = (one for entry in content.get(kind, ()) for one in entry.get('segments_info', [entry]))
    return next((f' is lacking in {kind}, id {entry.get("id")}' for entry in entries if key not in entry), '')


def _meaning_of_values(dataset: Any, leaf: dict) -> np.ndarray:
    """The label that each of the 256 values of a map comes to by the pipeline's own step."""
    steps = [dict(step) for step in leaf.get('pipeline', ()) if str(step.get('type')).endswith('LoadAnnotations')]
    step = {**(steps or [{'type': 'LoadAnnotations'}])[0], 'backend_args': None}
    with tempfile.TemporaryDirectory() as folder:
        path = str(Path(folder, 'values.png'))
        Image.fromarray(np.arange(256, dtype=np.uint8).reshape(16, 16)).save(path)
        told = {'label_map': dataset.label_map, 'reduce_zero_label': dataset.reduce_zero_label, 'seg_fields': []}
        return TRANSFORMS.build(step)({'seg_map_path': path, **told})['gt_seg_map'].ravel()


def _coco_samples(dataset: Any, content: dict, leaf: dict, part: Part) -> list[Sample]:
    """Samples of a COCO-like dataset; what the annotation file tells by itself is looked at here."""
    names = {category['id']: category['name'] for category in content['categories']}
    label = {name: index for index, name in enumerate(part.classes)}

    def report(kind: str, what: str) -> None:
        part.problems.append((kind, f'{dataset.ann_file}: {what}'))

    if unknown := [name for name in label if name not in names.values()]:
        report(CLASSES, f'no category is called {", ".join(map(repr, unknown))}, as classes of the config are')
    if unnamed := [name for name in names.values() if name not in label]:
        report(CLASSES, f'objects of {", ".join(map(repr, unnamed))} are left out: no class of the config')
    order = [name for name in names.values() if name in label]
    if not unknown and order != list(part.classes):
        report(CLASSES, f'mmdet numbers classes as the categories stand here: {order}, the config: {part.classes}')

    by_image = defaultdict(list)
    for entry in content.get('annotations', ()):  # panoptic ones hold several
        by_image[entry['image_id']] += entry.get('segments_info', [entry])
    if lost := by_image.keys() - {image['id'] for image in content['images']}:
        report(LOADING, f'annotations of images that are not listed: {sorted(lost)[:10]}')
    for annotation in itertools.chain(*by_image.values()):
        if annotation['category_id'] not in names:
            report(CLASSES, f'annotation {annotation["id"]} has the unknown category {annotation["category_id"]}')
    segments = reads_segments(leaf.get('pipeline', ()))
    samples = []
    for info in dataset.data_list:
        annotations = by_image[info['img_id']]
        for annotation in annotations:
            if names.get(annotation['category_id']) in label and not annotation.get('iscrowd'):
                part.amounts[label[names[annotation['category_id']]]] += 1
                if (area := annotation['bbox'][2] * annotation['bbox'][3]) > 0:
                    part.objects.append(area**0.5)
        maps = info['seg_map_path'] if segments else None
        samples.append(Sample(info['img_path'], (info['width'], info['height']), maps, annotations))
    return samples


def _inspect(sample: Sample, masks: bool, segments: bool, backend_args: dict | None) -> Facts:
    """Decode the files of a sample and look at its annotations; runs in a worker.

    Args:
        sample: What to look at.
        masks: Whether training reads a mask with each annotation.
        segments: Whether the map holds ids of the annotations rather than labels.
        backend_args: Of mmengine's file reader.
    """
    problems: Problems = []
    Image.MAX_IMAGE_PIXELS = None
    size = counts = None
    content, image = _decode(sample.image, backend_args, problems)
    if image:
        turned = image.getexif().get(TURNED, 1) >= 5
        size = image.size[::-1] if turned else image.size
        found = f'{sample.image} is {_by(size)}' + ' as its EXIF tag turns it' * turned
        if sample.size and size != sample.size:
            problems.append((SIZES, f'{found}, by the annotation file {_by(sample.size)}'))
    if sample.labels:
        _, labels = _decode(sample.labels, backend_args, problems)
        if labels and image and labels.size != size:
            problems.append((SIZES, f'{found}, its map {sample.labels} {_by(labels.size)}'))
        if labels and segments:
            channels = np.asarray(labels.convert('RGB')).astype(np.uint32)
            ids = set(np.unique(channels @ np.array([1, 256, 65536], np.uint32)).tolist()) - {0}
            listed = {annotation['id'] for annotation in sample.annotations}
            for lost, where in ((listed - ids, 'in its pixels'), (ids - listed, 'in the annotation file')):
                if lost:
                    problems.append((LABELS, f'{sample.labels}: segments {sorted(lost)[:5]} are not {where}'))
        elif labels and sample.annotations is None:
            values = np.asarray(labels)
            if values.ndim == 2:
                counts = np.bincount(values.ravel())
            else:
                problems.append((LABELS, f'{sample.labels} has {values.shape[2]} channels instead of one of labels'))
    for annotation in sample.annotations or ():
        for kind, what in _annotation_problems(annotation, *sample.size, masks):
            problems.append((kind, f'annotation {annotation["id"]} of {sample.image}: {what}'))
    return Facts(problems, size, content and blake2b(content, digest_size=16).digest(), counts)


def _by(size: tuple[int, int]) -> str:
    return f'{size[0]} × {size[1]}'


def _decode(path: str, backend_args: dict | None, problems: Problems) -> tuple[bytes | None, Image.Image | None]:
    content = None
    try:
        content = fileio.get(path, backend_args=backend_args)
        image = Image.open(io.BytesIO(content))
        image.load()
        return content, image
    except FileNotFoundError:
        problems.append((MISSING, path))
    except Exception as error:  # decoders raise many kinds
        problems.append((DECODING, f'{path}: {error}'.replace('<_io.BytesIO object', '<')))
    return content, None


def _annotation_problems(annotation: dict, width: int, height: int, masks: bool) -> Problems:
    """What makes mmdet leave out a COCO annotation, or fail on it."""
    x, y, w, h = annotation['bbox']
    problems = []
    if not np.isfinite([x, y, w, h]).all() or w < 1 or h < 1:
        problems.append((BOXES, f'box {annotation["bbox"]} (x, y, width, height) is less than a pixel wide or high'))
    elif x < -1 or y < -1 or x + w > width + 1 or y + h > height + 1:
        problems.append((BOXES, f'box {annotation["bbox"]} reaches outside the image, {width} × {height}'))
    elif annotation['area'] <= 0:
        problems.append((BOXES, f'area {annotation["area"]}'))
    mask = annotation.get('segmentation')
    try:
        if not mask:
            what = 'no mask' if masks else ''
        elif isinstance(mask, list):
            what = _polygon_problem([np.asarray(polygon, float) for polygon in mask], width, height)
        else:
            what = _run_lengths_problem(mask, width, height)
    except Exception as error:
        what = f'mask does not read: {error}'
    return problems + [(MASKS, what)] * bool(what)


def _polygon_problem(polygons: list[np.ndarray], width: int, height: int) -> str:
    for polygon in polygons:
        if len(polygon) < 6 or len(polygon) % 2 or not np.isfinite(polygon).all():
            return f'polygon of {len(polygon)} numbers, at least three pairs are due'
    xs, ys = (np.concatenate([polygon[start::2] for polygon in polygons]) for start in (0, 1))
    if min(xs.min(), ys.min()) < -1 or xs.max() > width + 1 or ys.max() > height + 1:
        return f'polygon reaches outside the image, {width} × {height}'
    doubled = [p[::2] @ np.roll(p[1::2], -1) - p[1::2] @ np.roll(p[::2], -1) for p in polygons]
    return '' if np.abs(doubled).sum() > 1e-3 else 'polygon without area'


def _run_lengths_problem(mask: dict, width: int, height: int) -> str:
    from pycocotools import mask as run_lengths  # comes with mmdet, and mmseg alone does without

    if list(mask['size']) != [height, width]:
        return f'mask of {mask["size"]} (height, width) for an image of {[height, width]}'
    if isinstance(mask['counts'], list):
        if sum(mask['counts']) != width * height:
            return f'run lengths of {sum(mask["counts"])} pixels for an image of {width * height}'
        mask = run_lengths.frPyObjects(mask, height, width)
    return '' if run_lengths.decode(mask).any() else 'mask without a pixel'
