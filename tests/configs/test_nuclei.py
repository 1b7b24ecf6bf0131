"""The nuclei's configs in the hands of a user: inherited from by name, on data of one's own."""

import json
import re
import shlex
import sqlite3
import subprocess
import sys
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from mmengine.registry import TRANSFORMS, init_default_scope
from PIL import Image
from support.tool_fixtures import ROOT, run_tool

from swin_mm.openmmlab.config import load_config

# Eight training and four validation images, in place of the user's data; a backbone that is quicker still.
DETECTION = """
_base_ = 'swin_mm::nuclei/mask-rcnn_swin-nano_fpn_nuclei.py'
model = dict(backbone=dict(depths=(1, 1, 1, 1)))
train_cfg = dict(max_epochs=1, val_interval=1)
train_dataloader = dict(dataset=dict(data_root='{data}', indices=8))
val_dataloader = dict(dataset=dict(data_root='{data}', indices=4))
test_dataloader = val_dataloader
val_evaluator = test_evaluator = dict(ann_file='{data}/annotations/val.json')
"""
SEGMENTATION = """
_base_ = 'swin_mm::nuclei/upernet_swin-nano_nuclei.py'
model = dict(backbone=dict(depths=(1, 1, 1, 1)))
train_cfg = dict(max_iters=2, val_interval=2)
default_hooks = dict(checkpoint=dict(interval=2), logger=dict(interval=1))
train_dataloader = dict(dataset=dict(data_root='{data}', indices=8))
val_dataloader = dict(dataset=dict(data_root='{data}', indices=4))
test_dataloader = val_dataloader
"""


TRAIN_AND_TEST = """
import sys
import swin_mm
from swin_mm.engine.runner import build_runner
from swin_mm.openmmlab.config import load_config

cfg = load_config(sys.argv[1])
cfg.work_dir = 'run'
runner = build_runner(cfg)
runner.train()
runner.test()
"""


@pytest.mark.parametrize('text, metric', [(DETECTION, 'coco/segm_mAP'), (SEGMENTATION, 'mIoU')], ids=['det', 'seg'])
def test_configs_that_inherit_train_and_test(tmp_path, text, metric):
    config = tmp_path / 'mine.py'
    config.write_text(text.format(data=ROOT / 'data/nuclei'))
    command = [sys.executable, '-c', TRAIN_AND_TEST, config]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-4000:]
    assert metric in json.loads(next(tmp_path.glob('run/*/*.json')).read_text())  # of the test


@pytest.mark.parametrize('name', ['mask-rcnn_swin-nano_fpn_nuclei', 'upernet_swin-nano_nuclei'])
def test_schedules_fit_the_length_of_the_training(name):
    cfg = load_config(ROOT / f'configs/nuclei/{name}.py')
    batches = len(list((ROOT / 'data/nuclei/train').iterdir())) / cfg.train_dataloader.batch_size
    length = cfg.train_cfg.get('max_iters') or cfg.train_cfg.max_epochs * batches
    warmup, decay = cfg.param_scheduler
    assert warmup.end <= length / 10
    assert decay.end == cfg.train_cfg.get('max_iters', cfg.train_cfg.get('max_epochs'))


@pytest.mark.parametrize('name', ['mask-rcnn_swin-nano_fpn_nuclei', 'upernet_swin-nano_nuclei'])
def test_pipelines_of_heirs_come_from_the_library_of_the_config(tmp_path, name):
    """RandomFlip is mmdet's, not mmcv's, which mmengine finds where it marks what is inherited with our scope."""
    (tmp_path / 'mine.py').write_text(f"""
_base_ = 'swin_mm::nuclei/{name}.py'
flip = dict(_base_.flip, prob=0.5)
train_pipeline = [*_base_.train_pipeline[:-2], flip, _base_.train_pipeline[-1]]
train_dataloader = dict(dataset=dict(pipeline=train_pipeline))
val_dataloader = dict(dataset=dict(pipeline=_base_.test_pipeline))
""")
    own, heir = load_config(ROOT / f'configs/nuclei/{name}.py'), load_config(tmp_path / 'mine.py')
    init_default_scope(own.default_scope)
    for part in ('train', 'val'):
        steps, expected = (
            [type(TRANSFORMS.build(dict(step))) for step in cfg[f'{part}_dataloader'].dataset.pipeline]
            for cfg in (heir, own)
        )
        assert steps == expected and any(step.__module__.startswith(own.default_scope) for step in steps)


# The lines in docs/own_data.md

PAGE = ROOT / 'docs/own_data.md'


def table() -> dict[str, str]:
    """The lines of "More that training can do", by what they are for."""
    section = PAGE.read_text().split('## More that training can do')[1].split('\n## ')[0]
    return {row[0]: row[1] for row in re.findall(r'^\| ([^|]+?) \| `([^`]+)` \|', section, re.MULTILINE)}


def effect(wish: str, work_dir: Path, log: str) -> None:
    """Check that the line has done what it is for."""
    last = torch.load(next(work_dir.glob('epoch_*.pth')), weights_only=False)
    if 'EMA' in wish:
        weights, average = last['ema_state_dict'], last['state_dict']  # mmengine saves what is to be used as state_dict
        key = 'backbone.patch_embed.proj.weight'
        assert not torch.equal(weights[f'module.{key}'], average[key])
    elif wish == 'early stopping':
        assert last['meta']['epoch'] == 3 and 'did not improve' in log  # one that is best, two that are not better
    elif wish == 'best checkpoint':
        assert list(work_dir.glob('best_coco_bbox_mAP_epoch_*.pth'))
    elif wish == 'gradient accumulation':
        steps = {int(state['step']) for state in last['optimizer']['state'].values()}
        assert steps == {2}, 'eight iterations'
    else:
        with sqlite3.connect(work_dir / 'mlflow.db') as database:
            logged = {key for (key,) in database.execute('select key from metrics')}
            assert {'loss_mask', 'coco/segm_mAP'} <= logged
        assert list(work_dir.glob('mlruns/*/artifacts/config.py'))


