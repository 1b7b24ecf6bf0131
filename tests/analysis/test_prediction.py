"""Parts of predictions: names, formats, drawing, tiles."""

import errno
import json

import cv2
import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from mmengine.structures import PixelData
from PIL import Image

from swin_mm.analysis import prediction
from swin_mm.analysis.prediction import Predictor, View, name_outputs, save_prediction
from swin_mm.engine.drawing import draw_prediction
from swin_mm.utils.errors import CheckpointError, InputError

CLASSES, PALETTE = ['cat', 'dog', 'sky'], [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


def build(config, folder):
    """A model with random weights and its checkpoint."""
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    torch.save({'state_dict': model.state_dict()}, folder / 'weights.pth')
    return cfg, str(folder / 'weights.pth')


def test_names_of_outputs():
    assert name_outputs(['x/a.png', 'x/b.png']) == {'x/a.png': 'a', 'x/b.png': 'b'}
    assert name_outputs(['x/a.png', 'y/a.png']) == {'x/a.png': 'x/a', 'y/a.png': 'y/a'}
    assert name_outputs(['x/a.png', 'x/a.jpg', 'x/b.c.jpg']) == {
        'x/a.png': 'a.png',
        'x/a.jpg': 'a.jpg',
        'x/b.c.jpg': 'b.c',
    }


def test_names_that_are_too_long_are_cut_and_stay_different():
    first, second = (f'x/{"é" * 124}{end}.png' for end in 'ab')  # 249 bytes without the suffix
    names = name_outputs([first, second])
    assert names[first] != names[second] and names[first].startswith('é' * 100)
    assert all(len(f'{name}.json'.encode()) <= 255 for name in names.values())


def test_autocast_reaches_the_backbone_and_spares_boxes(tiny, tmp_path):
    predictor = Predictor(*build(tiny.config, tmp_path), 'cpu', 'bf16', score_thr=0)
    dtypes = []
    predictor.inferencer.model.backbone.register_forward_hook(
        lambda *_: dtypes.append(torch.is_autocast_enabled('cpu'))
    )
    ((_, sample),) = predictor.predict([View('a', np.zeros((64, 96, 3), np.uint8))])
    assert dtypes == [True]
    values = sample.pred_instances.bboxes if tiny.task == 'detection' else sample.seg_logits.data
    assert values.dtype == torch.float32


def test_a_checkpoint_that_lacks_a_head_is_refused(tiny, tmp_path):
    cfg, checkpoint = build(tiny.config, tmp_path)
    state = torch.load(checkpoint)['state_dict']
    head = 'rpn_head.' if tiny.task == 'detection' else 'decode_head.'
    torch.save({'state_dict': {k: v for k, v in state.items() if not k.startswith(head)}}, checkpoint)
    with pytest.raises(CheckpointError, match=head):
        Predictor(cfg, checkpoint, 'cpu')


def test_weights_saved_from_data_parallel_training(tiny, tmp_path):
    cfg, checkpoint = build(tiny.config, tmp_path)
    state = torch.load(checkpoint)['state_dict']
    torch.save({f'module.{key}': value for key, value in state.items()}, checkpoint)
    loaded = dict(Predictor(cfg, checkpoint, 'cpu').inferencer.model.named_parameters())  # of all but the backbone
    assert len(loaded) > 10 and all(torch.equal(value, state[key]) for key, value in loaded.items())


@pytest.mark.parametrize('task, pack', [('detection', 'PackDetInputs'), ('segmentation', 'PackSegInputs')])
def test_four_channels_of_sixteen_bits(task, pack, data, tmp_path):
    from support.tool_fixtures import make_tiny

    config = tmp_path / 'four.py'
    tiny = make_tiny(task, data, tmp_path)
    config.write_text(
        f"_base_ = r'{tiny.config}'\n"
        'model = dict(backbone=dict(in_channels=4), data_preprocessor=dict(mean=None, std=None, bgr_to_rgb=False))\n'
        "load = dict(type='LoadImageFromFile', color_type='unchanged', imdecode_backend='cv2')\n"
        f"pipeline = [load, dict(type='Resize', scale=(96, 64), keep_ratio=True), dict(type='{pack}')]\n"
        'test_dataloader = dict(dataset=dict(pipeline=pipeline))\n'
    )
    pixels = np.random.default_rng(0).integers(0, 65536, (64, 96, 4)).astype(np.uint16)
    assert cv2.imwrite(str(tmp_path / 'a.tiff'), pixels)
    predictor = Predictor(*build(config, tmp_path), 'cpu')
    inputs = []
    predictor.inferencer.model.backbone.register_forward_pre_hook(lambda _, args: inputs.append(args[0]))
    view = View('a', predictor.read(str(tmp_path / 'a.tiff')))
    ((_, sample),) = predictor.predict([view])
    np.testing.assert_array_equal(inputs[0][0].numpy(), pixels.transpose(2, 0, 1).astype(np.float32))
    drawn = predictor.draw(view, sample)
    assert drawn.dtype == np.uint8 and drawn[:64, :96].std() > 10


@pytest.fixture
def panoptic():
    ids = torch.full((40, 60), 3)  # the number of classes: void
    ids[:10], ids[10:20, :30], ids[10:20, 30:] = 2, 1000, 2000  # sky and two cats
    mmdet = pytest.importorskip('mmdet.structures')
    return mmdet.DetDataSample(pred_panoptic_seg=PixelData(sem_seg=ids[None]))


def test_panoptic_segments(panoptic, tmp_path):
    save_prediction(panoptic, (40, 60), CLASSES, PALETTE, tmp_path / 'scene')
    found = json.loads((tmp_path / 'scene.json').read_text())['segments_info']
    assert sorted((row['name'], row['area']) for row in found) == [('cat', 300), ('cat', 300), ('sky', 600)]
    pixels = np.asarray(Image.open(tmp_path / 'scene.png')) @ [1, 256, 65536]
    assert (pixels[20:] == 0).all()
    for row in found:
        assert (pixels == row['id']).sum() == row['area']
    drawn = draw_prediction(np.zeros((40, 60, 3), np.uint8), panoptic, CLASSES, PALETTE)
    assert drawn.shape[1] > 60
    assert (drawn[15, 29] == PALETTE[0]).all() and (drawn[15, 30] == PALETTE[0]).all(), 'the cats are separated'
    panoptic.pred_panoptic_seg.sem_seg[:] = 3
    assert draw_prediction(np.zeros((40, 60, 3), np.uint8), panoptic, CLASSES, PALETTE).shape[1] > 60


@pytest.mark.parametrize('suffix', ['png', 'json'])
def test_a_full_disk_leaves_no_part_of_a_file(panoptic, tmp_path, monkeypatch, suffix):
    def full(*_, **__):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(*((Image.Image, 'save') if suffix == 'png' else (prediction.Path, 'write_text')), full)
    with pytest.raises(InputError, match=rf'scene.{suffix} cannot be written: No space left on device'):
        save_prediction(panoptic, (40, 60), CLASSES, PALETTE, tmp_path / 'scene')
    assert {path.name for path in tmp_path.iterdir()} <= {'scene.png'} - {f'scene.{suffix}'}


def test_a_video_that_cannot_be_written_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(cv2.VideoWriter, 'write', lambda *_: None, raising=False)
    writes = type('Silent', (), {'__init__': lambda *_: None, 'write': lambda *_: None, 'release': lambda _: None})
    monkeypatch.setattr(cv2, 'VideoWriter', writes)
    monkeypatch.setattr(cv2, 'VideoWriter_fourcc', lambda *_: 0, raising=False)
    with pytest.raises(InputError, match='is the disk full'):
        prediction.write_video(tmp_path / 'a.mp4', 25, [np.zeros((32, 32, 3), np.uint8)] * 3)
    assert not any(tmp_path.iterdir())
