"""Exported files in place of models: small files whose outputs are known, run by each runtime."""

import importlib
import json
from dataclasses import replace
from types import SimpleNamespace

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from PIL import Image
from pycocotools import mask as run_lengths
from support.exported import MEAN, STD, Detector, Segmentor, metadata, require_exporter, write
from support.tool_fixtures import make_tiny
from torch import nn

from swin_mm import cli
from swin_mm.analysis.runtime import (
    ExportedFile,
    ExportedModel,
    openvino_run,
    parse_metadata,
    read_metadata,
    sample_images,
    use_exported,
)
from swin_mm.engine import testing
from swin_mm.utils.errors import InputError

pytest.importorskip('onnxruntime')
require_exporter()
HALF = dict(scale=[80, 64], keep_ratio=True)  # the photo is 160 x 128


@pytest.fixture(scope='module')
def files(tmp_path_factory):
    """A segmentor with logits, one with labels, a detector, and a detector with masks."""
    pytest.importorskip('mmdet')
    pytest.importorskip('mmseg')
    folder = tmp_path_factory.mktemp('exported')
    objects = ['boxes', 'scores', 'labels']

    class Labels(Segmentor):
        def forward(self, image):
            return super().forward(image).argmax(1)

    made = {
        'logits': (Segmentor(), metadata('semantic', ['logits'])),
        'labels': (Labels(), metadata('semantic', ['labels'], HALF)),
        'detection': (Detector(False), metadata('detection', objects, HALF)),
        'instance': (Detector(True), metadata('instance', [*objects, 'masks'], HALF)),
    }
    return {name: write(model, folder / f'{name}.onnx', about) for name, (model, about) in made.items()}


@pytest.fixture(params=['onnxruntime', 'openvino'])
def runtime(request):
    pytest.importorskip(request.param)
    return request.param


@pytest.fixture
def photo(tmp_path):
    """RGB with a red and a grey rectangle, on even coordinates."""
    pixels = np.zeros((128, 160, 3), np.uint8)
    pixels[20:60, 30:90] = 200, 50, 30
    pixels[80:100, 10:60] = 200, 180, 150
    Image.fromarray(pixels).save(tmp_path / 'photo.png')
    return tmp_path / 'photo.png'


@pytest.fixture
def predict(photo, runtime, monkeypatch, tmp_path):
    """Run tools/predict.py on a file and the photo; the folder of predictions."""

    def call(file, *arguments):
        module = importlib.import_module('tools.predict')
        words = ['predict', file, photo, '--out', tmp_path / 'out', '--runtime', runtime, *arguments]
        monkeypatch.setattr('sys.argv', [*map(str, words)])
        assert cli.run(module.main, module.parse_args()) == 0
        return tmp_path / 'out/pred'

    return call


@pytest.mark.parametrize('kind', ['logits', 'labels'])
def test_segments(files, predict, photo, kind):
    found = np.asarray(Image.open(predict(files[kind]) / 'photo.png'))
    pixels = np.asarray(Image.open(photo))
    expected = (pixels[..., 0] > 100) & (pixels[..., 2] < 100)
    wrong = (found == 1) != expected
    if kind == 'logits':
        assert not wrong.any(), 'channels are swapped, or mean and std are not applied'
    else:  # computed at half of the size
        assert cv2.erode(wrong.astype(np.uint8), np.ones((3, 3))).sum() == 0


def test_objects(files, predict):
    out = predict(files['detection'])
    found = json.loads((out / 'photo.json').read_text())
    assert found['names'] == ['bar', 'square'], 'and no row of padding'
    np.testing.assert_allclose(found['scores'], [0.9 * 180 / 255, 0.5 * 180 / 255], rtol=1e-5)
    np.testing.assert_allclose(found['bboxes'], [[16, 32, 80, 64], [64, 64, 160, 128]], atol=1e-4)
    assert json.loads((out.parent / 'classes.json').read_text())[1] == {'id': 1, 'name': 'bar', 'color': [0, 255, 0]}


def test_masks_are_pasted_into_their_boxes(files, predict):
    found = json.loads((predict(files['instance']) / 'photo.json').read_text())
    masks = [run_lengths.decode(mask).astype(bool) for mask in found['masks']]
    expected = np.zeros((2, 128, 160), bool)
    expected[0, 32:64, 16:48] = True  # the left half
    expected[1, 64:128, 64:112] = True
    for mask, box in zip(masks, expected, strict=True):
        assert (mask & box).sum() / (mask | box).sum() > 0.97


def test_low_scores_are_left_out(files, predict):
    found = json.loads((predict(files['detection'], '--score-thr', '0.5') / 'photo.json').read_text())
    assert found['names'] == ['bar']


def test_masks_of_the_images_size():
    """Padding is cut off, and what is left resized to the original image."""
    from mmdet.structures import DetDataSample

    masks = np.zeros((1, 1, 64, 96), np.float32)
    masks[..., 16:32, 16:40] = 0.9

    class File:
        metadata = replace(metadata('instance', ['masks']), mask_format='image')

        def __call__(self, images):
            one = np.ones((1, 1), np.float32)
            return {'boxes': np.float32([[[16, 16, 40, 32]]]), 'scores': one, 'labels': one.astype(int), 'masks': masks}

    sample = DetDataSample(metainfo=dict(img_shape=(40, 80), ori_shape=(80, 160), scale_factor=(0.5, 0.5)))
    (found,) = ExportedModel(File()).test_step({'inputs': [torch.zeros(3, 40, 80)], 'data_samples': [sample]})
    expected = np.zeros((80, 160), bool)
    expected[32:64, 32:80] = True
    assert (found.pred_instances.masks[0].numpy() == expected).all()
    np.testing.assert_allclose(found.pred_instances.bboxes, [[32, 32, 80, 64]])


