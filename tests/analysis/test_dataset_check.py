"""Each fault is planted in a small data set and must be the only thing that is reported."""

import json
import os
import pickle
import re
import shutil
import struct
import zlib
from importlib.util import find_spec
from io import StringIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from rich.console import Console
from support.tool_fixtures import CLASSES, ROOT, Bomb, make_tiny

from swin_mm.analysis.dataset_check import Finding, Part, Report, check_datasets
from swin_mm.analysis.dataset_check.findings import BOXES, SCHEDULE
from swin_mm.analysis.dataset_check.masks import MaskError, decode_run_lengths, mask_extent
from swin_mm.openmmlab.config import load_config
from swin_mm.utils.errors import InputError

needs_data = pytest.mark.skipif('SWIN_MM_DATA' not in os.environ, reason='SWIN_MM_DATA is not set')
# Notes on the tiny data and its short training that are right, and not what most tests are about.
EXPECTED = r'note: (schedule|padding): |note: unlabelled pixels: train: \d\d'


@pytest.fixture
def own(data, tmp_path):
    """A copy of the tiny data set, to be damaged by a test."""
    shutil.copytree(data, tmp_path / 'data')
    return tmp_path / 'data'


@pytest.fixture
def check(own, tmp_path):
    """The findings in the tiny data set, after a change of the config's text."""

    def call(task, change='', parts=('train', 'val')):
        path = make_tiny(task, own, tmp_path).config
        path.write_text(change(path.read_text()) if callable(change) else path.read_text() + change)
        return lines(check_datasets(load_config(path), parts, workers=1))

    return call


def lines(report):
    """Findings as text."""
    found = [f'{"" if one.is_fault else "note: "}{one.kind}: {one.message}' for one in report.findings]
    return [line for line in found if not re.match(EXPECTED, line)]


def edit(own, part='train'):
    """The content of an annotation file, and a function that saves it."""
    path = own / f'coco/annotations/instances_{part}2017.json'
    content = json.loads(path.read_text())
    return content, lambda: path.write_text(json.dumps(content))


def match(found, *patterns):
    """Each finding is one of those planted, and each planted one was found."""
    assert len(found) == len(patterns), '\n'.join(found)
    for pattern in patterns:
        assert sum(re.search(pattern, line) is not None for line in found) == 1, '\n'.join([pattern, *found])


@pytest.mark.parametrize('task', ['detection', 'segmentation'])
def test_clean_data(check, task):
    assert check(task) == []


def test_worker_processes_find_the_same(own, tmp_path):
    (own / 'coco/train2017/3.jpg').unlink()
    cfg = load_config(make_tiny('detection', own, tmp_path).config)
    one, two = (check_datasets(cfg, ['train', 'val'], workers) for workers in (1, 2))
    assert one.findings == two.findings and len(one.faults) == 1
    assert [part.images for part in one.parts] == [part.images for part in two.parts]


# Files


def test_image_files(check, own):
    images = own / 'coco/train2017'
    (images / '1.jpg').rename(images / '1.JPG')
    (images / '2.jpg').write_bytes(b'not an image')
    content, save = edit(own)
    content['images'][2]['width'] = 97
    save()
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.open(images / '4.jpg').save(images / '4.jpg', exif=turned)
    (images / '5.jpg').write_bytes((images / '5.jpg').read_bytes()[:900])
    (images / '6.jpg').write_bytes(b'')
    match(
        check('detection'),
        r"missing files: .*train2017/1.jpg \(there is '1.JPG'\)",
        r'cannot be decoded: .*2.jpg: not an image in any of the formats',
        r'sizes that differ: .*3.jpg is 96 x 64; the annotation file says 97 x 64',
        r'sizes that differ: .*4.jpg is 64 x 96 \(as its EXIF orientation turns it\)',
        r'cannot be decoded: .*5.jpg: image file is truncated',
        r'cannot be decoded: .*6.jpg: the file is empty',
    )


def png_of_zeros(width, height):
    """A PNG of few bytes that claims to hold many pixels."""

    def chunk(kind, data):
        return struct.pack('>I', len(data)) + kind + data + struct.pack('>I', zlib.crc32(kind + data))

    header = struct.pack('>IIBBBBB', width, height, 8, 0, 0, 0, 0)
    return b'\x89PNG\r\n\x1a\n' + chunk(b'IHDR', header) + chunk(b'IDAT', zlib.compress(bytes(1000)))


