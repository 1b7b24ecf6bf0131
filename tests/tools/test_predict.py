"""tools/predict.py: its files against what mmdet's and mmseg's own interfaces predict."""

import json

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image
from pycocotools import mask as run_lengths

from swin_mm import cli

NAMES = ('circle', 'cross')  # the checkpoint's; the config has others


@pytest.fixture(scope='module')
def config(tiny, tmp_path_factory):
    """The tiny config, with few objects, as drawing them takes time."""
    path = tmp_path_factory.mktemp(tiny.task) / 'few.py'
    few = 'model = dict(test_cfg=dict(rcnn=dict(max_per_img=5)))' if tiny.task == 'detection' else ''
    path.write_text(f"_base_ = r'{tiny.config}'\n{few}\n")
    return path


@pytest.fixture(scope='module')
def checkpoint(tiny, config, data, tmp_path_factory):
    """Random weights of the tiny model."""
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    torch.manual_seed(0)
    model = MODELS.build(cfg.model)
    if tiny.task == 'segmentation':  # each class is to be seen in half of the picture
        from mmseg.apis import inference_model

        model.cfg = cfg
        picture = np.array(Image.open(data / 'coco/val2017/1.jpg'))[..., ::-1]
        logits = inference_model(model.eval(), np.ascontiguousarray(picture)).seg_logits.data
        model.decode_head.conv_seg.bias.data[1] += (logits[0] - logits[1]).median()
    path = tmp_path_factory.mktemp(tiny.task) / 'weights.pth'
    torch.save({'state_dict': model.state_dict(), 'meta': {'dataset_meta': {'classes': NAMES}}}, path)
    return path


@pytest.fixture(scope='module')
def expected(tiny, config, checkpoint):
    """What the library's own interface predicts for a path or a BGR array."""
    if tiny.task == 'detection':
        from mmdet.apis import inference_detector as infer
        from mmdet.apis import init_detector as build
    else:
        from mmseg.apis import inference_model as infer
        from mmseg.apis import init_model as build
    model = build(str(config), str(checkpoint), device='cpu')
    return lambda picture: infer(model, picture)


@pytest.fixture
def images(data, tmp_path):
    """A folder: a picture of 96 × 64 pixels, one of 64 × 96, and one of the first in a folder below."""
    (tmp_path / 'in/below').mkdir(parents=True)
    picture = Image.open(data / 'coco/val2017/1.jpg')
    picture.save(tmp_path / 'in/a.png')
    picture.rotate(90, expand=True).save(tmp_path / 'in/b.png')
    picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(tmp_path / 'in/below/a.png')
    return tmp_path / 'in'


@pytest.fixture
def predict(config, checkpoint, tool, monkeypatch, tmp_path):
    """Run the tool in this process; the folder it filled."""

    def call(*arguments, out='out'):
        module = tool('predict')
        arguments = [config, checkpoint, '--out', tmp_path / out, '--device=cpu', '--score-thr=0', *arguments]
        monkeypatch.setattr('sys.argv', ['predict', *map(str, arguments)])
        assert cli.run(module.main, module.parse_args()) == 0
        return tmp_path / out / 'pred'

    return call


def labels(path):
    return np.asarray(Image.open(path))


def compare(path, sample, tolerance):
    """Compare what is written under a name with what was expected."""
    if 'pred_sem_seg' in sample:
        found = labels(f'{path}.png')
        assert (found == sample.pred_sem_seg.data[0].numpy()).mean() > 1 - tolerance
        return
    found, objects = json.loads(path.with_name(f'{path.name}.json').read_text()), sample.pred_instances
    assert found['names'] == [NAMES[label] for label in found['labels']]
    assert len(found['scores']) == len(objects) > 0
    np.testing.assert_allclose(found['scores'], objects.scores.numpy(), atol=tolerance)
    np.testing.assert_allclose(found['bboxes'], objects.bboxes.numpy(), atol=100 * tolerance)
    masks = np.array([run_lengths.decode(mask) for mask in found['masks']])
    assert (masks == objects.masks.numpy()).mean() > 1 - tolerance


