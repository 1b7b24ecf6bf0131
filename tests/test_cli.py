import os
import signal
import sys

import pytest

from swin_mm import cli
from swin_mm.utils.errors import InputError, Stopped


@pytest.fixture
def parse(tmp_path, monkeypatch):
    """Write a config and parse a command line on it."""
    monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '')  # so that it is restored
    monkeypatch.delenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD')

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


def test_ctrl_c_while_a_config_is_formatted(parse, capsys):
    def main(_):
        try:
            try:
                raise KeyboardInterrupt
            except BaseException:  # as mmengine does
                raise SyntaxError('Failed to format the config file') from None
        except SyntaxError as error:
            raise InputError('cannot be built') from error

    assert cli.run(main, parse('')) == 130
    assert capsys.readouterr().err == 'stopped at once, without saving\n'

    def broken(_):
        raise SyntaxError('not the user')

    with pytest.raises(SyntaxError):
        cli.run(broken, parse(''))


def exit_code_in_a_fork(function):
    """The exit code that a function gives in a process of its own."""
    process = os.fork()
    if process == 0:
        os._exit(function())
    return os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])


def test_a_closed_standard_output_does_not_write_into_files(parse, tmp_path):
    args = parse('')

    def main(_):
        with (tmp_path / 'log').open('w'):
            os.write(1, b'printed')

    def run():
        os.close(1)
        sys.stdout = None
        return cli.run(main, args)

    assert exit_code_in_a_fork(run) == 0
    assert (tmp_path / 'log').read_text() == ''


def test_a_closed_pipe_is_not_an_error(parse, capfd):
    args = parse('')
    reader, writer = os.pipe()
    os.close(reader)

    def run():
        sys.stdout = os.fdopen(writer, 'w')
        return cli.run(lambda _: print('to nobody'), args)

    assert exit_code_in_a_fork(run) == 128 + signal.SIGPIPE
    assert capfd.readouterr().err == ''


def test_paths_that_are_not_utf8(tmp_path, parse):
    name = os.fsdecode(b'caf\xe9')
    with pytest.raises(InputError, match=r'caf.udce9 is not UTF-8'):
        cli.read_config(parse('', '--work-dir', str(tmp_path / name)))


def test_torch_loads_weights_only_unless_the_user_says_so(parse):
    cli.read_config(parse('', '--allow-pickle'))
    assert 'TORCH_FORCE_WEIGHTS_ONLY_LOAD' not in os.environ
    cli.read_config(parse(''))
    assert os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] == '1'
