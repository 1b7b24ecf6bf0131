import os
import pickle
import re
import subprocess
import sys
import tempfile
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

import numpy as np
import pytest
import torch
from support.tool_fixtures import ROOT

from swin_mm.checkpoints import write_checkpoint
from swin_mm.utils import environment

SITE = Path(torch.__file__).parents[1]
LINE = environment.LINES['original' if environment.openmmlab_line() == 'original' else 'onedl']


def files_of(module):
    """Patterns for a library of OpenMMLab and its metadata in site-packages."""
    return module, LINE[module].partition('==')[0].replace('-', '_') + '-*'


@pytest.fixture
def python_without(tmp_path):
    """Run Python as if some of the installed files had never been installed."""

    def run(*missing, command, kept=('*',)):
        site = Path(tempfile.mkdtemp(dir=tmp_path))
        hidden = {path for pattern in missing for path in SITE.glob(pattern)}
        hidden |= set(SITE.iterdir()) - {path for pattern in kept for path in SITE.glob(pattern)}
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
        environment.pop('TRITON_INTERPRET', None)  # the interpreter needs numpy
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
    return re.split('  +', next(line for line in output.splitlines() if line.startswith(f'{row}  ')))[-1]


def test_doctor_with_required_dependencies_only(python_without):
    absent = files_of('mmcv') + files_of('mmdet') + files_of('mmseg')
    done = python_without(*absent, command=DOCTOR)
    assert done.returncode == 0, done.stderr  # nothing installed is broken
    assert state(done.stdout, 'mmengine') == 'works' and state(done.stdout, 'mmdet') == 'absent'
    assert state(done.stdout, 'the backbones') == state(done.stdout, 'attention kernel for CPUs') == 'works'
    assert 'mmdet' in state(done.stdout, 'detection configs')
    assert f'mmdet is not installed; install it with: pip install {LINE["mmdet"]}' in done.stdout


@pytest.mark.parametrize('missing, config', [('mmdet', DETECTION), ('mmseg', SEGMENTATION)])
def test_config_of_a_library_that_is_not_installed(python_without, missing, config):
    done = python_without(*files_of(missing), command=(TRAIN, config))
    assert done.returncode == 2
    command = f'pip install {LINE[missing]}'
    assert done.stderr.splitlines()[-1] == f'error: {missing} is not installed; install it with: {command}'
    assert 'Traceback' not in done.stderr


def test_mmcv_without_compiled_ops(python_without):
    done = python_without('mmcv/_ext*', command=DOCTOR)
    assert done.returncode == 1
    assert state(done.stdout, 'compiled ops of mmcv') == 'broken' and state(done.stdout, 'mmcv') == 'works'
    assert 'compiled ops of mmcv' in state(done.stdout, 'detection configs')
    done = python_without('mmcv/_ext*', command=(TRAIN, DETECTION))
    assert done.returncode == 2 and 'Traceback' not in done.stderr
    assert 'compiled ops of mmcv are not there' in done.stderr and 'MMCV_WITH_OPS=1 pip install' in done.stderr


# What `pip install swin_mm` brings: torch, safetensors, and what torch requires, which numpy is not. Triton 3.0 imports
# setuptools, too, which the environments of Python 3.10 and 3.11 have.
CORE = (
    *('torch', 'torch-*', 'torch.libs', 'torchgen', 'functorch', 'triton', 'nvidia*', 'cuda*', 'safetensors*'),
    *('typing_extensions*', 'filelock*', 'sympy*', 'mpmath*', 'networkx*', 'jinja2*', 'markupsafe*', 'fsspec*'),
    *('setuptools*', '_distutils_hack'),
)
PLAIN = """
import pickle
import torch
import swin_mm
from swin_mm.checkpoints import CheckpointError, adapt, read_checkpoint, unwrap, write_checkpoint

options = dict(embed_dims=16, depths=(1,), num_heads=(1,), strides=(4,), out_indices=(0,))
trained, model = swin_mm.SwinPyramid(**options).eval(), swin_mm.SwinPyramid(**options).eval()
image = torch.rand(1, 3, 40, 48)
torch.save({'state_dict': trained.state_dict()}, 'trained.pth')
weights, _ = adapt(unwrap(read_checkpoint('trained.pth')), model)
model.load_state_dict(weights)
assert torch.equal(model(image)[0], trained(image)[0])
assert read_checkpoint(FOLDER + '/one.safetensors')['w'].eq(1).all()
torch.testing.assert_close(swin_mm.optimize_for_inference(model)(image)[0], trained(image)[0])
swin_mm.SwinPyramidV2(**options)(image)[0].sum().backward()
for use in (lambda: read_checkpoint(FOLDER + '/arrays.pkl'), lambda: write_checkpoint(weights, 'new.safetensors')):
    try:
        use()
    except CheckpointError as error:
        print(error)
try:
    import numpy, mmengine
except ModuleNotFoundError as error:
    print(error)
assert not hasattr(swin_mm, 'nonsense')
from swin_mm import SwinTransformer
"""