def test_hostile_files(check, own):
    images = own / 'coco/train2017'
    (images / '1.jpg').write_bytes(png_of_zeros(60_000, 60_000))
    (images / '2.jpg').unlink()
    os.mkfifo(images / '2.jpg')  # reading it would wait for ever
    (images / '3.jpg').write_bytes(b'%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 96 64\n')  # Pillow starts Ghostscript
    (images / '4.jpg').write_bytes(b'version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n')
    match(
        check('detection', parts=['train']),
        r'1.jpg: more than \d+ million pixels are not decoded',
        r'2.jpg: is not a regular file',
        r'3.jpg: not an image in any of the formats',
        r'4.jpg: a pointer of Git LFS',
    )


def test_tiffs_that_pillow_does_not_know(check, own):
    cv2 = pytest.importorskip('cv2')
    random = np.random.default_rng(0)
    path = own / 'coco/train2017/1.tif'
    cv2.imwrite(str(path), random.random((64, 96, 3), np.float32))
    if cv2.imread(str(path)) is None:
        pytest.skip('OpenCV 5 does not read TIFF files of floats as 8 bits')
    content, save = edit(own)
    content['images'][0]['file_name'] = '1.tif'
    save()
    assert check('detection', parts=['train']) == []
    # The size stands in the first directory of tags: the same file with a width and height of 60,000.
    path.write_bytes(
        path.read_bytes().replace(struct.pack('<HHIH', 256, 3, 1, 96), struct.pack('<HHIH', 256, 3, 1, 60000))
    )
    path.write_bytes(
        path.read_bytes().replace(struct.pack('<HHIH', 257, 3, 1, 64), struct.pack('<HHIH', 257, 3, 1, 60000))
    )
    match(check('detection', parts=['train']), r'1.tif: more than \d+ million pixels')


@pytest.mark.parametrize(
    'key, name', [('proposal_file', 'p.pkl'), ('proposal_file', 'p.yaml'), ('ann_file', 'a.pickle')]
)
def test_files_that_could_run_code_are_not_read(check, own, tmp_path, key, name):
    (own / 'coco' / name).write_bytes(pickle.dumps(Bomb(tmp_path / 'mark')))
    with pytest.raises(InputError, match=rf"train_dataloader: {key}='{name}' is not read"):
        check('detection', f"train_dataloader['dataset']['{key}'] = '{name}'\n")
    assert not (tmp_path / 'mark').exists()


@pytest.mark.parametrize('task', ['detection', 'segmentation'])
def test_images_of_train_in_val(check, own, task):
    images = own / 'coco' if task == 'detection' else own / 'ade/images'
    train, val = ('train2017', 'val2017') if task == 'detection' else ('training', 'validation')
    shutil.copy(images / train / '5.jpg', images / val / '2.jpg')
    match(check(task), rf'in other parts: .*{val}/2.jpg \(val\) is the same as .*{train}/5.jpg in train')


# COCO's annotation files


def test_malformed_entries_do_not_hide_others(check, own):
    content, save = edit(own)
    annotations = content['annotations']
    del annotations[0]['bbox']
    del annotations[1]['area']
    annotations[2]['id'] = 4
    annotations[4]['bbox'] = '10 10 5 5'
    annotations[5]['area'] = None
    annotations[6] = 'text'
    annotations[7]['category_id'] = [1]
    annotations[8]['image_id'] = 99
    annotations[9]['segmentation'] = []
    annotations[10]['bbox'] = [1e400, 0, 1, 1]
    del content['images'][5]['file_name']
    content['images'].append({'id': 7, 'file_name': '1.jpg', 'width': '96', 'height': 0})
    content['categories'].append({'id': 3})
    save()
    found = check('detection', parts=['train'])
    match(
        found,
        r'annotation files: .*annotations\[0\] \(id 1\) has no bbox$',
        r'annotation files: .*annotations\[1\] \(id 2\) has no area$',
        r'ids: .*2 annotations have the id 4',
        r"annotation files: .*annotations\[4\] \(id 5\): bbox is '10 10 5 5'; expected four numbers",
        r'annotation files: .*annotations\[5\] \(id 6\): area is None; expected a number',
        r"annotation files: .*annotations\[6\] is 'text'; expected a dict",
        r'annotation files: .*annotations\[7\] \(id 8\): category_id is \[1\]; expected a whole number',
        r'annotation files: .*2 annotations of images that are not listed: image_id 99, 6$|image_id 6, 99$',
        r'masks: annotation 10 of .*5.jpg: no mask',
        r'annotation files: .*annotations\[10\] \(id 11\): bbox is \[inf',
        r'annotation files: .*images\[5\] \(id 6\) has no file_name',
        r"annotation files: .*images\[6\] \(id 7\): width is '96'; expected pixels",
        r'annotation files: .*images\[6\] \(id 7\): height is 0; expected pixels',
        r'annotation files: .*categories\[2\] \(id 3\) has no name',
    )


