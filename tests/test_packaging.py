"""What a wheel carries, and where mim looks for it."""

import platform
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
import yaml

import swin_mm

ROOT = Path(__file__).parents[1]
MIM = Path(swin_mm.__file__).parent / '.mim'


@pytest.fixture(scope='module')
def wheel(tmp_path_factory):
    pytest.importorskip('setuptools')
    folder = tmp_path_factory.mktemp('wheel')
    source = folder / 'source'  # a build leaves build/ and *.egg-info behind
    ignored = shutil.ignore_patterns('.git', '.venv*', '__pycache__', 'work_dirs', 'build', '*.egg-info', '*.so')
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
    pip = [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', folder, source]
    subprocess.run(pip, check=True)
    (path,) = folder.glob('*.whl')
    with zipfile.ZipFile(path) as archive:
        yield archive


def test_wheel_carries_everything_mim_needs(wheel):
    names = set(wheel.namelist())
    wanted = {
        str(path.relative_to(ROOT))
        for folder, suffixes in (('configs', {'.py', '.yml', '.md'}), ('tools', {'.py'}))
        for path in (ROOT / folder).rglob('*')
        if path.suffix in suffixes and '__pycache__' not in path.parts
    }
    assert {'configs/mask_rcnn/metafile.yml', 'tools/train.py'} <= wanted
    assert {f'swin_mm/.mim/{name}' for name in wanted | {'model-index.yml'}} <= names
    # Modules are all there and nothing else slipped in.
    modules = {str(path.relative_to(ROOT)) for path in (ROOT / 'swin_mm').rglob('*.py') if '.mim' not in path.parts}
    compiled = {name for name in names if name.startswith('swin_mm/ops/attention/_cpu_')}
    assert modules == {name for name in names - compiled if name.startswith('swin_mm/') and '.mim' not in name}
    assert len(compiled) == (3 if platform.machine() == 'x86_64' else 1), 'there is a compiler, mmcv was built with it'


def test_wheel_requires_the_maintained_distributions_only(wheel):
    (metadata,) = (name for name in wheel.namelist() if name.endswith('METADATA'))
    lines = wheel.read(metadata).decode().splitlines()
    required = [line.split(': ')[1] for line in lines if line.startswith('Requires-Dist') and 'extra ==' not in line]
    assert sorted(name.split('<')[0].split('>')[0] for name in required) == ['onedl-mmengine', 'safetensors', 'torch']
    extras = {line.split(': ')[1] for line in lines if line.startswith('Provides-Extra')}
    assert extras == {'det', 'seg', 'all', 'hub', 'onnx', 'dev'}


def test_the_index_lists_every_metafile_and_each_of_those_its_folder():
    index = yaml.safe_load((MIM / 'model-index.yml').read_text())['Import']
    assert sorted(index) == sorted(str(path.relative_to(ROOT)) for path in (ROOT / 'configs').glob('*/metafile.yml'))
    for file in index:
        models = yaml.safe_load((MIM / file).read_text())['Models']
        assert {model['Config'] for model in models} == {
            str(path.relative_to(ROOT)) for path in (ROOT / file).parent.glob('*.py')
        }
        for model in models:
            assert Path(model['Config']).stem == model['Name']
            assert not {'Weights', 'Results'} & model.keys(), 'nothing here was trained by this project'
