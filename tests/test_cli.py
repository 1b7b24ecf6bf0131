from pickle import UnpicklingError

import pytest
import torch
from mmengine.runner import CheckpointLoader
from support.tool_fixtures import Bomb

from swin_mm import cli
from swin_mm.checkpoints import CheckpointError
from swin_mm.engine.runner import use_safe_reader
from swin_mm.utils.errors import InputError, Stopped


@pytest.fixture
def parse(tmp_path):
    """Write a config and parse a command line on it."""

    def call(text, *arguments):
        path = tmp_path / 'config.py'
        path.write_text(text)
        return cli.parser('').parse_args([str(path), *arguments])

    return call


def test_work_dir_is_the_command_lines_then_the_configs_then_named_after_it(parse):
    assert cli.read_config(parse("work_dir = 'own'", '--work-dir', 'given')).work_dir == 'given'
    assert cli.read_config(parse("work_dir = 'own'")).work_dir == 'own'
    assert cli.read_config(parse('')).work_dir == 'work_dirs/config'


def test_mistyped_options_are_noticed(parse, capsys):
    text = 'model = dict(backbone=dict(depths=[2, 2]), heads=[dict(a=1)])'
    options = ['model.backbone.dephts=[1,1]', 'modle.x=1', 'randomness.seed=1', 'model.heads.0.a=2']
    cfg = cli.read_config(parse(text, '--cfg-options', *options))
    warnings = capsys.readouterr().err.splitlines()
    assert len(warnings) == 2, 'seed is an argument of the Runner, and heads.0.a is there'
    assert 'model.backbone.dephts' in warnings[0] and 'did you mean depths?' in warnings[0]
    assert 'modle.x' in warnings[1] and 'did you mean model?' in warnings[1]
    assert cfg.randomness.seed == 1 and cfg.model.heads[0].a == 2
    with pytest.raises(InputError, match='--cfg-options does not fit'):
        cli.read_config(parse(text, '--cfg-options', 'model.heads.7.a=2'))


def test_exit_codes(parse, capsys):
    def raising(error):
        def main(_):
            raise error

        return main

    args = parse('')
    assert cli.run(lambda _: None, args) == 0
    assert cli.run(raising(InputError('what was wrong')), args) == 2
    assert capsys.readouterr().err == 'error: what was wrong\n'
    assert cli.run(raising(Stopped('saved', 15)), args) == 143
    assert cli.run(raising(KeyboardInterrupt()), args) == 130
    with pytest.raises(ZeroDivisionError):  # not the user's mistake: keeps its traceback
        cli.run(raising(ZeroDivisionError()), args)
    assert cli.run(raising(InputError('x')), parse('', '--debug')) == 2
    assert 'Traceback' in capsys.readouterr().err


def test_mmengine_does_not_run_code_in_checkpoints(tmp_path, monkeypatch):
    # Without this its reader warns and then unpickles everything.
    monkeypatch.setattr(CheckpointLoader, '_schemes', CheckpointLoader._schemes.copy())
    monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '0')
    use_safe_reader()
    torch.save({'state_dict': Bomb(tmp_path / 'exploded')}, tmp_path / 'bomb.pth')
    with pytest.raises(CheckpointError, match='wants to run code'):
        CheckpointLoader.load_checkpoint(str(tmp_path / 'bomb.pth'))
    with pytest.raises(UnpicklingError):  # what the loaders of the other schemes end in
        torch.load(tmp_path / 'bomb.pth', weights_only=False)
    assert not (tmp_path / 'exploded').exists()