def test_ids(check, own):
    content, save = edit(own)
    content['images'][1]['id'] = 1  # annotations of the second image are lost
    content['annotations'][0]['id'] = 0
    save()
    other, save = edit(own, 'val')
    for entry in (*other['images'], *other['annotations']):
        entry['id'] = str(entry['id'])
    save()
    match(
        check('detection'),
        r'ids: .*train2017.json: 2 images have the id 1; ids must be unique; the last one counts',
        r'annotation files: .*train2017.json: 2 annotations of images that are not listed: image_id 2$',
        r"ids: .*val2017.json: 2 ids of images are text, such as '1'",
        r"ids: .*val2017.json: 4 ids of annotations are text, such as '1'",
        r'annotation files: .*val2017.json: 4 annotations of images .* 1, 2; these are int, those str',
        r'note: evaluation: .*an annotation has the id 0',
    )


@pytest.mark.parametrize(
    'text, message',
    [
        ('{"images": [', r'cannot be loaded: Expecting value: line 1'),
        ('[' * 100_000, r'nested too deeply'),
        ('[]', r'its top level is a list'),
        (
            '{"images": {}, "annotations": []}',
            r"no list of images and none of categories; found 'images', 'annotations'",
        ),
        ('{"images": [], "categories": []}', r'no images are left'),
        (b'\xff\xfe', r"'utf-8' codec can't decode"),
    ],
)
def test_annotation_files_that_do_not_load(check, own, text, message):
    path = own / 'coco/annotations/instances_val2017.json'
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    found = check('detection', parts=['val'])
    assert re.search(f'annotation files: .*{message}', found[0]), found


def test_boxes_and_masks(check, own):
    content, save = edit(own)
    faults = [
        ({'bbox': [10, 10, 0, 5]}, r'boxes: annotation 1 of .*1.jpg: box \[10, 10, 0, 5\].* less than a pixel'),
        (
            {'bbox': [90, 10, 20, 5], 'segmentation': [[90, 10, 96, 10, 96, 15]]},
            r'annotation 2 .*outside the image of 96',
        ),
        ({'area': 0}, r'boxes: annotation 3 .*area 0'),
        ({'bbox': [float('nan'), 1, 5, 5]}, r'boxes: annotation 4 '),
        ({'segmentation': []}, r'masks: annotation 5 .*no mask'),
        ({'segmentation': [[1, 1, 5, 5]]}, r'masks: annotation 6 .*polygon of 4 numbers'),
        ({'segmentation': [[1, 1, 5, 5, 9, 9]]}, r'masks: annotation 7 .*without area'),
        ({'segmentation': [[1, 1, 5, 5, 99, 9]]}, r'masks: annotation 8 .*polygon reaches outside'),
        ({'segmentation': {'size': [96, 64], 'counts': [6144]}}, r'masks: annotation 9 .*\[96, 64\].*\[64, 96\]'),
        ({'segmentation': {'size': [64, 96], 'counts': [100, 10]}}, r'masks: annotation 10 .*110 pixels.* 6144'),
        ({'segmentation': {'size': [64, 96], 'counts': 'PP6'}}, r'masks: annotation 11 .*without a pixel'),
        ({'segmentation': [1, 1, 5, 5, 9, 1]}, r'masks: annotation 12 .*flat list'),
    ]
    for annotation, (fault, _) in zip(content['annotations'], faults, strict=True):
        annotation.update(fault)
    save()
    match(check('detection'), *(pattern for _, pattern in faults))


def test_boxes_as_corners(check, own):
    content, save = edit(own)
    first, second = content['annotations'][:2]
    first.update(bbox=[40, 30, 60, 50], segmentation=[[40, 30, 60, 30, 60, 50, 40, 50]])
    second.update(bbox=[70, 30, 90, 50], segmentation=None)
    save()
    match(
        check('detection', parts=['train'], change='train_pipeline[1].with_mask = False\n'),
        r'boxes: annotation 1 .*contradicts its mask, which spans \[40.0, 30.0, 60.0, 50.0\].*it looks like x1, y1',
        r'boxes: annotation 2 .*reaches outside the image of 96 x 64: it looks like x1, y1, x2, y2',
    )


def test_a_detector_of_boxes_needs_no_masks(check, own):
    content, save = edit(own)
    for annotation in content['annotations']:
        del annotation['segmentation']
    save()
    assert check('detection', 'train_pipeline[1].with_mask = False\n') == []
    assert len(check('detection')) == 12


