"""Reading COCO's annotation files, where one bad entry must not hide the others."""

import json
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from swin_mm.analysis.dataset_check.findings import (
    ANNOTATIONS,
    CLASSES,
    EVALUATION,
    IDS,
    SUBSET,
    Finding,
    listed,
    plural,
    short,
)
from swin_mm.analysis.dataset_check.samples import read_file


class Rule(NamedTuple):
    """What the value of a key must be."""

    is_valid: Callable[[Any], bool]
    expected: str


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool) and (abs(value) < 1e300 or value != value)


ID = Rule(lambda value: isinstance(value, (int, str)) and not isinstance(value, bool), 'a whole number')
NAME = Rule(lambda value: isinstance(value, str) and bool(value) and '\0' not in value, 'a name')
NUMBER = Rule(_is_number, 'a number')
SIDE = Rule(lambda value: _is_number(value) and 0 < value < 2**31 and value == int(value), 'pixels, from 1 up')
BOX = Rule(
    lambda value: isinstance(value, list) and len(value) == 4 and all(map(_is_number, value)),
    'four numbers: x, y, width, height',
)
FLAG = Rule(lambda value: value in (0, 1), '0 or 1')
LIST = Rule(lambda value: isinstance(value, list), 'a list')


@dataclass
class CocoFile:
    """A COCO annotation file.

    Args:
        path: Where it is.
        names: Names of the categories by id, in the file's order.
        annotations: Annotations that have all that is required, by image id; those of panoptic files are segments.
        findings: What is wrong with the file.
        repaired: The content without the entries that mmdet fails on, or None if there are none.
    """

    path: str
    names: dict[Any, str] = field(default_factory=dict)
    annotations: dict[Any, list[dict]] = field(default_factory=lambda: defaultdict(list))
    findings: list[Finding] = field(default_factory=list)
    repaired: dict | None = None

    def report(self, kind: str, what: str) -> None:
        """Add a finding."""
        self.findings.append(Finding(kind, f'{self.path}: {what}'))

    def compare_classes(self, classes: list[str]) -> None:
        """Report how the categories differ from the classes of the config."""
        names = list(self.names.values())
        if unknown := [name for name in classes if name not in names]:
            what = f'no category is called {listed(unknown)}, which the config has as classes; the categories are'
            self.report(CLASSES, f'{what} {listed(names)}')
        if omitted := [name for name in names if name not in classes]:
            self.report(SUBSET, f'objects of {listed(omitted)} are left out: no class of the config has this name')
        order = [name for name in names if name in classes]
        if not unknown and order != classes:
            what = f'mmdet numbers the classes in the order of the categories, {listed(order)}'
            self.report(CLASSES, f'{what}; the config has {listed(classes)}. Use the same order in the config')


def read_coco(path: str, backend_args: dict | None, panoptic: bool, name_key: str = 'file_name') -> CocoFile:
    """Read an annotation file and check the structure of all its entries.

    Args:
        path: Of the JSON file.
        backend_args: For mmengine's file reader.
        panoptic: Whether annotations hold segments, ``segments_info``.
        name_key: What an image's file name is called.

    Raises:
        OSError: it cannot be read.
        ValueError: it is not JSON, or not in COCO's format at all.
    """
    file = CocoFile(path)
    content = _load_json(path, backend_args)
    wanted = {key: _dicts(file, content, key) for key in ('categories', 'images', 'annotations')}
    kept: dict[str, list[dict]] = {key: [] for key in wanted}

    rules = {'id': ID, 'name': NAME, **({'isthing': FLAG} if panoptic else {})}
    for index, category in wanted['categories']:
        if _is_complete(file, f'categories[{index}]', category, rules):
            kept['categories'].append(category)
            file.names.setdefault(category['id'], category['name'])
    rules = {'id': ID, name_key: NAME, 'width': SIDE, 'height': SIDE}
    for index, image in wanted['images']:
        if _is_complete(file, f'images[{index}]', image, rules):
            kept['images'].append(image)
    kept['annotations'] = list(_check_annotations(file, wanted['annotations'], panoptic))

    _check_ids(file, kept, panoptic)
    complete = all(kept[key] == content.get(key, []) for key in wanted)
    if not panoptic:  # mmdet asserts that annotation ids are unique
        unique = {annotation['id']: annotation for annotation in reversed(kept['annotations'])}
        complete = complete and len(unique) == len(kept['annotations'])
        kept['annotations'] = list(reversed(unique.values()))
    file.repaired = None if complete else {**content, **kept}
    return file


def _load_json(path: str, backend_args: dict | None) -> dict:
    try:
        content = json.loads(read_file(path, backend_args).decode('utf-8'))
    except RecursionError:
        raise ValueError('it is nested too deeply for COCO') from None
    if not isinstance(content, dict):
        raise ValueError(f'its top level is a {type(content).__name__}; COCO has a dict of images, annotations, ...')
    if lacking := [key for key in ('images', 'categories') if not isinstance(content.get(key), list)]:
        raise ValueError(f'it has no list of {" and none of ".join(lacking)}; found {listed(content)}')
    return content


