import json
import os
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from support.tool_fixtures import CLASSES, ROOT, make_tiny

from swin_mm import cli
from swin_mm.analysis.dataset_check import check
from swin_mm.openmmlab.config import load_config


@pytest.fixture
def own(data, tmp_path):
    """A copy of the tiny data to spoil."""
    shutil.copytree(data, tmp_path / 'data')
    return tmp_path / 'data'


@pytest.fixture
def problems(own, tmp_path):
    """What is found in the tiny data, with the config's text changed."""

    def call(task, change=lambda text: text, parts=('train', 'val')):
        path = make_tiny(task, own, tmp_path).config
        path.write_text(change(path.read_text()))
        return [f'{kind}: {what}' for part in check(load_config(path), [*parts], 1) for kind, what in part.problems]

    return call


def edit(own, part='train'):
    """A part's annotation file, and a function to save it changed."""
    path = own / f'coco/annotations/instances_{part}2017.json'
    content = json.loads(path.read_text())
    return content, lambda: path.write_text(json.dumps(content))


def match(found, *patterns):
    """Each problem is one of those planted, and each planted one was found."""
    assert len(found) == len(patterns), found
    for pattern in patterns:
        assert sum(re.search(pattern, line) is not None for line in found) == 1, (pattern, found)


def run(tool, monkeypatch, *arguments):
    module = tool('check_data')
    monkeypatch.setattr('sys.argv', ['check_data', *map(str, arguments), '--workers', '1'])
    return cli.run(module.main, module.parse_args())


def test_a_clean_data_set(tiny, tool, monkeypatch, tmp_path, capsys):
    assert run(tool, monkeypatch, tiny.config, '--out', tmp_path / 'out') == 0
    printed = capsys.readouterr().out
    assert 'no problems found' in printed and 'val, test' in printed
    # Six scenes with one 20 × 20 square each, partly under a bar of 40 × 12.
    bars = 6 if tiny.task == 'detection' else 6 * 40 * 12
    assert re.search(rf'bar.*{bars:,} \(', printed)
    assert {path.name for path in (tmp_path / 'out').iterdir()} == {'classes.png', 'sizes.png', 'problems.txt'}


def test_faults_make_the_exit_code_1(tiny, problems, own, tool, monkeypatch, tmp_path, capsys):
    for path in (own / 'coco/train2017/1.jpg', own / 'ade/images/training/1.jpg'):
        path.write_bytes(path.read_bytes()[:900])
    config = make_tiny(tiny.task, own, tmp_path).config
    with pytest.raises(SystemExit, match='1 problems found'):
        run(tool, monkeypatch, config, '--part', 'train', '--out', tmp_path / 'out')
    assert 'files that do not decode: 1' in capsys.readouterr().out
    assert '1.jpg: image file is truncated' in (tmp_path / 'out/problems.txt').read_text()


def test_files_of_coco(problems, own):
    images = own / 'coco/train2017'
    (images / '1.jpg').unlink()
    (images / '2.jpg').write_bytes(b'no image')
    content, save = edit(own)
    content['images'][2]['width'] = 97
    save()
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.open(images / '4.jpg').save(images / '4.jpg', exif=turned)
    match(
        problems('detection'),
        r'missing files: .*train2017/1.jpg',
        r'do not decode: .*2.jpg: cannot identify image',
        r'sizes that differ: .*3.jpg is 96 × 64, by the annotation file 97 × 64',
        r'sizes that differ: .*4.jpg is 64 × 96 as its EXIF tag turns it',
    )


def test_boxes_and_masks(problems, own):
    content, save = edit(own)
    faults = [
        ({'bbox': [10, 10, 0, 5]}, r'boxes.*annotation 1 of .*1.jpg: box \[10, 10, 0, 5\].* less than a pixel'),
        ({'bbox': [90, 10, 20, 5]}, r'boxes.*annotation 2 .* reaches outside the image, 96 × 64'),
        ({'area': 0}, r'boxes.*annotation 3 .*area 0'),
        ({'bbox': [float('nan'), 1, 5, 5]}, r'boxes.*annotation 4 '),
        ({'segmentation': []}, r'masks.*annotation 5 .*no mask'),
        ({'segmentation': [[1, 1, 5, 5]]}, r'masks.*annotation 6 .*polygon of 4 numbers'),
        ({'segmentation': [[1, 1, 5, 5, 9, 9]]}, r'masks.*annotation 7 .*without area'),
        ({'segmentation': [[1, 1, 5, 5, 99, 9]]}, r'masks.*annotation 8 .*polygon reaches outside'),
        ({'segmentation': {'size': [96, 64], 'counts': [6144]}}, r'masks.*annotation 9 .*\[96, 64\].*\[64, 96\]'),
        ({'segmentation': {'size': [64, 96], 'counts': [100, 10]}}, r'masks.*annotation 10 .*110 pixels.* 6144'),
        ({'segmentation': {'size': [64, 96], 'counts': [6144]}}, r'masks.*annotation 11 .*without a pixel'),
        ({'segmentation': {'size': [64, 96], 'counts': 'PP6'}}, r'masks.*annotation 12 .*without a pixel'),
    ]
    for annotation, (fault, _) in zip(content['annotations'], faults, strict=True):
        annotation.update(fault)
    save()
    match(problems('detection'), *(pattern for _, pattern in faults))


