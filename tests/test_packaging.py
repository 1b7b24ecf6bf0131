"""What the sdist and the wheel contain, and where mim looks for it."""

import email
import platform
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import yaml

import swin_mm

ROOT = Path(__file__).parents[1]
MIM = Path(swin_mm.__file__).parent / '.mim'


@pytest.fixture(scope='module')
def sdist(tmp_path_factory):
    pytest.importorskip('setuptools')
    folder = tmp_path_factory.mktemp('sdist')
    source = folder / 'source'  # a build leaves build/ and *.egg-info behind
    ignored = shutil.ignore_patterns(
        '.git', '.venv*', '.*_cache', '__pycache__', 'work_dirs', 'build', 'dist', 'site', '*.egg-info', '*.so', 'data'
    )
    shutil.copytree(ROOT, source, symlinks=True, ignore=ignored)
    build = f'from setuptools.build_meta import build_sdist; build_sdist({str(folder)!r})'
    subprocess.run([sys.executable, '-c', build], cwd=source, check=True, capture_output=True)
    (path,) = folder.glob('*.tar.gz')
    return path


@pytest.fixture(scope='module')
def wheel(sdist, tmp_path_factory):
    """Built from the sdist, as pip does where there is no wheel."""
    folder = tmp_path_factory.mktemp('wheel')
    pip = [sys.executable, '-m', 'pip', 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', folder, sdist]
    subprocess.run(pip, check=True)
    (path,) = folder.glob('*.whl')
    with zipfile.ZipFile(path) as archive:
        yield archive


@pytest.fixture(scope='module')
def metadata(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith('METADATA'))
    return email.message_from_bytes(wheel.read(name))


def modules():
    return {str(path.relative_to(ROOT)) for path in (ROOT / 'swin_mm').rglob('*.py') if '.mim' not in path.parts}


def test_sdist_contains_all_sources(sdist):
    with tarfile.open(sdist) as archive:
        names = {name.partition('/')[2] for name in archive.getnames()}
    wanted = {'LICENSE', 'README.md', 'CHANGELOG.md', 'CITATION.cff', 'pyproject.toml', 'setup.py'}
    assert modules() | wanted | {'swin_mm/ops/attention/window_attention.cpp'} <= names
    assert not {name for name in names if name.startswith(('tests', 'benchmarks', 'docs', 'demo', 'data'))}


def test_wheel_contains_everything_mim_needs(wheel):
    names = set(wheel.namelist())
    wanted = {
        str(path.relative_to(ROOT))
        for folder, suffixes in (('configs', {'.py', '.yml', '.md'}), ('tools', {'.py', '.sh'}))
        for path in (ROOT / folder).rglob('*')
        if path.suffix in suffixes and '__pycache__' not in path.parts
    }
    assert {'configs/mask_rcnn/metafile.yml', 'tools/train.py'} <= wanted
    assert {f'swin_mm/.mim/{name}' for name in wanted | {'model-index.yml'}} == {n for n in names if '/.mim/' in n}


def test_wheel_contains_the_package_and_nothing_else(wheel):
    names = {name for name in wheel.namelist() if '/.mim/' not in name and '.dist-info/' not in name}
    compiled = {name for name in names if name.startswith('swin_mm/ops/attention/_cpu_')}
    assert names - compiled == modules() | {'swin_mm/py.typed'}
    assert len(compiled) == (3 if platform.machine() == 'x86_64' else 1), 'there is a compiler, mmcv was built with it'


def test_wheel_names_its_licence(wheel, metadata):
    assert metadata['License-Expression'] == 'Apache-2.0'
    (name,) = (name for name in wheel.namelist() if name.endswith('licenses/LICENSE'))
    text = wheel.read(name).decode()
    assert 'Apache License' in text and 'Copyright 2026 the swin_mm authors' in text


def test_plain_install_brings_nothing_of_openmmlab(metadata):
    """It would overwrite the original distributions, which have the same import names."""
    by_extra = {'': set()} | {extra: set() for extra in metadata.get_all('Provides-Extra')}
    for line in metadata.get_all('Requires-Dist'):
        extra = re.search(r"extra == ['\"](\w+)['\"]", line)
        by_extra[extra[1] if extra else ''].add(re.match(r'[\w-]+', line)[0])
    assert by_extra.keys() == {'', 'det', 'seg', 'all', 'hub', 'large', 'onnx', 'openvino', 'deploy', 'docs', 'dev'}
    assert by_extra[''] == {'torch', 'safetensors'}
    common = {'onedl-mmengine', 'onedl-mmcv'}
    assert by_extra['det'] == common | {'onedl-mmdetection'} and by_extra['seg'] == common | {'onedl-mmsegmentation'}
    assert by_extra['all'] in ({'swin_mm'}, by_extra['det'] | by_extra['seg'])  # setuptools may resolve our own extras


def test_version_is_the_same_everywhere(metadata):
    version = swin_mm.__version__
    assert metadata['Version'] == version
    assert yaml.safe_load((ROOT / 'CITATION.cff').read_text())['version'] == version
    newest = re.search(r'^## \[?([\d.]+)', (ROOT / 'CHANGELOG.md').read_text(), re.MULTILINE)[1]
    assert newest == version


def test_the_container_is_built_by_the_documented_commands():
    dockerfile = (ROOT / 'Dockerfile').read_text()
    commands = re.findall(r'^RUN ((?:MMCV_WITH_OPS=1 )?(?:pip|python) .*)', dockerfile, re.MULTILINE)
    page = (ROOT / 'docs/get_started.md').read_text().splitlines()
    assert len(commands) == 4 and not [command for command in commands if command not in page]
    assert set(re.findall(r'^FROM .* AS (\w+)', dockerfile, re.MULTILINE)) == {'cpu', 'cuda'}
    ignored = (ROOT / '.dockerignore').read_text().split()
    assert {'.git', '.venv', 'data/*', '!data/nuclei'} <= set(ignored)


def test_pre_commit_uses_the_pinned_versions():
    hooks = yaml.safe_load((ROOT / '.pre-commit-config.yaml').read_text())['repos']
    revisions = {Path(repo['repo']).name.removesuffix('-pre-commit'): repo['rev'].lstrip('v') for repo in hooks}
    pinned = dict(re.findall(r'^([\w-]+)==([^\s;]+)', (ROOT / 'constraints.txt').read_text(), re.MULTILINE))
    assert {name: revisions[name] for name in ('ruff', 'codespell')} == {
        name: pinned[name] for name in ('ruff', 'codespell')
    }


def test_workflow_runs_every_supported_python(metadata):
    jobs = yaml.safe_load((ROOT / '.github/workflows/ci.yml').read_text())['jobs']
    supported = re.findall(r'Python :: (3\.\d+)', ' '.join(metadata.get_all('Classifier')))
    assert jobs['test']['strategy']['matrix']['python'] == supported


def test_workflow_runs_every_nox_session():
    sessions = re.findall(
        r"^@nox.session\(python='([\d.]+)'\)\ndef (\w+)", (ROOT / 'noxfile.py').read_text(), re.MULTILINE
    )
    jobs = yaml.safe_load((ROOT / '.github/workflows/ci.yml').read_text())['jobs']
    run = jobs['versions']['strategy']['matrix']['include']
    assert [(job['python'], job['session']) for job in run] == sessions and len(sessions) == 4


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