def test_run_lengths_equal_those_of_pycocotools():
    coco_masks = pytest.importorskip('pycocotools.mask')
    random = np.random.default_rng(0)
    for _ in range(50):
        height, width = random.integers(1, 200, 2)
        mask = np.zeros((height, width), np.uint8, order='F')
        top, left = random.integers(0, height), random.integers(0, width)
        block = mask[top : top + random.integers(1, 60), left : left + random.integers(1, 60)]
        block[:] = random.random(block.shape) < random.choice([0.05, 0.9, 1.0])
        encoded = coco_masks.encode(mask)
        runs = decode_run_lengths(encoded['counts'])
        pixels = np.repeat(np.arange(len(runs)) % 2, runs).reshape(mask.shape, order='F')
        assert (pixels == mask).all()
        plain = {'size': [height, width], 'counts': runs}
        if mask.any():
            x, y, w, h = coco_masks.toBbox(encoded)
            for form in (plain, {**plain, 'counts': encoded['counts'].decode()}):
                assert mask_extent(form, int(width), int(height)) == (x, y, x + w, y + h)


@pytest.mark.parametrize(
    'counts',
    ['P', 'P' * 18 + '0', '\u00e9', '~~', [-1, 25], [2.5], ['a'], [2**63, 24], [2**62] * 4, None, 7, []],
)
def test_malformed_run_lengths(counts):
    with pytest.raises(MaskError):
        mask_extent({'size': [4, 6], 'counts': counts}, 6, 4)


# Classes


def test_categories(check, own):
    content, save = edit(own)
    content['categories'][1]['name'] = 'rod'
    content['annotations'][0]['category_id'] = 7
    save()
    match(
        check('detection'),
        r"classes.*train2017.json: no category is called 'bar', .* the categories are 'square', 'rod'",
        r"note: categories .*objects of 'rod' are left out",
        r'classes.*1 annotation of the unknown category 7 \(id 1\)',
        r"note: classes without examples in train: 1 of 2: 'bar'",
    )


def test_a_wanted_subset_of_the_classes_is_no_fault(check):
    subset = lambda text: text.replace(str(CLASSES), "('bar',)").replace('num_classes=2', 'num_classes=1')  # noqa: E731
    match(
        check('detection', subset),
        r"note: categories that are left out: .*train2017.json: objects of 'square'",
        r"note: categories that are left out: .*val2017.json: objects of 'square'",
    )


def test_classes_in_another_order(check, own):
    content, save = edit(own, 'val')
    content['categories'].reverse()  # mmdet would call squares bars
    save()
    match(check('detection'), r"classes.*val2017.json: .*'bar', 'square'; the config has 'square', 'bar'")


def test_classes_as_text(check):
    text = lambda text: text.replace(str(CLASSES), "('square')").replace('num_classes=2', 'num_classes=1')  # noqa: E731
    found = check('detection', text, parts=['train'])
    match(found, r"classes='square' is text.* write classes=\('square',\)", r"note: categories .* objects of 'bar'")


@pytest.mark.parametrize('task', ['detection', 'segmentation'])
def test_heads_of_another_number_of_classes(check, task):
    found = check(task, lambda text: text.replace('num_classes=2', 'num_classes=3', 1), parts=['train'])
    head = 'roi_head.bbox_head' if task == 'detection' else 'decode_head'
    match(found, rf'classes.*model.{head} has num_classes=3, but the dataset has 2 classes')


def test_wrappers_are_looked_into(check, own):
    wrap = """
part = train_dataloader.pop('dataset')
train_dataloader['dataset'] = dict(_delete_=True, type='RepeatDataset', times=2, dataset=dict(
    type='ConcatDataset', datasets=[dict(_base_.train_dataloader.dataset, **part)]))
"""
    (own / 'coco/train2017/1.jpg').unlink()
    match(check('detection', wrap), r'missing files: .*1.jpg')


def test_panoptic(check, own):
    content, save = edit(own)
    (own / 'coco/panoptic').mkdir()
    for image in content['images']:
        mine = [entry for entry in content['annotations'] if entry.get('image_id') == image['id']]
        ids = np.zeros((64, 96, 3), np.uint8)
        for entry in mine:
            x, y, w, h = entry['bbox']
            ids[y : y + h, x : x + w] = (entry['id'], 1, 0)
            entry['id'] += 256
        Image.fromarray(ids).save(own / f'coco/panoptic/{image["id"]}.png')
        content['annotations'] = [entry for entry in content['annotations'] if entry not in mine]
        for entry in mine:
            entry.pop('segmentation')
        record = {'image_id': image['id'], 'file_name': f'{image["id"]}.png', 'segments_info': mine}
        content['annotations'].append(record)
    for category in content['categories']:
        category['isthing'] = 1
    content['annotations'][1]['segments_info'][0]['id'] = 9
    content['annotations'][2]['segments_info'][0]['category_id'] = 8
    del content['annotations'][3]['segments_info'][1]['bbox']
    save()
    (own / 'coco/panoptic/6.png').unlink()
    change = """
train_dataloader['dataset'].update(type='CocoPanopticDataset', data_prefix=dict(img='train2017/', seg='panoptic/'))
train_dataloader['dataset']['metainfo'].update(thing_classes=['square', 'bar'], stuff_classes=[])
train_dataloader['dataset']['pipeline'] = [
    dict(type='LoadImageFromFile'), dict(type='LoadPanopticAnnotations'), dict(type='PackDetInputs')]
"""
    match(
        check('detection', change, parts=['train']),
        r'missing files: .*panoptic/6.png',
        r'labels out of range: .*2.png: segments 9 are not in its pixels',
        r'labels out of range: .*2.png: segments 259 are not in the annotation file',
        r'classes.*1 annotation of the unknown category 8 \(id 261\)',
        r'annotation files: .*annotations\[3\].segments_info\[1\] \(id 264\) has no bbox',
        r'labels out of range: .*4.png: segments 264 are not in the annotation file',
        *([] if find_spec('panopticapi') else ['training pipeline: .*panopticapi is not installed']),
    )


