"""The main jobs with their bars, run as the README says. Minutes each."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_demo_reaches_its_bars(tmp_path):
    result = subprocess.run([sys.executable, ROOT / 'tools/demo.py', '--out', 'run'], cwd=tmp_path)
    assert result.returncode == 0
    pictures = list((tmp_path / 'run/pictures').rglob('*.[jp][pn]g'))
    assert len(pictures) == 80 + 80 + 2


@pytest.mark.slow
@pytest.mark.skipif('SWIN_MM_DATA' not in os.environ, reason='SWIN_MM_DATA is not set')
def test_nuclei_reach_their_bars_from_random_weights(tmp_path):
    config = ROOT / 'configs/nuclei/mask-rcnn_swin-nano_fpn_nuclei.py'
    command = [sys.executable, ROOT / 'tools/train.py', config, '--work-dir', tmp_path]
    assert subprocess.run(command).returncode == 0
    log = next(tmp_path.glob('*/vis_data/scalars.json')).read_text().splitlines()
    metrics = json.loads(log[-1])
    assert metrics['coco/bbox_mAP'] >= 0.30
    assert metrics['coco/segm_mAP'] >= 0.30
