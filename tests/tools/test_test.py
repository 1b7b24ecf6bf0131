import copy
import json
import pickle
import tempfile
from pathlib import Path

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import DATASETS, init_default_scope
from PIL import Image
from pycocotools import mask as run_lengths
from support.processes import in_processes, run_forked, run_main, run_on_a_full_disk
from support.tool_fixtures import CLASSES, Bomb, last_checkpoint, run_tool

from swin_mm.engine.tta import apply_tta
from swin_mm.utils.errors import InputError


def metrics(work_dir):
    """The metrics that the run has written."""
    (path,) = work_dir.glob('*/*.json')
    return json.loads(path.read_text())


def test_metrics_predictions_and_pictures(tiny, trained, tmp_path):
    checkpoint = last_checkpoint(trained[0])
    out = 'new/predictions.pkl' if tiny.task == 'detection' else 'new/masks'
    options = ('--work-dir', 'tested', '--out', out, '--show-dir', 'drawn')
    output = run_tool('test', tiny.config, checkpoint, *options, cwd=tmp_path)
    measured = metrics(tmp_path / 'tested')
    assert f'{tiny.metric}: {measured[tiny.metric]:.4f}' in output
    # The model is that of the checkpoint: training has tested it, too.
    assert f'{tiny.metric}: {measured[tiny.metric]:.4f}' in trained[1]
    # Folders are where the shell's user means them, one picture for each image, under its name.
    assert sorted(path.name for path in (tmp_path / 'drawn').iterdir()) == ['1.png', '2.png']
    drawn = np.asarray(Image.open(tmp_path / 'drawn/1.png'))
    assert drawn.shape[0] >= 64 and drawn.shape[1] > 192 and drawn.shape[2] == 3, (
        'the ground truth, the prediction and a legend stand side by side'
    )

    if tiny.task == 'detection':
        predictions = pickle.loads((tmp_path / out).read_bytes())
        assert sorted(prediction['img_path'][-5:] for prediction in predictions) == ['1.jpg', '2.jpg']
        assert all('masks' in prediction['pred_instances'] for prediction in predictions)
    else:
        for name in ('1.png', '2.png'):
            mask = np.asarray(Image.open(tmp_path / out / name))
            # Class numbers from 0, as tools/predict.py writes them; mmseg's own would be 1 and 2 here.
            assert mask.shape == (64, 96) and mask.dtype == np.uint8 and set(np.unique(mask)) <= {0, 1}


def test_time_augmentation(tiny, trained, tmp_path):
    # Segmentation has a pipeline of its own in the stock config: both are to take the default.
    own = ('--cfg-options', 'tta_pipeline=None') if tiny.task == 'segmentation' else ()
    options = ('--work-dir', 'x', '--tta', '--dtype', 'bf16', *own)
    output = run_forked('test', tiny.config, last_checkpoint(trained[0]), *options, cwd=tmp_path)
    assert tiny.metric in metrics(tmp_path / 'x')
    if tiny.task == 'detection':
        assert 'masks are left out' in output and 'coco/segm_mAP' not in metrics(tmp_path / 'x')


def test_augmented_views(tiny, tool):
    cfg = Config.fromfile(tiny.config)
    cfg.pop('tta_pipeline', None)
    plain = build(cfg)[0]
    apply_tta(cfg)
    views = build(cfg)[0]
    assert [view.flip for view in views['data_samples']] == [False, True]
    assert torch.equal(views['inputs'][0], plain['inputs'])
    assert torch.equal(views['inputs'][1], plain['inputs'].flip(-1))
    if tiny.task == 'segmentation':  # what the merged prediction is measured against is not flipped
        assert torch.equal(views['data_samples'][0].gt_sem_seg.data, plain['data_samples'].gt_sem_seg.data)


def build(cfg):
    """The data set that the config tests on."""
    init_default_scope(cfg.default_scope)
    return DATASETS.build(copy.deepcopy(cfg.test_dataloader.dataset))