# Label maps


def change_map(path, change, file_format='PNG'):
    """Apply a function to the values of a map."""
    values = np.array(Image.open(path))
    Image.fromarray(change(values)).save(path, file_format)


def test_label_maps(check, own):
    maps = own / 'ade/annotations/training'
    (maps / '1.png').unlink()
    (maps / '2.png').write_bytes((maps / '2.png').read_bytes()[:80])
    Image.open(maps / '3.png').resize((48, 32), 0).save(maps / '3.png')
    Image.open(maps / '4.png').convert('RGB').save(maps / '4.png')

    def corner(value):
        return lambda labels: np.where(np.arange(labels.size).reshape(labels.shape) < 6, value, labels).astype(np.uint8)

    change_map(maps / '5.png', corner(3))
    change_map(maps / '6.png', np.zeros_like)
    match(
        check('segmentation'),
        r'missing files: .*annotations/training/1.png',
        r'cannot be decoded: .*annotations/training/2.png',
        r'sizes that differ: .*images/training/3.jpg is 96 x 64; its map .*3.png is 48 x 32',
        r'label maps with several channels: .*4.png has 3 channels',
        r'labels out of range: .*5.png: value 3 \(label 2, 6 pixels\); classes are the values 1-2; ignored: 0, 255',
        r'nothing to learn: .*6.png: every pixel is ignored \(values 0\)',
    )


def test_values_that_do_not_fit_8_bits(check, own):
    def spread(labels):  # a line per value would be 96 lines
        labels = labels.astype(np.uint16)
        labels[0] = 257 + np.arange(96)  # the loader makes 1, 2, ... of them
        return labels

    maps = own / 'ade/annotations/training'
    change_map(maps / '1.png', spread)
    change_map(maps / '2.png', lambda labels: np.where(labels == 2, -70_000, labels.astype(np.int32)), 'TIFF')
    change_map(maps / '3.png', lambda labels: labels.astype(np.float32), 'TIFF')
    match(
        check('segmentation'),
        r'labels out of range: .*1.png: 96 pixels of value from 257 to 352; maps have 8 bits',
        r'labels out of range: .*2.png: 480 pixels of value -70000; maps have 8 bits',
        r'labels out of range: .*3.png holds floating-point values; expected class numbers of 8 bits',
    )


@pytest.mark.parametrize('reduce_zero_label', [True, False])
def test_masks_of_0_and_255(check, own, reduce_zero_label):
    """Training on them shows a loss of 0 and an accuracy of 100."""
    for path in (own / 'ade/annotations').rglob('*.png'):
        change_map(path, lambda labels: np.where(labels > 0, 255, 0).astype(np.uint8))

    def change(text):
        text = text.replace('reduce_zero_label=True', f'reduce_zero_label={reduce_zero_label}')
        step = f'train_pipeline[1].reduce_zero_label = test_pipeline[2].reduce_zero_label = {reduce_zero_label}\n'
        return text.replace('train_dataloader =', f'{step}train_dataloader =', 1)

    found = check('segmentation', change, parts=['train'])
    hint = r'nothing to learn: train: all maps hold the values 0 and 255 only'
    if reduce_zero_label:
        match(
            found,
            hint,
            *(rf'nothing to learn: .*/{i}.png: every pixel is ignored \(values 0, 255\)' for i in range(1, 7)),
        )
    else:
        one = r"every labelled pixel is of the class 'square'"
        match(found, hint, one, r"note: classes without examples in train: 1 of 2: 'bar'")


