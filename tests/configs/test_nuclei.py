"""The nuclei's configs in the hands of a user: inherited from by name, on data of one's own."""

import json
import subprocess
import sys

import pytest
from support.tool_fixtures import ROOT

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
