"""The demo: what stops it says so in one line and leaves nothing behind; it reaches its required metrics."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import namedtuple
from pathlib import Path

import pytest
import torch
from support.tool_fixtures import ROOT, command

from swin_mm.openmmlab.config import build_model, load_config


@pytest.fixture
def folder(tmp_path):
    """A folder from where the configs find the images."""
    (tmp_path / 'data').symlink_to(ROOT / 'data')
    return tmp_path


def test_a_folder_that_exists_is_left_alone(refuse, tmp_path):
    (tmp_path / 'data').symlink_to(ROOT / 'data')
    (tmp_path / 'run').mkdir()
    assert 'run exists and nothing is overwritten' in refuse('demo', '--out', 'run')


def test_it_says_where_it_has_to_run(refuse):
    assert 'run the demo in the root folder' in refuse('demo', '--out', 'run')


def test_a_folder_that_cannot_be_created(refuse, tmp_path):
    (tmp_path / 'data').symlink_to(ROOT / 'data')
    (tmp_path / 'file').touch()
    assert 'file/run cannot be created: Not a directory' in refuse('demo', '--out', 'file/run')


def test_a_disk_without_space(refuse, tmp_path, monkeypatch):
    (tmp_path / 'data').symlink_to(ROOT / 'data')
    usage = namedtuple('usage', 'total used free')
    monkeypatch.setattr(shutil, 'disk_usage', lambda _: usage(2e9, 1.9e9, 1e8))
    assert 'would have 100 MB and the demo needs 500 MB' in refuse('demo', '--out', 'run')


def test_a_tool_that_fails_is_quoted(folder, tool, monkeypatch, capsys):
    demo = tool('demo')
    monkeypatch.chdir(folder)
    config = ROOT / 'configs/nuclei' / demo.TASKS[0].config
    with demo.Progress() as progress, pytest.raises(SystemExit) as stopped:
        demo.run_tool(progress, demo.TASKS[0], 'test', folder / 'run', config, 'missing.pth')
    assert str(stopped.value).startswith('tools/test.py failed with exit code 2: error: checkpoint missing.pth')
    assert str(folder / 'run.log') in str(stopped.value)


def test_a_killed_demo_ends_its_training(folder):
    demo = subprocess.Popen(
        command('demo', '--out', 'run'), cwd=folder, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    log = folder / 'run/mask-rcnn_swin-nano_fpn_nuclei.log'
    try:
        while not log.exists():
            assert demo.poll() is None
            time.sleep(0.2)
        (training,) = children(demo.pid)
    finally:
        demo.send_signal(signal.SIGTERM)
    assert demo.wait(timeout=120) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(training, 0)


def children(pid: int) -> list[int]:
    listed = subprocess.run(['ps', '--ppid', str(pid), '-o', 'pid='], capture_output=True, text=True, check=False)
    return [int(word) for word in listed.stdout.split()]


def test_progress_comes_from_training_records(tool, tmp_path):
    demo = tool('demo')
    assert demo.last_training_record(tmp_path) == {}
    file = tmp_path / '20260101_000000/vis_data/scalars.json'
    file.parent.mkdir(parents=True)
    records = [{'loss': 2.0, 'step': 10}, {'loss': 1.0, 'step': 20}, {'coco/bbox_mAP': 0.5, 'step': 2}]
    file.write_text(''.join(f'{json.dumps(record)}\n' for record in records))
    assert demo.last_training_record(tmp_path) == records[1]


@pytest.mark.parametrize(
    'config, iterations', [('mask-rcnn_swin-nano_fpn_nuclei', 4 * 68), ('upernet_swin-nano_nuclei', 240)]
)
def test_the_length_of_a_training(tool, monkeypatch, config, iterations):
    monkeypatch.chdir(ROOT)
    assert tool('demo').count_iterations(ROOT / f'configs/nuclei/{config}.py') == iterations


def test_pictures_of_models_that_have_learnt_nothing(tool, monkeypatch, folder):
    """The last step works whatever the models predict, also nothing; a failure after the trainings would be late."""
    demo = tool('demo')
    monkeypatch.chdir(folder)
    for task in demo.TASKS:
        cfg = load_config(ROOT / 'configs/nuclei' / task.config)
        work_dir = folder / 'run' / Path(task.config).stem
        work_dir.mkdir(parents=True)
        torch.save({'state_dict': build_model(cfg, cfg.model).state_dict()}, work_dir / 'last.pth')
        (work_dir / 'last_checkpoint').write_text(str(work_dir / 'last.pth'))
    assert demo.draw(folder / 'run') == folder / 'run/pictures.jpg'
    assert len(list((folder / 'run/pictures').glob('*.jpg'))) == 8


@pytest.mark.slow
def test_the_demo_reaches_its_metrics_and_keeps_the_terminal_clean(folder):
    done = subprocess.run(
        [sys.executable, ROOT / 'tools/demo.py', '--out', 'run'], cwd=folder, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert 'mmengine' not in done.stdout + done.stderr and 'arning' not in done.stdout + done.stderr
    assert 'Mask R-CNN, train: 272 of 272' in done.stdout
    assert all(metric in done.stdout for metric in ('box mAP', 'mask mAP', 'mIoU'))
    assert (folder / 'run/pictures.jpg').stat().st_size < 300_000
    assert len(list((folder / 'run/pictures').glob('*.jpg'))) == 8