run = partial(run_tool, timeout=1800)  # a machine may be busy


@pytest.mark.slow
@pytest.mark.parametrize('wish', table())
def test_lines_for_more_in_training(wish, tmp_path):
    line = table()[wish]
    if '--vis' in line and not find_spec(line.split()[-1]):
        pytest.skip(f'{line.split()[-1]} is not installed')
    text = DETECTION.format(data=ROOT / 'data/nuclei') + 'train_dataloader.update(batch_size=2)\n'
    options = shlex.split(line) if line.startswith('--') else []
    if not options:
        text += line.replace('patience=5', 'patience=2, min_delta=2.0') + '\n'  # no metric improves by 2
    epochs = 6 if wish == 'early stopping' else 2
    text += f'train_cfg.update(max_epochs={epochs})\nparam_scheduler = []\n'
    (tmp_path / 'mine.py').write_text(text)
    log = run('train', 'mine.py', *options, cwd=tmp_path)
    assert 'is not in the config' not in log
    effect(wish, tmp_path / 'work_dirs/mine', log)
    if 'EMA' in wish:  # its checkpoint holds two sets of weights
        run('test', 'mine.py', next(tmp_path.glob('work_dirs/mine/epoch_*.pth')), cwd=tmp_path)


@pytest.fixture(scope='module')
def four_channels(tmp_path_factory):
    """The nuclei as TIFFs of 16 bits, in the fourth channel alone; the first three are noise."""
    folder = tmp_path_factory.mktemp('four')
    random, source = np.random.default_rng(0), ROOT / 'data/nuclei'
    for split, count in (('train', 16), ('val', 4)):
        content = json.loads((source / f'annotations/{split}.json').read_text())
        images = content['images'][:: len(content['images']) // count][:count]
        ids = {image['id'] for image in images}
        for part in ('annotations', f'masks/{split}', split):
            (folder / 'data/mine16' / part).mkdir(parents=True, exist_ok=True)
        for image in images:
            name = Path(image['file_name'])
            grey = cv2.imread(str(source / split / name), cv2.IMREAD_GRAYSCALE).astype(np.uint16) * 257
            noise = random.integers(0, 6500, (*grey.shape, 3)).astype(np.uint16)
            image['file_name'] = f'{name.stem}.tif'
            cv2.imwrite(str(folder / 'data/mine16' / split / image['file_name']), np.dstack([noise, grey]))
            mask = Image.open(source / 'masks' / split / f'{name.stem}.png')
            mask.save(folder / f'data/mine16/masks/{split}/{name.stem}.png')
        content |= {'images': images, 'annotations': [a for a in content['annotations'] if a['image_id'] in ids]}
        (folder / f'data/mine16/annotations/{split}.json').write_text(json.dumps(content))
    return folder


def four_channel_config(task: str) -> str:
    """The config in docs/own_data.md, for objects with the changes that the page names."""
    (text,) = re.findall(r'```python\n(# mine_four\.py\n.*?)```', PAGE.read_text(), re.DOTALL)
    if task == 'segmentation':
        return text + (
            'train_cfg = dict(max_iters=40, val_interval=40)\n'
            'param_scheduler = [dict(type="LinearLR", start_factor=0.1, by_epoch=False, end=4)]\n'
            'default_hooks = dict(checkpoint=dict(interval=40))\n'
        )
    return text.replace('upernet_swin-nano_nuclei', 'mask-rcnn_swin-nano_fpn_nuclei').replace(
        ", img_suffix='.tif'", ''
    ) + (
        "val_evaluator = test_evaluator = dict(ann_file='data/mine16/annotations/val.json')\n"
        'train_cfg = dict(max_epochs=1, val_interval=1)\n'
    )


@pytest.mark.slow
@pytest.mark.parametrize('task', ['segmentation', 'detection'])
def test_four_channels_of_sixteen_bits_from_training_to_looking(task, four_channels, tmp_path):
    (tmp_path / 'data').symlink_to(four_channels / 'data')
    (tmp_path / 'mine_four.py').write_text(four_channel_config(task))
    run('train', 'mine_four.py', cwd=tmp_path)
    checkpoint = next(tmp_path.glob('work_dirs/mine_four/*_[0-9]*.pth'))
    if task == 'segmentation':
        tested = run('test', 'mine_four.py', checkpoint, '--work-dir', 'tested', cwd=tmp_path)
        assert json.loads(next(tmp_path.glob('tested/*/*.json')).read_text())['mIoU'] > 60, tested
        assert 'no problems found' in run('check_data', 'mine_four.py', '--workers', '1', cwd=tmp_path)
    run('predict', 'mine_four.py', checkpoint, 'data/mine16/val', '--out', 'seen', cwd=tmp_path)
    assert len(list(tmp_path.glob('seen/pred/*'))) == len(list(tmp_path.glob('seen/vis/*.jpg'))) == 4
    image = next(four_channels.glob('data/mine16/val/*.tif'))
    run('look', 'mine_four.py', image, checkpoint, '--out', 'looks', cwd=tmp_path)
    assert (tmp_path / 'looks/features.png').exists()
