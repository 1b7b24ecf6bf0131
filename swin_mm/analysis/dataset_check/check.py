"""The check of a config's datasets: what is read, in which order, and what is compared."""

import copy
import io
import json
import math
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import redirect_stdout
from functools import partial
from pathlib import Path
from typing import Any

from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from rich.progress import track

from swin_mm.analysis.dataset_check.batch import check_batches, contrasting, sample_count
from swin_mm.analysis.dataset_check.coco import CocoFile, read_coco
from swin_mm.analysis.dataset_check.findings import (
    ABSENT,
    ANNOTATIONS,
    CLASSES,
    NO_LABELS,
    SCHEDULE,
    SHARED,
    VOID,
    Finding,
    listed,
    short,
)
from swin_mm.analysis.dataset_check.folders import label_values, missing_file_findings, unused_files, why_empty
from swin_mm.analysis.dataset_check.report import Part, Report
from swin_mm.analysis.dataset_check.samples import Facts, LabelValues, Sample, Task, inspect_sample
from swin_mm.engine.config_pickles import find_code_files
from swin_mm.engine.schedule import long_warmup
from swin_mm.openmmlab.config import iter_dicts, reads_segments, type_name
from swin_mm.utils.errors import InputError, one_line

# Parts of a model whose number of classes is not that of the dataset.
OTHER_HEADS = {'backbone', 'neck', 'rpn_head', 'semantic_head', 'data_preprocessor', 'train_cfg', 'test_cfg'}


def check_datasets(cfg: Config, names: Iterable[str], workers: int | None = None) -> Report:
    """Read everything that the dataloaders of a config would read, and some batches of the training pipeline.

    Args:
        cfg: The config.
        names: Which of 'train', 'val' and 'test'.
        workers: Processes that decode images; one per core by default.

    Raises:
        InputError: a dataset is neither of COCO's nor of mmseg's kind, or a file in the config could run code.
    """
    names = list(names)
    for name in names:
        section = f'{name}_dataloader'
        for key, value in find_code_files(cfg[section], section):
            raise InputError(
                f'{section}: {key.rpartition(".")[2]}={value!r} is not read, because pickles and YAML can run code; '
                'convert it to JSON, or leave the setting out'
            )
    init_default_scope(cfg.get('default_scope') or 'mmengine')
    parts: dict[str, Part] = {}
    with tempfile.TemporaryDirectory() as folder, ProcessPoolExecutor(workers) as pool:
        run = map if workers == 1 else partial(pool.map, chunksize=16)
        for name in names:
            leaves = list(_leaves(cfg[f'{name}_dataloader'].dataset))
            if (key := str(leaves)) in parts:  # val and test are often the same
                parts[key].name += f', {name}'
                continue
            part = parts[key] = Part(name)
            try:
                loaded = [_read(leaf, part, run, Path(folder, f'{name}{i}.json')) for i, leaf in enumerate(leaves)]
            except BrokenProcessPool as error:
                raise InputError(f'{name}: a process died, perhaps out of memory; try a smaller --workers') from error
            part.findings += _head_findings(cfg, part)
            if name == 'train':
                part.findings += _training_findings(cfg, part, loaded)
        report = Report(list(parts.values()))
        _compare_parts(report.parts)
        return report


class _Loaded:
    """A dataset that has been read: its config, its length, and the samples without faults."""

    def __init__(self, leaf: dict, length: int, sizes: dict[int, tuple[int, int]]) -> None:
        self.leaf, self.length, self.sizes = leaf, length, sizes

    def restricted(self, count: int) -> dict:
        """The config with some samples of contrasting sizes alone."""
        return {**self.leaf, 'indices': contrasting(self.sizes, count), 'max_refetch': 20, 'lazy_init': True}


def _leaves(dataset: dict) -> Iterator[dict]:
    """The datasets inside wrappers."""
    inside = dataset.get('datasets') or ([dataset['dataset']] if 'dataset' in dataset else [])
    for node in inside:
        yield from _leaves(node)
    if not inside:
        yield dataset