def test_writes_what_the_model_predicts(tiny, expected, predict, images):
    out = predict(images, images / '**/a.png')
    assert sorted(path.stem for path in out.rglob('*.*')) == ['a', 'a', 'b']
    for name in ('a', 'b', 'below/a'):
        compare(out / name, expected(str(images / f'{name}.png')), 1e-3)
    if tiny.task == 'segmentation':
        assert set(np.unique(labels(out / 'a.png'))) == {0, 1}, 'else this test says little'
    classes = json.loads((out.parent / 'classes.json').read_text())
    assert [row['name'] for row in classes] == [*NAMES]


def test_batches_take_images_of_any_size(tiny, expected, predict, images):
    paths = [images / name for name in ('a.png', 'below/a.png', 'b.png')]
    paths = paths if tiny.task == 'segmentation' else paths[:2]  # mmdet pads b, which changes it
    out = predict(*paths, '--batch-size', '3')
    for path in paths:
        compare(out / path.relative_to(images).with_suffix(''), expected(str(path)), 1e-3)


def test_the_picture_keeps_its_colours_and_gets_a_legend(predict, images, tmp_path):
    Image.new('RGB', (96, 64), (0, 0, 255)).save(tmp_path / 'blue.png')
    out = predict(tmp_path / 'blue.png').parent
    drawn = np.asarray(Image.open(out / 'vis/blue.jpg')).astype(int)
    picture, panel = drawn[:64, :96], drawn[:, 96:]
    assert picture[..., 2].mean() > 100, 'blue and red are not swapped'
    colours = [row['color'] for row in json.loads((out / 'classes.json').read_text())]
    near = [np.abs(panel - colour).sum(-1).min() < 40 for colour in colours]
    assert any(near), 'a class that was seen stands in the legend, in its colour'


def test_a_video_becomes_a_video(expected, predict, images, tmp_path):
    frames = [cv2.imread(str(images / name))[:60, :60] for name in ('a.png', 'b.png', 'below/a.png')]
    writer = cv2.VideoWriter(str(tmp_path / 'clip.avi'), cv2.VideoWriter_fourcc(*'FFV1'), 7, (60, 60))  # lossless
    for frame in frames:
        writer.write(frame)
    writer.release()
    out = predict(tmp_path / 'clip.avi', '--batch-size', '2')
    assert len([*(out / 'clip').iterdir()]) == 3
    compare(out / 'clip/000002', expected(frames[2]), 0.02)
    drawn = cv2.VideoCapture(str(out.parent / 'vis/clip.mp4'))
    assert (drawn.get(cv2.CAP_PROP_FRAME_COUNT), drawn.get(cv2.CAP_PROP_FPS)) == (3, 7)