def _dicts(file: CocoFile, content: dict, key: str) -> list[tuple[int, dict]]:
    """The entries of a list, and their indices; those that are not dicts are reported."""
    entries = content.get(key, [])
    if not isinstance(entries, list):
        raise ValueError(f'{key} is a {type(entries).__name__}; expected a list')
    for index, entry in enumerate(entries):
        if not isinstance(entry, dict):
            file.report(ANNOTATIONS, f'{key}[{index}] is {short(entry)}; expected a dict')
    return [(index, entry) for index, entry in enumerate(entries) if isinstance(entry, dict)]


def _is_complete(file: CocoFile, where: str, entry: dict, rules: dict[str, Rule]) -> bool:
    """Report keys that are missing or of a wrong type; whether there are none."""
    where += f' (id {short(entry["id"])})' if 'id' in entry else ''
    if missing := [key for key in rules if key not in entry]:
        file.report(ANNOTATIONS, f'{where} has no {" and no ".join(missing)}')
    wrong = [key for key, rule in rules.items() if key in entry and not rule.is_valid(entry[key])]
    for key in wrong:
        file.report(ANNOTATIONS, f'{where}: {key} is {short(entry[key])}; expected {rules[key].expected}')
    return not missing and not wrong


def _check_annotations(file: CocoFile, entries: list[tuple[int, dict]], panoptic: bool) -> Iterator[dict]:
    """Check and collect the annotations; what mmdet can load of them."""
    boxes = {'id': ID, 'category_id': ID, 'bbox': BOX, 'area': NUMBER}
    rules = {'image_id': ID, 'segments_info': LIST} if panoptic else {'image_id': ID, **boxes}
    for index, entry in entries:
        where = f'annotations[{index}]'
        if not _is_complete(file, where, entry, rules):
            continue
        if not panoptic:
            file.annotations[entry['image_id']].append(entry)
            yield entry
            continue
        segments = []
        for at, segment in enumerate(entry['segments_info']):
            if not isinstance(segment, dict):
                file.report(ANNOTATIONS, f'{where}.segments_info[{at}] is {short(segment)}; expected a dict')
            elif _is_complete(file, f'{where}.segments_info[{at}]', segment, boxes):
                segments.append(segment)
        file.annotations[entry['image_id']] += segments
        known = [segment for segment in segments if segment['category_id'] in file.names]
        yield entry if known == entry['segments_info'] else {**entry, 'segments_info': known}


def _check_ids(file: CocoFile, kept: dict[str, list[dict]], panoptic: bool) -> None:
    """Report ids that are not unique, not whole numbers, or refer to nothing."""
    for key, entries in kept.items():
        if key == 'annotations' and panoptic:
            continue  # their ids are those of the images, and segments of different images may share theirs
        counts = Counter(entry['id'] for entry in entries)
        for identifier, count in counts.items():
            if count > 1:
                what = f'{count} {key} have the id {short(identifier)}; ids must be unique'
                file.report(IDS, what + ('; the last one counts' if key == 'images' else ''))
        if texts := [identifier for identifier in counts if isinstance(identifier, str)]:
            what = f'{plural(len(texts), "id")} of {key} are text, such as {short(texts[0])}'
            file.report(IDS, f'{what}; COCO has whole numbers, and its evaluation counts on them')
        if key == 'annotations' and 0 in counts:
            file.report(EVALUATION, 'an annotation has the id 0, which pycocotools counts as never found; count from 1')
    for name, count in Counter(file.names.values()).items():
        if count > 1:
            file.report(CLASSES, f'{count} categories are called {short(name)}')

    images = {image['id'] for image in kept['images']}
    if lost := [identifier for identifier in file.annotations if identifier not in images]:
        count = sum(len(file.annotations[identifier]) for identifier in lost)
        kinds = {type(identifier).__name__ for identifier in lost}, {type(image).__name__ for image in images}
        hint = '' if kinds[0] & kinds[1] or not images else f'; these are {kinds[0].pop()}, those {kinds[1].pop()}'
        what = f'{plural(count, "annotation")} of images that are not listed: image_id {listed(lost)}'
        file.report(ANNOTATIONS, what + hint)
    unknown: dict[Any, list[Any]] = defaultdict(list)
    for annotations in file.annotations.values():
        for annotation in annotations:
            if annotation['category_id'] not in file.names:
                unknown[annotation['category_id']].append(annotation['id'])
    for category, ids in unknown.items():
        what = f'{plural(len(ids), "annotation")} of the unknown category {short(category)} (id {listed(ids, 5)})'
        file.report(CLASSES, what)
