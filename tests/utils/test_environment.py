import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest
import torch
from support.tool_fixtures import ROOT

SITE = Path(torch.__file__).parents[1]


@pytest.fixture
def python_without(tmp_path):
    """Run Python as if some of the installed files had never been installed."""

    def run(*missing, command):
        site = Path(tempfile.mkdtemp(dir=tmp_path))
        hidden = {path for pattern in missing for path in SITE.glob(pattern)}
        # Link whole folders, except those in which something is hidden.
        for path in SITE.iterdir():
            if path in hidden or path.suffix == '.pth':
                continue
            inside = [child for child in hidden if child.parent == path]
            for source in (child for child in path.iterdir() if child not in hidden) if inside else [path]:
                link = site / source.relative_to(SITE)
                link.parent.mkdir(parents=True, exist_ok=True)
                link.symlink_to(source)
        environment = os.environ | {'PYTHONPATH': f'{site}:{ROOT}', 'COLUMNS': '100'}
        return subprocess.run(
            [sys.executable, '-S', *command], cwd=tmp_path, env=environment, text=True, capture_output=True, timeout=300
        )

    return run


DOCTOR = ('-m', 'swin_mm.doctor')
TRAIN = ROOT / 'tools/train.py'
DETECTION = ROOT / 'configs/mask_rcnn/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'
SEGMENTATION = ROOT / 'configs/upernet/upernet_swin-t-p4-w7_8xb2-160k_ade20k-512x512.py'


def state(output, row):
    """The last cell of a row in the doctor's tables."""
    return next(line for line in output.splitlines() if f'│ {row} ' in line).split('│')[-2].strip()


def test_doctor_with_required_dependencies_only(python_without):
    absent = ('mmcv', 'onedl_mmcv*', 'mmdet', 'onedl_mmdetection*', 'mmseg', 'onedl_mmsegmentation*')
    done = python_without(*absent, command=DOCTOR)
    assert done.returncode == 0, done.stderr  # nothing installed is broken
    assert state(done.stdout, 'mmengine') == 'works' and state(done.stdout, 'mmdet') == 'absent'
    assert state(done.stdout, 'the backbones') == state(done.stdout, 'attention kernel for CPUs') == 'works'
    assert 'mmdet' in state(done.stdout, 'detection configs')
    assert 'mmdet is not installed; install it with: pip install onedl-mmdetection' in done.stdout


@pytest.mark.parametrize(
    'missing, dist, config', [('mmdet', 'mmdetection', DETECTION), ('mmseg', 'mmsegmentation', SEGMENTATION)]
)
def test_config_of_a_library_that_is_not_installed(python_without, missing, dist, config):
    done = python_without(missing, f'onedl_{dist}*', command=(TRAIN, config))
    assert done.returncode == 2
    assert (
        done.stderr.splitlines()[-1] == f'error: {missing} is not installed; install it with: pip install onedl-{dist}'
    )
    assert 'Traceback' not in done.stderr


def test_mmcv_without_compiled_ops(python_without):
    done = python_without('mmcv/_ext*', command=DOCTOR)
    assert done.returncode == 1
    assert state(done.stdout, 'compiled ops of mmcv') == 'broken' and state(done.stdout, 'mmcv') == 'works'
    assert 'compiled ops of mmcv' in state(done.stdout, 'detection configs')
    done = python_without('mmcv/_ext*', command=(TRAIN, DETECTION))
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert 'compiled ops of mmcv are not there' in done.stderr and 'MMCV_WITH_OPS=1 pip install' in done.stderr