def _with_leaves(dataset: dict, leaves: list[dict]) -> dict:
    """A dataset config with other datasets inside its wrappers; ``leaves`` are used up in order."""
    if dataset.get('datasets'):
        return {**dataset, 'datasets': [_with_leaves(node, leaves) for node in dataset['datasets']]}
    if 'dataset' in dataset:
        return {**dataset, 'dataset': _with_leaves(dataset['dataset'], leaves)}
    return leaves.pop(0)


# One dataset


def _read(leaf: dict, part: Part, run: Callable, repaired: Path) -> _Loaded | None:
    """Add what one dataset holds to a part.

    Args:
        leaf: The dataset's config.
        part: What to add to.
        run: Like ``map``.
        repaired: Where to write an annotation file that mmdet can load, if the original is not.
    """
    leaf = copy.deepcopy(dict(leaf))
    dataset = _build(leaf, part)
    is_coco = _is_kind(dataset, 'CocoDataset')
    classes = dataset.metainfo.get('classes') or []
    if isinstance(classes, str):
        what = f'classes={classes!r} is text, not a tuple of names; write classes=({classes!r},)'
        part.findings.append(Finding(CLASSES, f'{part.name}: {what}'))
        classes = [classes]
    part.classes = [str(name) for name in classes]
    file = values = None
    try:
        if is_coco:
            file = _read_coco(dataset, leaf)
            part.findings += file.findings
            if file.repaired is not None:
                repaired.write_text(json.dumps(file.repaired), encoding='utf-8')
                leaf |= {'ann_file': str(repaired), 'backend_args': None}
                dataset = _build(leaf, part)
            file.findings = []
            file.compare_classes(part.classes)
            part.findings += file.findings
        with redirect_stdout(io.StringIO()):
            dataset.full_init()
        if not is_coco:
            part.findings += unused_files(dataset)
            values, findings = label_values(dataset, _annotation_step(leaf))
            part.findings += findings
            part.unit = 'pixels'
    except Exception as error:
        where = dataset.ann_file or dataset.data_prefix
        message = one_line(error) if isinstance(error, (ValueError, OSError)) else _typed(error)
        part.findings.append(Finding(ANNOTATIONS, f'{where} cannot be loaded: {message}'))
        return None

    order = _positions(len(dataset), leaf.get('indices'))
    if not order:
        what = f'{dataset.ann_file}: no images are left; see its entries and filter_cfg={dataset.filter_cfg}'
        part.findings.append(Finding(ANNOTATIONS, what if is_coco else why_empty(dataset)))
        return None
    samples = [_sample(dataset.data_list[i], file, reads_segments(leaf.get('pipeline'))) for i in order]
    task = Task(
        values=values,
        segments=_is_kind(dataset, 'CocoPanopticDataset'),
        masks=any(step.get('with_mask') for step in iter_dicts(leaf.get('pipeline'))),
        backend=_annotation_step(leaf).get('imdecode_backend', 'pillow'),
        backend_args=dataset.backend_args,
    )
    found = track(run(partial(inspect_sample, task=task), samples), part.name, len(samples))
    clean, missing = {}, []
    for position, sample, facts in zip(order, samples, found, strict=True):
        _add(part, sample, facts, file, values)
        missing += facts.missing
        if facts.is_clean and facts.size:
            clean[position] = facts.size
    part.findings += missing_file_findings(missing)
    return _Loaded(leaf, len(order), clean)


