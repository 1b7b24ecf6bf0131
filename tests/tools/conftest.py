import importlib
import shutil

import pytest
from support.tool_fixtures import last_checkpoint, run_tool

from swin_mm import cli
from swin_mm.engine import testing, training


@pytest.fixture(scope='session')
def trained(tiny, tmp_path_factory):
    """A work_dir that `tools/train.py` has filled, and what it printed."""
    folder = tmp_path_factory.mktemp('trained')
    return folder / 'work', run_tool('train', tiny.config, '--work-dir', 'work', '--vis', 'tensorboard', cwd=folder)


@pytest.fixture
def work_dir(trained, tmp_path):
    """A copy of it to go on in."""
    shutil.copytree(trained[0], tmp_path / 'work')
    (tmp_path / 'work' / 'last_checkpoint').write_text(str(last_checkpoint(tmp_path / 'work')))
    return tmp_path / 'work'


def load(tool):
    """A tool as a module."""
    return importlib.import_module(f'tools.{tool}')


@pytest.fixture
def tool():
    """Load a tool as a module, by name."""
    return load


@pytest.fixture
def refuse(monkeypatch, tmp_path, capsys):
    """Call a tool with bad input in this process: the one line it refuses with, after which nothing is left behind."""

    def call(tool, *arguments):
        module = load(tool)
        monkeypatch.chdir(tmp_path)
        monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '1')  # as the tools do, for this test only
        before = set(tmp_path.rglob('*'))
        monkeypatch.setattr('sys.argv', [tool, *map(str, arguments)])
        for part in (training, testing):  # nothing may be built: neither a model nor a folder
            monkeypatch.setattr(part, 'build_runner', lambda _: pytest.fail('bad input was noticed too late'))
        capsys.readouterr()
        assert cli.run(module.main, module.parse_args()) == 2
        printed = capsys.readouterr().err.strip().splitlines()
        assert set(tmp_path.rglob('*')) == before
        errors = [line for line in printed if line.startswith('error: ')]
        assert len(errors) == 1 and printed[-1] == errors[0], printed
        return errors[0]

    return call