def test_void_under_reduce_zero_label(own):
    kept = []
    for path in (own / 'ade/annotations/training').iterdir():
        change_map(path, lambda labels: np.where(np.arange(96) < 20, 255, labels).astype(np.uint8))
        kept.append(np.isin(np.asarray(Image.open(path)), (1, 2)).mean())
    report = check_datasets(load_config(make_tiny('segmentation', own, own.parent).config), ['train'], 1)
    share = f'train: {1 - np.mean(kept):.1%} of the pixels are ignored'
    assert share in [one.message for one in report.findings]
    match(
        lines(report),
        r'note: unlabelled pixels: train: the maps hold 0 and 255, and reduce_zero_label=True ignores both',
    )


def test_reduce_zero_label_in_one_place_only(check):
    step = 'train_pipeline[1].reduce_zero_label = False\ntrain_dataloader ='
    found = check('segmentation', lambda text: text.replace('train_dataloader =', step, 1), parts=['train'])
    match(
        found,
        r'labels out of range: reduce_zero_label is True in the dataset and False in LoadAnnotations',
        r'training pipeline: LoadAnnotations of the training pipeline fails: AssertionError',
    )


def test_values_mean_what_the_loader_makes_of_them(own, tmp_path):
    path = make_tiny('segmentation', own, tmp_path).config
    # Of ADE20K's classes two, in the opposite order: value 1 is wall, value 2 building.
    text = path.read_text().replace("type='BaseSegDataset'", "type='ADE20KDataset'")
    path.write_text(text.replace(str(CLASSES), "('building', 'wall')"))
    report = check_datasets(load_config(path), ['train', 'val'], 1)
    values = [np.asarray(Image.open(file)) for file in (own / 'ade/annotations/training').iterdir()]
    assert lines(report) == []
    assert report.parts[0].amounts == {0: sum((v == 2).sum() for v in values), 1: sum((v == 1).sum() for v in values)}


def test_palettes_are_read_as_the_decoder_reads_them(check, own):
    """Pillow reads the indices of a palette image, OpenCV its colours."""
    for path in (own / 'ade/annotations/training').iterdir():
        image = Image.open(path)
        image.putpalette([0, 0, 0, 255, 0, 0, 0, 255, 0])
        image.save(path)
    assert check('segmentation', parts=['train']) == []
    backend = "train_pipeline[1].imdecode_backend = 'cv2'\ntrain_dataloader ="
    found = check('segmentation', lambda text: text.replace('train_dataloader =', backend, 1), parts=['train'])
    assert sum('label maps with several channels' in line for line in found) == 6, found


def test_files_that_are_not_read(check, own):
    images, maps = own / 'ade/images/training', own / 'ade/annotations/training'
    (images / '1.jpg').rename(images / '1.JPG')
    Image.open(images / '2.jpg').save(images / '2.png')
    (images / '2.jpg').unlink()
    shutil.copy(maps / '3.png', maps / '7.png')
    (images / 'notes.txt').write_text('not an image')
    match(
        check('segmentation', parts=['train']),
        r"files that are not used: .*images/training/1.JPG is not read: the dataset reads images that end with '.jpg'",
        r'files that are not used: .*images/training/2.png is not read',
        r'files that are not used: .*annotations/training/7.png is not read: there is no image 7.jpg in',
    )


def test_no_images(check, own):
    for path in (own / 'ade/images/training').iterdir():
        path.rename(path.with_suffix('.JPG' if path.stem == '1' else '.jpeg'))
    found = check('segmentation', parts=['train'])
    assert re.search(r"no file in .*training ends with '.jpg' \(img_suffix.*it holds 5 '.jpeg', 1 '.JPG'", found[0])


def test_a_list_of_names_leaves_files_out_on_purpose(check, own):
    (own / 'ade/train.txt').write_text('1\n2\n')
    assert check('segmentation', "train_dataloader['dataset']['ann_file'] = 'train.txt'\n", parts=['train']) == []


@pytest.mark.parametrize('maps', ['images/training', 'images/training/maps'])
def test_maps_in_the_folder_of_the_images(check, own, maps):
    (own / 'ade' / maps).mkdir(exist_ok=True)
    for path in (own / 'ade/annotations/training').iterdir():
        shutil.copy(path, own / 'ade' / maps)
    prefix = f"dict(img_path='images/training', seg_map_path='{maps}')"
    assert check('segmentation', f"train_dataloader['dataset']['data_prefix'] = {prefix}\n", parts=['train']) == []


def test_names_that_are_not_utf8(check, own):
    images, maps = os.fsencode(own / 'ade/images/training'), os.fsencode(own / 'ade/annotations/training')
    os.rename(images + b'/1.jpg', images + b'/caf\xe9.jpg')
    os.rename(maps + b'/1.png', maps + b'/caf\xe8.png')
    found = check('segmentation', parts=['train'])
    match(found, r'not used: .*caf\\udce8.png is not read', r'missing files: .*annotations/training/caf\\udce9.png')
    '\n'.join(found).encode()  # can be printed and saved