def _build(leaf: dict, part: Part) -> Any:
    """The dataset without its pipeline, proposals and selection of samples, and before it reads anything."""
    changes = {'pipeline': [], 'lazy_init': True, 'serialize_data': False, 'indices': None}
    changes |= {'proposal_file': None} if 'proposal_file' in leaf else {}
    try:
        dataset = DATASETS.build({**leaf, **changes})
    except Exception as error:
        raise InputError(
            f'the dataset of {part.name} cannot be built: {one_line(error)} (--debug shows where)'
        ) from error
    if not (_is_kind(dataset, 'CocoDataset') or _is_kind(dataset, 'BaseSegDataset')):
        what = f'{type(dataset).__name__} cannot be checked, only subclasses of CocoDataset and BaseSegDataset'
        raise InputError(f'{part.name}: {what}')
    return dataset


def _is_kind(dataset: Any, name: str) -> bool:
    """Whether a dataset is of a class of mmdet or mmseg; either library may be absent."""
    return any(base.__name__ == name for base in type(dataset).__mro__)


def _read_coco(dataset: Any, leaf: dict) -> CocoFile:
    name_key = 'coco_url' if _is_kind(dataset, 'LVISV1Dataset') else 'file_name'
    return read_coco(dataset.ann_file, dataset.backend_args, _is_kind(dataset, 'CocoPanopticDataset'), name_key)


def _annotation_step(leaf: dict) -> dict:
    """The config of the pipeline's ``LoadAnnotations``."""
    steps = (step for step in iter_dicts(leaf.get('pipeline')) if type_name(step).endswith('LoadAnnotations'))
    return dict(next(steps, {'type': 'LoadAnnotations'}))


def _positions(length: int, indices: Any) -> list[int]:
    """Which samples the setting ``indices`` selects, as mmengine's BaseDataset does."""
    order = list(range(length))
    if indices is None:
        return order
    if isinstance(indices, int):
        return order[:indices] if indices >= 0 else order[indices:]
    return [order[i] for i in indices]


def _sample(info: dict, file: CocoFile | None, reads_maps: bool) -> Sample:
    if file is None:
        return Sample(info['img_path'], label_map=info.get('seg_map_path'))
    label_map = info['seg_map_path'] if reads_maps else None
    size = int(info['width']), int(info['height'])
    return Sample(info['img_path'], size, label_map, file.annotations.get(info['img_id'], []))


def _add(part: Part, sample: Sample, facts: Facts, file: CocoFile | None, values: LabelValues | None) -> None:
    """Add what was found in a sample to its part."""
    part.findings += facts.findings
    part.images[sample.image] = facts.digest
    if facts.size:
        part.sizes.append(facts.size)
    if file:
        labels = {name: index for index, name in enumerate(part.classes)}
        for annotation in sample.annotations or ():
            label = labels.get(file.names.get(annotation['category_id'], ''))
            if label is not None and not annotation.get('iscrowd'):
                part.amounts[label] += 1
                if (area := float(annotation['bbox'][2]) * float(annotation['bbox'][3])) > 0:
                    part.objects.append(area**0.5)
    if values is not None and facts.counts is not None:
        part.values += facts.counts
        part.ignores_zero = part.ignores_zero or bool(values.is_ignored[0])
        for value in (facts.counts * values.is_class).nonzero()[0]:
            part.amounts[int(values.labels[value])] += int(facts.counts[value])
        part.unlabelled += int(facts.counts[values.is_ignored].sum())


# A part, and all of them


def _head_findings(cfg: Config, part: Part) -> Iterator[Finding]:
    for head, count in _heads(cfg.get('model')):
        if count != len(part.classes):
            what = f'{part.name}: model.{head} has num_classes={count}, but the dataset has {len(part.classes)} classes'
            yield Finding(CLASSES, what)


def _heads(node: Any, path: str = '') -> Iterator[tuple[str, int]]:
    """The number of classes of each head in a model."""
    if isinstance(node, (list, tuple)):
        node = dict(enumerate(node))
    if not isinstance(node, dict):
        return
    if 'num_things_classes' in node:
        yield path, node['num_things_classes'] + node.get('num_stuff_classes', 0)
    elif 'num_classes' in node:
        yield path, node['num_classes']
    for key, child in node.items():
        if key not in OTHER_HEADS:
            yield from _heads(child, f'{path}.{key}'.lstrip('.'))