def test_a_detector_of_boxes_needs_no_masks(problems, own):
    content, save = edit(own)
    for annotation in content['annotations']:
        del annotation['segmentation']
    save()
    boxes = lambda text: text.replace('train_dataloader =', 'train_pipeline[1].with_mask = False\ntrain_dataloader =')  # noqa: E731
    assert problems('detection', boxes) == []
    assert len(problems('detection')) == 12


def test_categories(problems, own):
    content, save = edit(own)
    content['categories'][1]['name'] = 'rod'
    content['annotations'][0]['category_id'] = 7
    save()
    match(
        problems('detection'),
        r"classes.*train2017.json: no category is called 'bar'",
        r"classes.*objects of 'rod' are left out",
        r'classes.*annotation 1 has the unknown category 7',
    )


def test_classes_in_another_order(problems, own):
    content, save = edit(own, 'val')
    content['categories'].reverse()  # mmdet then calls squares bars
    save()
    match(problems('detection'), r"classes.*val2017.json: .*\['bar', 'square'\].*'square', 'bar'")


@pytest.mark.parametrize('task', ['detection', 'segmentation'])
def test_heads_of_another_number_of_classes(problems, task):
    found = problems(task, lambda text: text.replace('num_classes=2', 'num_classes=3', 1), parts=['train'])
    head = r'roi_head.bbox_head' if task == 'detection' else 'decode_head'
    match(found, rf'classes.*model.{head} is made for 3 classes, the dataset names 2')


def test_annotation_files_that_do_not_load(problems, own):
    content, save = edit(own)
    del content['annotations'][3]['area']
    save()
    (own / 'coco/annotations/instances_val2017.json').write_text('{"images": [')
    match(
        problems('detection'),
        r"annotation files: .*train2017.json does not load: KeyError: 'area' is lacking in annotations, id 4$",
        r'annotation files: .*val2017.json does not load: JSONDecodeError',
    )


def test_annotations_of_no_image(problems, own):
    content, save = edit(own)
    content['annotations'][0]['image_id'] = 99
    save()
    match(problems('detection'), r'annotation files: .*not listed: \[99\]')


@pytest.mark.parametrize('task', ['detection', 'segmentation'])
def test_images_of_train_in_val(problems, own, task):
    images = own / 'coco' if task == 'detection' else own / 'ade/images'
    train, val = ('train2017', 'val2017') if task == 'detection' else ('training', 'validation')
    shutil.copy(images / train / '5.jpg', images / val / '2.jpg')
    match(problems(task), rf'in other parts: .*{val}/2.jpg \(val\) is the same as .*{train}/5.jpg in train')


def test_maps_of_labels(problems, own):
    maps = own / 'ade/annotations/training'
    (maps / '1.png').unlink()
    (maps / '2.png').write_bytes((maps / '2.png').read_bytes()[:80])
    Image.open(maps / '3.png').resize((48, 32), 0).save(maps / '3.png')
    Image.open(maps / '4.png').convert('RGB').save(maps / '4.png')
    for name, value in (('5', 3), ('6', 255)):  # 255 is ignored
        labels = np.array(Image.open(maps / f'{name}.png'))
        labels[:2, :3] = value
        Image.fromarray(labels).save(maps / f'{name}.png')
    found = problems('segmentation')
    match(
        found,
        r'missing files: .*annotations/training/1.png',
        r'do not decode: .*annotations/training/2.png',
        r'sizes that differ: .*images/training/3.jpg is 96 × 64, its map .*3.png 48 × 32',
        r'labels out of range: .*4.png has 3 channels',
        r'labels out of range: .*5.png: 6 pixels of value 3 \(label 2 of 2 classes\)',
    )