# The training pipeline


def crop(size, padded):
    """Set the crop of the tiny config."""
    return lambda text: (
        text.replace('crop_size = (64, 64)', f'crop_size = {size}')
        + (f"model['data_preprocessor'] = dict(size={padded})\n")
    )


def test_a_crop_that_does_not_fit(check, own):
    content = Image.open(own / 'ade/images/training/1.jpg')
    for folder, suffix in (('images', 'jpg'), ('annotations', 'png')):  # twice as wide as the others
        path = own / f'ade/{folder}/training/1.{suffix}'
        Image.open(path).resize((192, 64), 0).save(path)
    assert content.size == (96, 64)
    match(
        check('segmentation', crop((128, 128), (32, 32)), parts=['train']),
        r'training pipeline: the images of a batch are \d+ x \d+, \d+ x \d+ \(height x width\) after the pipeline and '
        r'cannot be stacked: .*size=\(32, 32\) pads only smaller ones; the crop, crop_size=\(128, 128\), does not fit',
    )
    report = check_datasets(load_config(own.parent / 'tiny.py'), ['val'], 1)
    assert report.findings == []


def test_a_transform_that_fails_is_named(check):
    step = "train_pipeline.insert(3, dict(type='RandomFlip', prob=[0.5, 0.4], direction='up'))\n"
    assert 'the training dataset cannot be built: ' in check('segmentation', step, parts=['train'])[0]
    step = "train_pipeline.insert(0, dict(type='RandomFlip', prob=1.0))\n"
    pattern = r"training pipeline: RandomFlip of the training pipeline fails: KeyError: 'img' \(.*training/\d.jpg\)"
    match(check('segmentation', step, parts=['train']), pattern)


def test_a_pipeline_that_drops_every_image(check):
    step = "train_pipeline.insert(3, dict(type='RandomCrop', crop_size=(2, 2), allow_negative_crop=False))\n"
    step += "train_pipeline.insert(4, dict(type='FilterAnnotations', min_gt_bbox_wh=(90, 90)))\n"
    match(check('detection', step, parts=['train']), r'training pipeline: .*drops every image')


@pytest.mark.parametrize('task', ['detection', 'segmentation'])
def test_the_pipeline_runs_on_samples_without_faults(check, own, task):
    """Otherwise a broken file would be reported twice."""
    for path in (own / 'coco/train2017/1.jpg', own / 'ade/images/training/1.jpg'):
        path.write_bytes(path.read_bytes()[:900])
    match(check(task, parts=['train']), r'1.jpg: image file is truncated')


@pytest.mark.parametrize(
    'times, end, expected',
    [(1, 1, None), (1, 2, 'takes 2 of 12 iterations'), (1, 3, 'remove it, .*one GPU'), (3, 3, None), (3, 4, '4 of 36')],
)
def test_a_long_warm_up_is_noted(own, tmp_path, times, end, expected):
    """Of 6 images, 2 at a time, for 4 epochs."""
    path = make_tiny('detection', own, tmp_path).config
    change = f"""
loader = dict(_base_.train_dataloader, batch_size=2)
loader['dataset'] = dict(type='RepeatDataset', times={times}, dataset=dict(loader['dataset'], **dataset))
train_dataloader = dict(_delete_=True, **loader)
train_cfg = dict(max_epochs=4)
param_scheduler = [dict(type='LinearLR', start_factor=0.1, by_epoch=False, end={end})]
"""
    path.write_text(path.read_text() + change)
    found = check_datasets(load_config(path), ['train'], workers=1).findings
    messages = [one.message for one in found if one.kind == SCHEDULE]
    assert len(messages) == (expected is not None) and all(re.search(expected, message) for message in messages)


# The report


def hostile_report():
    names = ['[/b]', '$x_{$', '[red]x', ':smile:', 'a\x1b[31m\nb', 'caf\udce9', 'n' * 5000, '\\', '$\\frac{$']
    part = Part('train', names, sizes=[(96, 64)] * 3, objects=[4.0] * 9)
    part.amounts.update(range(9))
    part.findings = [Finding(BOXES, f'{name}: fault') for name in names]
    return Report([part])


def test_names_with_markup_are_printed_as_they_are(tmp_path):
    report = hostile_report()
    stream = StringIO()
    report.show(Console(file=stream, width=200))
    for text in ('[/b]', '$x_{$', '[red]x', ':smile:', r'a\x1b[31m\nb', r'caf\udce9'):
        assert text in stream.getvalue(), text
    assert '\x1b' not in stream.getvalue()
    assert f'{BOXES}: 9' in stream.getvalue() and 'and 4 more' in stream.getvalue()
    report.save(tmp_path)
    assert len((tmp_path / 'problems.txt').read_text('utf-8').splitlines()) == 9
    for name in ('classes.png', 'sizes.png'):
        assert Image.open(tmp_path / name).width == 1280