def _training_findings(cfg: Config, part: Part, loaded: list[_Loaded | None]) -> Iterator[Finding]:
    """What concerns training: the balance of labels, the pipeline, and the schedule."""
    yield from _label_findings(part)
    usable = [dataset for dataset in loaded if dataset and dataset.sizes]
    if len(usable) == len(loaded):
        count = max(2, sample_count(cfg) // len(usable))
        leaves = [dataset.restricted(count) for dataset in usable]
        with redirect_stdout(io.StringIO()):
            yield from check_batches(cfg, leaves, _with_leaves(cfg.train_dataloader.dataset, list(leaves)))
    lengths = [dataset.length if dataset else 0 for dataset in loaded]
    per_epoch = math.ceil(
        _epoch_length(cfg.train_dataloader.dataset, lengths) / (cfg.train_dataloader.get('batch_size') or 1)
    )
    loop = cfg.get('train_cfg') or {}
    iterations = loop.get('max_iters') or (loop.get('max_epochs') or 0) * per_epoch
    if per_epoch and iterations and (what := long_warmup(cfg, iterations, per_epoch)):
        yield Finding(SCHEDULE, f'{what} (on one GPU)')


def _epoch_length(dataset: Any, sizes: list[int]) -> int:
    """Samples per epoch of a dataset with its wrappers; ``sizes`` of the datasets inside are used up in order."""
    if inside := dataset.get('datasets'):
        return sum(_epoch_length(one, sizes) for one in inside)
    if 'dataset' in dataset:
        return dataset.get('times', 1) * _epoch_length(dataset['dataset'], sizes)
    return sizes.pop(0)


def _label_findings(part: Part) -> Iterator[Finding]:
    """Whether there is something to learn."""
    present = part.values.nonzero()[0].tolist()
    if part.images and not part.amounts:
        if part.unit == 'objects':
            yield Finding(CLASSES, f'{part.name}: there is no object of any class')
    elif present and len(part.amounts) == 1 and part.classes:
        (label,) = part.amounts
        what = f'{part.name}: every labelled pixel is of the class {short(part.classes[label])}; the loss soon is 0'
        yield Finding(NO_LABELS, f'{what}. Values in the maps: {listed(present)}')
    if present and set(present) <= {0, 255} and 255 in present:
        what = f'{part.name}: all maps hold the values 0 and 255 only, and 255 means "ignored"'
        yield Finding(NO_LABELS, f'{what}; write class numbers instead, such as 0 and 1')
    absent = [name for index, name in enumerate(part.classes) if not part.amounts[index]]
    if absent and part.amounts:
        yield Finding(ABSENT, f'{len(absent)} of {len(part.classes)}: {listed(absent)}')
    total = part.values.sum()
    if total and part.unlabelled > total / 2 and part.amounts:
        yield Finding(VOID, f'{part.name}: {part.unlabelled / total:.1%} of the pixels are ignored')
    if part.ignores_zero and {0, 255} <= set(present) and part.amounts:
        what = f'{part.name}: the maps hold 0 and 255, and reduce_zero_label=True ignores both'
        yield Finding(VOID, f'{what}; if 0 is a class of yours, set it to False in the dataset and in LoadAnnotations')


def _compare_parts(parts: list[Part]) -> None:
    """Look for images of train in the other parts."""
    train = next((part for part in parts if part.name.startswith('train')), None)
    known = {digest: path for path, digest in train.images.items() if digest} if train else {}
    for part in parts:
        if part is train:
            continue
        for path, digest in part.images.items():
            if digest in known:
                what = 'is also read' if known[digest] == path else f'is the same as {known[digest]}'
                part.findings.append(Finding(SHARED, f'{path} ({part.name}) {what} in train'))


def _typed(error: Exception) -> str:
    return f'{type(error).__name__}: {one_line(error)}'
