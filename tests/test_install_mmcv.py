"""`make setup` installs a prebuilt wheel of mmcv or builds it, and says which and why. pip and torch are stand-ins."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
HERE = '.'.join(map(str, sys.version_info[:2]))
LISTED = HERE in ('3.10', '3.12')  # Pythons that there are wheels for
# Installs by creating a module, and writes its arguments to a file. PIP_WORKS says what it can do.
PIP = """
import os, sys
from pathlib import Path
here = Path(__file__).parents[1]
with open(here / 'calls', 'a') as calls:
    print(*sys.argv[1:], sep=' ', file=calls)
kind = 'wheel' if '--only-binary' in sys.argv else 'uninstall' if 'uninstall' in sys.argv else 'build'
if kind not in os.environ['PIP_WORKS']:
    sys.exit(1)
(here / 'mmcv').mkdir(exist_ok=True)
(here / 'mmcv/_ext.py').write_text('' if kind == 'build' or 'good' in os.environ['PIP_WORKS'] else 'raise ImportError')
"""
TORCH = """
from types import SimpleNamespace
__version__, version = {torch!r}, SimpleNamespace(cuda={cuda!r})
"""
SOURCE = """
#include <torch/types.h>
static_assert(__cplusplus >= 202002L);
int four(int x) { return twice(twice(x)); }
"""


@pytest.fixture
def install(tmp_path):
    """Run the script; returns its output and the arguments of each call of pip."""

    def run(*arguments, torch='2.8.0+cu128', cuda='12.8', works='wheel good build', **settings):
        stand_ins = {
            'pip/__init__.py': '',
            'pip/__main__.py': PIP,
            'torch/__init__.py': TORCH.format(torch=torch, cuda=cuda),
            'mmcv/__init__.py': '',
        }
        for name, content in stand_ins.items():
            (tmp_path / name).parent.mkdir(exist_ok=True)
            (tmp_path / name).write_text(content)
        environment = os.environ | {'PYTHONPATH': str(tmp_path), 'PIP_WORKS': works, 'MMCV_WHEELS': ''} | settings
        command = [sys.executable, ROOT / '.ci/install_mmcv.py', tmp_path / 'log', *arguments]
        done = subprocess.run(command, env=environment, capture_output=True, text=True)
        calls = tmp_path / 'calls'
        assert done.returncode == 0, done.stderr
        return done.stdout, calls.read_text().splitlines() if calls.exists() else []

    return run


def test_wheels_in_a_folder_are_taken(install):
    said, (call,) = install('-c', 'pins.txt', MMCV_WHEELS='/wheels')
    assert 'MMCV_WHEELS=/wheels' in said and 'nothing to compile' in said
    assert call.startswith('install onedl-mmcv --only-binary onedl-mmcv')
    assert '--retries 0' in call and call.endswith('--find-links /wheels -c pins.txt')


def test_an_index_is_asked_as_an_index(install):
    _, (call,) = install(MMCV_WHEELS='http://localhost/cpu-torch280/simple/')
    assert call.endswith('--extra-index-url http://localhost/cpu-torch280/simple/')


@pytest.mark.parametrize(
    'torch, cuda, index', [('2.8.0+cu128', '12.8', 'cu128-torch280'), ('2.10.0+cpu', None, 'cpu-torch2100')]
)
def test_the_public_wheels_are_asked_for_where_they_exist(install, torch, cuda, index):
    said, calls = install(torch=torch, cuda=cuda)
    if LISTED:
        assert len(calls) == 1 and calls[0].endswith(f'--extra-index-url https://mmwheels.onedl.ai/{index}/simple')
    else:
        assert len(calls) == 1 and '--only-binary' not in calls[0]
        assert f'this is torch {torch.partition("+")[0]} with Python {HERE}' in said


def test_there_are_no_wheels_for_other_versions_of_torch(install):
    said, calls = install(torch='2.13.0', cuda=None)
    assert len(calls) == 1 and '--only-binary' not in calls[0]
    assert 'building onedl-mmcv from source: wheels exist for torch 2.4.1, ' in said and 'this is torch 2.13.0' in said


def test_there_are_no_wheels_of_the_original_distribution(install):
    said, calls = install('--package', 'mmcv==2.1.0')
    assert len(calls) == 1 and calls[0].startswith('install mmcv==2.1.0 -v --no-build-isolation')
    assert 'there are no wheels of mmcv==2.1.0' in said


@pytest.mark.parametrize('works', ['build', 'wheel build uninstall'])  # there is no wheel; it is for another torch
def test_building_follows_a_wheel_that_fails(install, works):
    said, calls = install(works=works, MMCV_WHEELS='/wheels')
    assert '--only-binary' in calls[0] and '--no-build-isolation' in calls[-1]
    assert ('uninstall -qy onedl-mmcv' in calls) == ('wheel' in works)
    assert 'the wheel could not be installed, or does not work here; see ' in said


def test_a_working_mmcv_is_left_alone(install):
    install()
    said, calls = install()
    assert not said and len(calls) == 1


@pytest.mark.skipif(shutil.which('g++') is None, reason='needs g++')
def test_precompiled_headers_change_the_time_only(tmp_path):
    (tmp_path / 'torch').mkdir()
    (tmp_path / 'torch/types.h').write_text('#pragma once\ninline int twice(int x) { return 2 * x; }\n')
    (tmp_path / 'a.cpp').write_text(SOURCE)
    (tmp_path / 'precompiled').mkdir()
    environment = os.environ | {'MMCV_PRECOMPILED': str(tmp_path / 'precompiled'), 'MMCV_STD': '-std=c++20'}
    options = ['-MMD', '-MF', 'a.d', '-O2', '-g', '-I.', '-Winvalid-pch', '-Werror']
    for std, out in (('-std=c++17', 'a.o'), ('-std=c++17', 'again.o')):
        command = [ROOT / '.ci/mmcv-g++', *options, '-c', 'a.cpp', '-o', out, std]
        subprocess.run(command, cwd=tmp_path, env=environment, check=True)
    subprocess.run(['g++', '-O2', '-I.', '-c', 'a.cpp', '-o', 'plain.o', '-std=c++20'], cwd=tmp_path, check=True)
    assert len(list(tmp_path.glob('precompiled/*.gch'))) == 1
    outputs = [(tmp_path / name).read_bytes() for name in ('a.o', 'again.o', 'plain.o')]
    assert outputs[0] == outputs[1] == outputs[2]