def test_plots_stay_the_size_of_a_page(tmp_path):
    part = Part('train', [f'class {i}' for i in range(1203)], sizes=[(96, 64)])
    part.amounts.update({i: 10**7 // (i + 1) for i in range(1200)})
    Report([part, Part('val', part.classes)]).save(tmp_path)
    assert Image.open(tmp_path / 'classes.png').height < 11 * 160


# Real data


@needs_data
@pytest.mark.parametrize(
    'config, data, objects',
    [
        ('mask_rcnn/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py', 'coco_cc', 577),  # 583 less 6 crowds
        ('upernet/upernet_swin-t-p4-w7_8xb2-160k_ade20k-512x512.py', 'coco_sem_cc', None),
    ],
)
def test_real_data_are_clean(config, data, objects):
    cfg = load_config(ROOT / 'configs' / config)
    for part in ('train', 'val'):
        cfg[f'{part}_dataloader'].dataset.data_root = str(Path(os.environ['SWIN_MM_DATA'], data))
    report = check_datasets(cfg, ['train', 'val'], 1)
    assert report.faults == []
    assert {one.kind for one in report.findings} <= {'classes without examples in train', 'schedule'}
    assert objects is None or report.parts[0].amounts.total() == objects
    if data == 'coco_sem_cc':  # it has fewer classes than ADE20K, from which its config comes
        assert max(max(part.amounts) for part in report.parts) < 133
        assert all(0.08 < part.unlabelled / part.values.sum() < 0.14 for part in report.parts)  # README: 10-12 %


@needs_data
def test_real_boxes_written_as_corners(tmp_path):
    source = Path(os.environ['SWIN_MM_DATA'], 'nuclei_cc0')
    content = json.loads((source / 'annotations/instances_val.json').read_text())
    for annotation in content['annotations']:
        x, y, w, h = annotation['bbox']
        annotation['bbox'] = [x, y, x + w, y + h]
    (tmp_path / 'val.json').write_text(json.dumps(content))
    cfg = load_config(ROOT / 'configs/nuclei/mask-rcnn_swin-nano_fpn_nuclei.py')
    cfg.val_dataloader.dataset.update(data_root=str(source), ann_file=str(tmp_path / 'val.json'))
    faults = check_datasets(cfg, ['val'], 1).faults
    assert {one.kind for one in faults} == {BOXES}
    assert len(faults) > 0.95 * len(content['annotations'])  # near the origin both readings are alike
    assert sum('looks like x1, y1, x2, y2' in one.message for one in faults) > 0.9 * len(faults)


@needs_data
def test_real_masks_of_0_and_255(own, tmp_path):
    source = Path(os.environ['SWIN_MM_DATA'], 'nuclei_cc0')
    for path in sorted((source / 'semantic/val').iterdir())[:8]:
        for folder, image in (('images', source / 'val' / path.name), ('maps', path)):
            (tmp_path / 'own' / folder).mkdir(parents=True, exist_ok=True)
            shutil.copy(image, tmp_path / 'own' / folder)
    cfg = load_config(make_tiny('segmentation', own, tmp_path).config)
    cfg.train_dataloader.dataset.update(
        data_root=str(tmp_path / 'own'),
        data_prefix=dict(img_path='images', seg_map_path='maps'),
        img_suffix='.png',
        reduce_zero_label=False,
    )
    cfg.train_dataloader.dataset.pipeline[1].reduce_zero_label = False
    assert lines(check_datasets(cfg, ['train'], 1)) == []
    for path in (tmp_path / 'own/maps').iterdir():
        change_map(path, lambda labels: labels * 255)
    found = check_datasets(cfg, ['train'], 1).faults
    assert any('0 and 255 only' in one.message for one in found), found


@needs_data
def test_real_maps_with_a_class_too_many(tmp_path):
    source = Path(os.environ['SWIN_MM_DATA'], 'ade20k_samples')
    cfg = load_config(ROOT / 'configs/upernet/upernet_swin-t-p4-w7_8xb2-160k_ade20k-512x512.py')
    cfg.val_dataloader.dataset.data_root = str(tmp_path / 'ade')
    shutil.copytree(source, tmp_path / 'ade')
    assert lines(check_datasets(cfg, ['val'], 1)) == []
    change_map(tmp_path / 'ade/annotations/validation/ADE_val_00000002.png', lambda labels: np.maximum(labels, 151))
    match(lines(check_datasets(cfg, ['val'], 1)), r'labels out of range: .*00000002.png: value 151 \(label 150')