def test_torch_and_safetensors_are_enough_for_the_plain_models(python_without, tmp_path):
    (tmp_path / 'arrays.pkl').write_bytes(pickle.dumps({'w': np.zeros(2, np.float32)}))
    write_checkpoint({'w': torch.ones(2)}, tmp_path / 'one.safetensors')
    done = python_without(command=('-c', f'FOLDER = {str(tmp_path)!r}' + PLAIN), kept=CORE)
    reading, writing, importing = done.stdout.splitlines() or pytest.fail(done.stderr)
    assert reading.endswith('which is not installed; install it with: pip install numpy')
    assert 'safetensors needs numpy to write files' in writing
    assert importing == "No module named 'numpy'"
    assert done.stderr.splitlines()[-1].startswith(
        'swin_mm.utils.errors.DependencyError: swin_mm.SwinTransformer needs mmengine, which is not installed; '
        "install the extra det, seg or all: pip install 'swin_mm[det]'"
    )
    done = python_without(command=DOCTOR, kept=CORE)
    assert done.returncode == 0, done.stderr
    assert state(done.stdout, 'the plain models') == 'works' and 'mmengine' in state(done.stdout, 'the backbones')
    assert state(done.stdout, 'OpenMMLab').startswith('not installed')


@pytest.mark.parametrize('installed', ['onedl', 'original', 'mixed'])
def test_doctor_names_the_line_of_openmmlab(installed, tmp_path, monkeypatch):
    """The lines have the same import names: only the metadata of distributions tells them apart."""
    names = {
        'onedl': ('onedl_mmengine', 'onedl-mmcv'),
        'original': ('mmengine', 'mmcv'),
        'mixed': ('mmengine', 'onedl-mmcv'),
    }
    for name, module in zip(names[installed], ('mmengine', 'mmcv'), strict=True):
        info = tmp_path / f'{name}-1.0.dist-info'
        info.mkdir()
        (info / 'METADATA').write_text(f'Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n')
        if module != 'mmengine':  # onedl-mmengine has none, and Python 3.10 looks nowhere else
            (info / 'top_level.txt').write_text(module)
    monkeypatch.setattr(sys, 'path', [str(tmp_path)])
    environment.distributions_by_module.cache_clear()
    try:
        assert environment.openmmlab_line() == installed
        command, mmcv = environment.install_command('mmdet'), environment.install_command('mmcv')
    finally:
        environment.distributions_by_module.cache_clear()
    assert command == ('pip install mmdet==3.3.0' if installed == 'original' else 'pip install onedl-mmdetection')
    assert ("'numpy<2' 'opencv-python<4.12'" in mmcv) == (installed == 'original')  # newer ones bring numpy 2


def test_mmengine_is_installed_with_opencv_as_long_as_it_does_not_require_it():
    """The maintained one imports cv2; without it, `import swin_mm` would fail after the doctor's own command."""
    try:
        required = requires('onedl-mmengine')
    except PackageNotFoundError:
        pytest.skip('the original mmengine is installed, which requires opencv-python')
    needed = not any(line.startswith('opencv') and 'extra ==' not in line for line in required)
    assert ('opencv-python-headless' in environment.install_command('mmengine')) == needed


@pytest.mark.parametrize('line, missing', [('onedl', False), ('original', True)])
def test_original_mmengine_needs_pkg_resources(line, missing, monkeypatch):
    monkeypatch.setattr(environment, 'openmmlab_line', lambda: line)
    monkeypatch.setattr(environment, 'is_installed', lambda module: module != 'pkg_resources')
    assert ("pip install 'setuptools<82'" in environment.find_problem('mmengine')) == missing