def test_broken_files_are_named_and_skipped(predict, images, tmp_path, capsys):
    whole = (images / 'b.png').read_bytes()
    (images / 'aa.png').write_bytes(whole[: len(whole) // 2])
    (images / 'c.mp4').write_bytes(b'no video')
    with pytest.raises(SystemExit, match='2 of 4 inputs skipped'):
        predict(images, '--batch-size', '2')
    printed = capsys.readouterr().out
    assert 'aa.png cannot be read: image file is truncated' in printed and 'c.mp4: no frame can be read' in printed
    assert sorted(path.name for path in (tmp_path / 'out/vis').iterdir()) == ['a.jpg', 'b.jpg'], 'nothing half-written'


def test_bfloat16(tiny, predict, images):
    full, half = predict(images / 'a.png'), predict(images / 'a.png', '--dtype', 'bf16', out='half')
    if tiny.task == 'segmentation':
        assert (labels(full / 'a.png') == labels(half / 'a.png')).mean() > 0.9
    else:
        scores = [np.array(json.loads((folder / 'a.json').read_text())['scores']) for folder in (full, half)]
        assert 0 < np.abs(scores[0] - scores[1]).max() < 0.02


def test_augmented_prediction_of_a_mirrored_image_is_mirrored(tiny, predict, images, capsys):
    out = predict(images / 'a.png', images / 'below/a.png', '--tta', '--cfg-options', 'tta_pipeline=None')
    if tiny.task == 'segmentation':
        assert (labels(out / 'a.png') == labels(out / 'below/a.png')[:, ::-1]).mean() > 0.99
    else:
        assert 'masks are left out' in capsys.readouterr().out
        found, mirrored = (json.loads((out / name).read_text()) for name in ('a.json', 'below/a.json'))
        np.testing.assert_allclose(found['scores'], mirrored['scores'], atol=1e-3)
        assert 'masks' not in found


def test_stock_augmentation(tiny, predict, images):
    if tiny.task == 'segmentation':  # its pipeline reads annotations in the middle
        assert labels(predict(images / 'a.png', '--tta') / 'a.png').shape == (64, 96)


def test_low_scores_are_left_out(tiny, predict, images):
    if tiny.task == 'detection':
        scores = json.loads((predict(images / 'a.png') / 'a.json').read_text())['scores']
        out = predict(images / 'a.png', '--score-thr', scores[2])
        kept = json.loads((out / 'a.json').read_text())['scores']
        assert kept == [score for score in scores if score >= scores[2]] != scores
        out = predict(images / 'a.png', '--score-thr', '1.1')  # nothing is left to draw
        assert json.loads((out / 'a.json').read_text())['scores'] == []


def test_bad_input_is_named(tiny, refuse, checkpoint, images, tmp_path):
    (tmp_path / 'empty').mkdir()
    to = ('--out', 'out')
    assert 'nothing.jpg: no image or video' in refuse('predict', tiny.config, checkpoint, 'nothing.jpg', *to)
    assert 'empty: no image or video' in refuse('predict', tiny.config, checkpoint, 'empty', *to)
    assert '--batch-size' in refuse('predict', tiny.config, checkpoint, images, *to, '--batch-size', '0')
    assert '--device abacus' in refuse('predict', tiny.config, checkpoint, images, *to, '--device', 'abacus')
    assert 'absent.pth does not exist' in refuse('predict', tiny.config, 'absent.pth', images, *to)
    head = 'roi_head.bbox_head' if tiny.task == 'detection' else 'decode_head'
    error = refuse('predict', tiny.config, checkpoint, images, *to, '--cfg-options', f'model.{head}.num_classes=5')
    assert 'does not cover the whole model' in error and head in error
    scope = 'default_scope=mmpretrain'
    assert 'mmdet or mmseg' in refuse('predict', tiny.config, checkpoint, images, *to, '--cfg-options', scope)


def test_a_long_name(predict, images):
    (images / 'a.png').rename(images / f'{"a" * 245}.png')
    out = predict(images / f'{"a" * 245}.png')
    assert [path.stem for path in out.iterdir()] == ['a' * 245]
    assert [path.name for path in (out.parent / 'vis').iterdir()] == ['a' * 245 + '.jpg']


def test_tiles(tiny, predict, images):
    """A tile as large as the image changes nothing; smaller ones give a result of the image's size."""
    whole, same = predict(images / 'a.png'), predict(images / 'a.png', '--tile', '96', out='same')
    parts = predict(images / 'a.png', '--tile', '48', '--overlap', '0.3', '--batch-size', '2', out='parts')
    if tiny.task == 'segmentation':
        assert (labels(whole / 'a.png') == labels(same / 'a.png')).all()
        assert labels(parts / 'a.png').shape == (64, 96)
    else:
        assert (whole / 'a.json').read_text() == (same / 'a.json').read_text()
        found = json.loads((parts / 'a.json').read_text())
        assert found['masks'] and all(mask['size'] == [64, 96] for mask in found['masks'])
        boxes = np.array(found['bboxes'])
        assert (boxes[:, 2] > 60).any() and (boxes[:, [0, 1]] >= 0).all() and (boxes <= [96, 64, 96, 64]).all()


def test_tile_and_overlap_are_checked(tiny, refuse, checkpoint, images):
    arguments = (tiny.config, checkpoint, images, '--out', 'out', '--tile')
    assert 'tile 8, overlap 0.2: expected at least 32' in refuse('predict', *arguments, '8')
    assert 'tile 64, overlap 1.0: expected' in refuse('predict', *arguments, '64', '--overlap', '1')
