import os
import signal
import sys

import pytest
from mmengine.config import Config

from swin_mm import cli
from swin_mm.openmmlab.config import require_data
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


@pytest.mark.parametrize(
    'text, words',
    [
        ('model = dict(', 'cannot be read'),
        ("_base_ = 'absent.py'", 'absent.py'),
        ("custom_imports = dict(imports=['no_such_module'])", 'no_such_module'),
    ],
)
def test_a_config_that_does_not_read(parse, text, words):
    with pytest.raises(InputError, match=words) as caught:
        cli.read_config(parse(text))
    assert '\n' not in str(caught.value)


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


def test_looks_where_the_dataset_would(tmp_path):
    (tmp_path / 'images').mkdir()
    (tmp_path / 'a.json').touch()
    here = {'data_root': str(tmp_path), 'ann_file': 'a.json', 'data_prefix': {'img': 'images/'}}

    def missing(part, dataset, **evaluator):
        cfg = Config({f'{part}_dataloader': {'dataset': dataset}, f'{part}_evaluator': evaluator})
        try:
            require_data(cfg, part)
        except InputError as error:
            return str(error)

    assert missing('train', here) is None
    assert missing('train', {'type': 'RepeatDataset', 'dataset': here}) is None
    assert missing('val', here, ann_file=str(tmp_path / 'a.json')) is None
    assert missing('train', here | {'data_root': None, 'ann_file': str(tmp_path / 'a.json'), 'data_prefix': {}}) is None
    assert missing('train', here | {'ann_file': ''}) is None, 'an empty name means that there is none'
    assert missing('train', here | {'data_root': 's3://bucket'}) is None, 'not in this file system'
    assert missing('train', here | {'data_root': '/nowhere', 'backend_args': {'backend': 'petrel'}}) is None

    assert f'{tmp_path}/b.json (train_dataloader: ann_file)' in missing('train', here | {'ann_file': 'b.json'})
    other = {
        'data_prefix': {'img': 'other', 'seg': 'masks'},
        'pipeline': [{'type': 'LoadAnnotations', 'with_seg': True}],
    }
    both = {'type': 'ConcatDataset', 'datasets': [here, here | other]}
    error = missing('test', both)
    assert f'{tmp_path}/other (test_dataloader: img)' in error and f'{tmp_path}/masks (test_dataloader: seg)' in error
    assert '/nowhere.json (val_evaluator: ann_file)' in missing('val', here, ann_file='/nowhere.json')


def test_maps_that_no_step_reads_need_not_be_there(tmp_path):
    (tmp_path / 'images').mkdir()
    node = {'data_root': str(tmp_path), 'data_prefix': {'img': 'images/', 'seg': 'panoptic/'}}

    def check(step: str) -> None:
        pipeline = [{'type': step, 'with_mask': True}]
        require_data(Config({'train_dataloader': {'dataset': node | {'pipeline': pipeline}}}), 'train')

    check('LoadAnnotations')
    with pytest.raises(InputError, match='panoptic/ .train_dataloader: seg'):
        check('LoadPanopticAnnotations')


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


def test_a_closed_standard_output_gets_into_no_file(parse, tmp_path):
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


def test_a_reader_that_has_ended_is_no_error(parse, capfd):
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