def test_values_that_do_not_fit_8_bits(problems, own):
    path = own / 'ade/annotations/training/1.png'
    labels = np.array(Image.open(path)).astype(np.uint16)
    labels[0, :4] = 257  # the loader makes a 1 of it
    Image.fromarray(labels).save(path)
    match(problems('segmentation'), r'labels out of range: .*1.png: 4 pixels of value 257, maps have 8 bits')


def test_values_mean_what_the_loader_makes_of_them(own, tmp_path):
    path = make_tiny('segmentation', own, tmp_path).config
    # Of ADE20K's classes two, the other way round: value 1 is wall, value 2 building.
    text = path.read_text().replace("type='BaseSegDataset'", "type='ADE20KDataset'")
    path.write_text(text.replace(str(CLASSES), "('building', 'wall')"))
    part, _ = check(load_config(path), ['train', 'val'], 1)
    values = [np.asarray(Image.open(file)) for file in (own / 'ade/annotations/training').iterdir()]
    assert part.problems == []
    assert part.amounts == {0: sum((v == 2).sum() for v in values), 1: sum((v == 1).sum() for v in values)}


def test_wrappers_are_looked_into(problems, own):
    wrap = """
part = train_dataloader.pop('dataset')
train_dataloader['dataset'] = dict(_delete_=True, type='RepeatDataset', times=2, dataset=dict(
    type='ConcatDataset', datasets=[dict(_base_.train_dataloader.dataset, **part)]))
"""
    (own / 'coco/train2017/1.jpg').unlink()
    match(problems('detection', lambda text: text + wrap), r'missing files: .*1.jpg')


def test_panoptic(problems, own):
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
    save()
    (own / 'coco/panoptic/6.png').unlink()
    change = """
train_dataloader['dataset'].update(type='CocoPanopticDataset', data_prefix=dict(img='train2017/', seg='panoptic/'))
train_dataloader['dataset']['metainfo'].update(thing_classes=['square', 'bar'], stuff_classes=[])
train_dataloader['dataset']['pipeline'] = [dict(type='LoadImageFromFile'), dict(type='LoadPanopticAnnotations')]
"""
    match(
        problems('detection', lambda text: text + change, parts=['train']),
        r'missing files: .*panoptic/6.png',
        r'labels out of range: .*2.png: segments \[9\] are not in its pixels',
        r'labels out of range: .*2.png: segments \[259\] are not in the annotation file',
    )


def test_refuses_what_it_cannot_read(refuse, tiny, tmp_path, own):
    absent = 'train_dataloader.dataset.data_root=/nowhere'
    assert '/nowhere (train_dataloader: data_root)' in refuse('check_data', tiny.config, '--cfg-options', absent)
    if tiny.task == 'detection':
        kind = ['train_dataloader.dataset.type=XMLDataset', 'train_dataloader.dataset.img_subdir=x']
        assert 'train: XMLDataset cannot be checked' in refuse('check_data', tiny.config, '--cfg-options', *kind)
    (tmp_path / 'bare.py').write_text("default_scope = 'mmdet'\nmodel = dict()\n")
    assert '--workers' in refuse('check_data', tiny.config, '--workers', '0')
    assert 'no val_dataloader' in refuse('check_data', 'bare.py', '--part', 'val')


@pytest.mark.skipif('SWIN_MM_DATA' not in os.environ, reason='SWIN_MM_DATA is not set')
@pytest.mark.parametrize(
    'config, data, amounts',
    [
        ('mask_rcnn/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py', 'coco_cc', 577),  # 583 less 6 crowds
        ('upernet/upernet_swin-t-p4-w7_8xb2-160k_ade20k-512x512.py', 'coco_sem_cc', None),
    ],
)
def test_real_data_are_clean(config, data, amounts):
    cfg = load_config(ROOT / 'configs' / config)
    for part in ('train', 'val'):
        cfg[f'{part}_dataloader'].dataset.data_root = str(Path(os.environ['SWIN_MM_DATA'], data))
    if data == 'coco_sem_cc':  # it has fewer classes than ADE20K, from which its config comes
        assert max(max(part.amounts) for part in check(cfg, ['train', 'val'], 1)) < 133
    parts = check(cfg, ['train', 'val'], 1)
    assert [part.problems for part in parts] == [[], []]
    assert amounts is None or parts[0].amounts.total() == amounts