def test_metrics(runtime, data, tmp_path):
    """mIoU by tools/test.py, and by hand."""
    pytest.importorskip('mmseg')
    cfg = Config.fromfile(make_tiny('segmentation', data, tmp_path).config)

    class Dark(nn.Module):  # bars are 160, squares 255; wrong to the left
        def forward(self, image):
            red = image[:, 0] * STD[0] + MEAN[0] - 200
            red = torch.where(torch.arange(image.shape[3]) < 48, -red, red)
            return torch.stack([red, -red], 1)

    file = write(Dark(), tmp_path / 'dark.onnx', metadata('semantic', ['logits']))
    cfg.work_dir = str(tmp_path / 'work')
    use_exported(cfg, file, runtime)
    found = testing.test(cfg, None)
    shared, either = np.zeros(2), np.zeros(2)
    for path in (data / 'ade/images/validation').iterdir():
        labels = np.asarray(Image.open(data / f'ade/annotations/validation/{path.stem}.png'))
        dark = np.asarray(Image.open(path))[..., 0] < 200
        dark[:, :48] ^= True
        for i, (truth, predicted) in enumerate(((labels == 1, ~dark), (labels == 2, dark))):
            shared[i] += (truth & predicted).sum()
            either[i] += ((truth | predicted) & (labels > 0)).sum()
    assert 10 < found['mIoU'] < 90
    assert found['mIoU'] == pytest.approx(100 * (shared / either).mean(), abs=1.0)  # JPEG decoders differ


def test_images_to_calibrate_on_are_prepared_as_in_a_test(tiny, data):
    cfg = Config.fromfile(tiny.config)
    task = 'instance' if tiny.task == 'detection' else 'semantic'
    images = list(sample_images(cfg, metadata(task, []), 3))
    assert len(images) == 3 and len(list(sample_images(cfg, metadata(task, []), 100))) == 6
    first = data / ('coco/train2017' if tiny.task == 'detection' else 'ade/images/training') / '1.jpg'
    expected = (np.asarray(Image.open(first), np.float32) - MEAN) / STD  # 96 x 64, as the pipeline resizes to
    np.testing.assert_allclose(images[0][0].transpose(1, 2, 0), expected, atol=1.5)  # JPEG decoders differ by 2


def test_a_file_that_resizes_gets_images_as_they_are(tiny, tmp_path):
    cfg, scale = Config.fromfile(tiny.config), dict(scale=[48, 48], keep_ratio=True)
    cfg.test_dataloader.dataset.pipeline[1].scale = (48, 48)  # images are 96 x 64
    detects = tiny.task == 'detection'
    about = metadata('detection', ['boxes', 'scores', 'labels']) if detects else metadata('semantic', ['logits'])
    image = next(sample_images(cfg, about, 1))
    assert image.shape[2:] == ((32, 64) if detects else (32, 48))  # the detector's are padded
    about = replace(about, input=replace(about.input, resize_inside=scale))
    assert next(sample_images(cfg, about, 1)).shape[2:] == (64, 96)
    file = write(Detector(False) if detects else Segmentor(), tmp_path / 'model.onnx', about)
    assert read_metadata(file).input.resize_inside == scale
    use_exported(cfg, file)
    assert 'Resize' not in [step['type'] for step in cfg.test_dataloader.dataset.pipeline]


def test_a_file_without_metadata_or_of_another_kind_is_refused(files, tmp_path):
    import onnx

    model = onnx.load(files['logits'])
    del model.metadata_props[:]
    onnx.save(model, tmp_path / 'bare.onnx')
    with pytest.raises(InputError, match='says nothing about its classes'):
        read_metadata(tmp_path / 'bare.onnx')
    (tmp_path / 'broken.onnx').write_bytes(b'no model')
    with pytest.raises(InputError, match='broken.onnx cannot be read'):
        read_metadata(tmp_path / 'broken.onnx')
    with pytest.raises(InputError, match='absent.onnx does not exist'):
        read_metadata(tmp_path / 'absent.onnx')
    with pytest.raises(InputError, match=r'expected a file that ends in .onnx or .xml'):
        ExportedFile(tmp_path / 'model.pth')
    about = json.loads(metadata('semantic', ['logits']).dumps())
    for key, value, message in (
        ('version', 2, 'has version 2, expected 1'),
        ('task', 'depth', "task 'depth', expected one of semantic"),
        ('input', {}, 'cannot be used'),
    ):
        with pytest.raises(InputError, match=message):
            parse_metadata(json.dumps({**about, key: value}), 'x')


def test_options_that_do_not_fit_are_refused(files, tiny):
    with pytest.raises(InputError, match='onnxruntime has no bf16'):
        ExportedFile(files['logits'], dtype='bf16')
    other = files['logits' if tiny.task == 'detection' else 'detection']
    with pytest.raises(InputError, match='is for the task'):
        use_exported(Config.fromfile(tiny.config), other)
    with pytest.raises(InputError, match='fails on images of 1 × 4 × 64 × 96'):
        ExportedFile(files['logits'])(np.zeros((1, 4, 64, 96), np.float32))


def test_openvino_runs_once_for_all_outputs():
    class Compiled:
        def __init__(self):
            self.outputs = [SimpleNamespace(any_name=name) for name in ('boxes', 'scores', 'labels')]
            self.calls = 0

        def __call__(self, inputs):
            self.calls += 1
            return [inputs[0] + i for i in range(3)]

    compiled = Compiled()
    found = openvino_run(compiled)(np.zeros((1, 2)))
    assert compiled.calls == 1 and {name: value[0, 0] for name, value in found.items()} == dict(
        boxes=0, scores=1, labels=2
    )