def test_says_what_input_is_missing(tiny, refuse, trained, tmp_path):
    checkpoint = last_checkpoint(trained[0])
    assert 'config nowhere.py does not exist' in refuse('test', 'nowhere.py', checkpoint)
    assert 'checkpoint absent.pth does not exist' in refuse('test', tiny.config, 'absent.pth')
    error = refuse('test', tiny.config, checkpoint, '--cfg-options', 'test_dataloader.dataset.data_root=/nowhere')
    assert '/nowhere (test_dataloader: data_root)' in error
    if tiny.task == 'detection':
        error = refuse('test', tiny.config, checkpoint, '--cfg-options', 'test_evaluator.ann_file=/nowhere.json')
        assert '/nowhere.json (test_evaluator: ann_file)' in error
    (tmp_path / 'file').touch()
    assert 'is a file' in refuse('test', tiny.config, checkpoint, '--show-dir', 'file/x')
    out = 'file/x.pkl' if tiny.task == 'detection' else 'file/x'
    assert 'is a file' in refuse('test', tiny.config, checkpoint, '--out', out)


def test_says_which_kind_of_output_it_saves(tiny, refuse, trained, tmp_path):
    wrong, right = ('masks', '*.pkl') if tiny.task == 'detection' else ('predictions.pkl', 'name a folder')
    assert right in refuse('test', tiny.config, last_checkpoint(trained[0]), '--out', wrong)


def test_refuses_a_checkpoint_that_is_damaged_or_runs_code(tiny, refuse, trained, tmp_path):
    whole = last_checkpoint(trained[0]).read_bytes()
    (tmp_path / 'half.pth').write_bytes(whole[: len(whole) // 2])
    assert 'half.pth' in refuse('test', tiny.config, 'half.pth')
    torch.save({'state_dict': {}, 'meta': Bomb(tmp_path / 'exploded')}, tmp_path / 'bomb.pth')
    assert 'bomb.pth wants to run code' in refuse('test', tiny.config, 'bomb.pth')
    assert not (tmp_path / 'exploded').exists()


@pytest.mark.parametrize('damage', ['missing', 'renamed', 'reshaped'])
def test_a_checkpoint_without_a_head_is_refused(tiny, trained, damage, tmp_path, capfd):
    content = torch.load(last_checkpoint(trained[0]), weights_only=False)
    head = 'roi_head.bbox_head.fc_cls.' if tiny.task == 'detection' else 'decode_head.conv_seg.'
    state = content['state_dict']
    for key in [key for key in state if key.startswith(head)]:
        value = state.pop(key)
        if damage != 'missing':
            state[f'other.{key}' if damage == 'renamed' else key] = torch.zeros(7, *value.shape[1:])
    torch.save(content, tmp_path / 'x.pth')
    tools = [('test', tiny.config, tmp_path / 'x.pth')]
    if damage == 'missing':  # the check is the same
        tools.append(('train', tiny.config, '--resume', tmp_path / 'x.pth'))
    for tool in tools:
        assert in_processes((run_main, *tool, '--work-dir', tmp_path / 'work')) == [2]
        error = capfd.readouterr().err.strip().splitlines()[-1]
        assert error.startswith('error: checkpoint ') and f'x.pth does not cover the whole model: {head}' in error


def test_a_full_disk_leaves_no_part_of_the_predictions(tiny, trained, tmp_path, capfd):
    out = tmp_path / ('predictions.pkl' if tiny.task == 'detection' else 'masks')
    arguments = (tiny.config, last_checkpoint(trained[0]), '--work-dir', tmp_path / 'work', '--out', out)
    assert in_processes((run_on_a_full_disk, out.suffix or '.png', 'test', *arguments)) == [2]
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert 'cannot be written: No space left on device' in error and 'GB are free there' in error
    assert [path for path in tmp_path.rglob('*') if path.suffix in ('.pkl', '.png')] == []


def test_augmentation_of_masks_alone_is_refused(tool):
    cfg = Config({'default_scope': 'mmdet', 'model': {'type': 'Mask2Former', 'panoptic_head': {}}})
    with pytest.raises(InputError, match='merges boxes only, and Mask2Former predicts masks'):
        apply_tta(cfg)


# Tiles

# Four images of 64 x 64 pixels, or one of 128 x 128 composed of them.
SCENES = """
_base_ = r'{config}'
data = dict(data_root=r'{root}')
if '{task}' == 'detection':
    data.update(ann_file='{part}.json', data_prefix=dict(img='{part}'))
    test_evaluator = dict(ann_file=r'{root}/{part}.json')
else:
    data.update(data_prefix=dict(img_path='{part}', seg_map_path='{part}_labels'), img_suffix='.png')
test_pipeline = _base_.test_pipeline
test_pipeline[1].scale = (64, 64)
test_dataloader = dict(batch_size=3, dataset=dict(pipeline=test_pipeline, **data))
"""
PLACES = [(0, 0), (0, 64), (64, 0), (64, 64)]


@pytest.fixture(scope='module')
def lively(tiny, trained, tmp_path_factory):
    """The trained checkpoint; a segmentor's bias is shifted, so that it predicts both classes."""
    path = last_checkpoint(trained[0])
    if tiny.task == 'detection':
        return path
    from mmseg.apis import inference_model, init_model

    model = init_model(str(tiny.config), str(path), device='cpu')
    logits = inference_model(model, next(scenes())).seg_logits.data
    content = torch.load(path, weights_only=False)
    content['state_dict']['decode_head.conv_seg.bias'][1] += (logits[0] - logits[1]).median()
    path = tmp_path_factory.mktemp('lively') / 'lively.pth'
    torch.save(content, path)
    return path


def scenes():
    """Four noisy pictures with a bright rectangle."""
    random = np.random.default_rng(1)
    for top, left in PLACES:
        picture = random.integers(0, 60, (64, 64, 3), dtype=np.uint8)
        picture[top // 4 + 5 : top // 4 + 35, left // 3 + 4 : left // 3 + 35] += 150
        yield picture


def join(pictures):
    """Four pictures as one."""
    return np.concatenate([np.concatenate(pictures[:2], 1), np.concatenate(pictures[2:], 1)])


class Scenes:
    """The config of a test on these scenes, in a folder, and its results."""

    def __init__(self, tiny, checkpoint, folder):
        self.tiny, self.checkpoint, self.folder = tiny, checkpoint, folder

    def write(self, part, pictures, labels=None, annotations=()):
        (self.folder / part).mkdir(exist_ok=True)
        (self.folder / f'{part}_labels').mkdir(exist_ok=True)
        for i, picture in enumerate(pictures):
            Image.fromarray(picture).save(self.folder / f'{part}/{i}.png')
            if labels is not None:
                Image.fromarray(labels[i]).save(self.folder / f'{part}_labels/{i}.png')
        side = len(pictures[0])
        images = [{'id': i, 'file_name': f'{i}.png', 'width': side, 'height': side} for i in range(len(pictures))]
        categories = [{'id': i, 'name': name} for i, name in enumerate(CLASSES, start=1)]
        content = {'images': images, 'annotations': list(annotations), 'categories': categories}
        (self.folder / f'{part}.json').write_text(json.dumps(content))
        text = SCENES.format(config=self.tiny.config, root=self.folder, task=self.tiny.task, part=part)
        (self.folder / f'{part}.py').write_text(text)

    def test(self, part, *options):
        """Test; the metrics and the saved predictions."""
        work = Path(tempfile.mkdtemp(dir=self.folder))
        out = work / ('out.pkl' if self.tiny.task == 'detection' else 'out')
        arguments = (self.folder / f'{part}.py', self.checkpoint, '--work-dir', work / 'w', '--out', out, *options)
        assert in_processes((run_main, 'test', *arguments)) == [0]
        if self.tiny.task == 'detection':
            found = sorted(pickle.loads(out.read_bytes()), key=lambda p: p['img_path'])
            return metrics(work / 'w'), [p['pred_instances'] for p in found]
        return metrics(work / 'w'), [np.asarray(Image.open(path)) for path in sorted(out.iterdir())]


def as_annotations(predictions, offset=False):
    """Every third predicted object as ground truth in COCO's format, in the four scenes or in the composed one."""
    rows = []
    for i, (objects, (top, left)) in enumerate(zip(predictions, PLACES, strict=True)):
        for box, label, mask in list(zip(*(objects[key] for key in ('bboxes', 'labels', 'masks')), strict=True))[::3]:
            x1, y1, x2, y2 = box.tolist()
            pixels = run_lengths.decode(mask)
            if offset:
                x1, y1, x2, y2 = x1 + left, y1 + top, x2 + left, y2 + top
                pixels = np.pad(pixels, ((top, 64 - top), (left, 64 - left)))
            encoded = run_lengths.encode(np.asfortranarray(pixels))
            rows.append(
                {
                    'id': len(rows) + 1,
                    'image_id': 0 if offset else i,
                    'category_id': int(label) + 1,
                    'bbox': [x1, y1, x2 - x1, y2 - y1],
                    'area': int(pixels.sum()),
                    'iscrowd': 0,
                    'segmentation': {'size': encoded['size'], 'counts': encoded['counts'].decode()},
                }
            )
    return rows


@pytest.fixture(scope='module')
def tested(tiny, lively, tmp_path_factory):
    """Four scenes whose ground truth the model partly meets, their composition, and the test of the four."""
    run = Scenes(tiny, lively, tmp_path_factory.mktemp('scenes'))
    pictures = list(scenes())
    if tiny.task == 'detection':
        run.write('single', pictures, annotations=as_annotations([fake_objects()] * 4))
        predictions = run.test('single')[1]
        run.write('single', pictures, annotations=as_annotations(predictions))
        run.write('composed', [join(pictures)], annotations=as_annotations(predictions, offset=True))
    else:
        labels = [(picture[..., 0] > 100).astype(np.uint8) + 1 for picture in pictures]  # 0 is unlabelled
        run.write('single', pictures, labels)
        run.write('composed', [join(pictures)], [join(labels)])
    return run, *run.test('single')


def fake_objects():
    mask = run_lengths.encode(np.asfortranarray(np.eye(64, dtype=np.uint8)))
    return {'bboxes': torch.tensor([[0.0, 0, 64, 64]]), 'labels': torch.tensor([0]), 'masks': [mask]}


def test_tiles_that_are_images_of_their_own_give_their_metrics(tiny, tested):
    """Without overlap, and cut where it was composed, the composed image is the four images."""
    run, expected, predictions = tested
    found, (composed,) = run.test('composed', '--tile', '64', '--overlap', '0', '--show-dir', run.folder / 'drawn')
    height, width, channels = np.asarray(Image.open(run.folder / 'drawn/0.png')).shape
    assert height >= 128 and width > 256 and channels == 3
    assert 1 < expected[tiny.metric] * (100 if tiny.task == 'detection' else 1) < 99, 'else this says little'
    assert found.keys() == expected.keys()
    for key in found:
        if key.startswith(('coco/', 'aAcc', 'mIoU', 'mAcc')):
            assert found[key] == pytest.approx(expected[key], abs=1e-3), key
    if tiny.task == 'segmentation':
        assert (composed == join(predictions)).all()
    else:
        assert len(composed['scores']) == sum(len(objects['scores']) for objects in predictions)


def test_images_no_larger_than_a_tile_are_tested_as_without_tiles(tested):
    run, expected, _ = tested
    found, _ = run.test('single', '--tile', '64')
    assert {key: value for key, value in found.items() if 'time' not in key} == {
        key: value for key, value in expected.items() if 'time' not in key
    }


def test_tiles_that_overlap(tiny, tested):
    run, *_ = tested
    own = ('--cfg-options', 'tta_pipeline=None') if tiny.task == 'segmentation' else ()
    found, (composed,) = run.test('composed', '--tile', '48', '--overlap', '0.3', '--tta', *own)
    assert tiny.metric in found
    if tiny.task == 'segmentation':
        assert composed.shape == (128, 128)
    else:
        assert (composed['bboxes'].max(0).values > 100).all()
