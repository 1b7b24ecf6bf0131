import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType

import pytest
import torch
from mmengine.config import Config
from support.processes import in_processes, run_forked, run_main, run_on_a_full_disk
from support.tool_fixtures import Bomb, command, last_checkpoint

from swin_mm.engine.work_dir import locked
from swin_mm.openmmlab.loading import read_checkpoint

STEP = re.compile(r'(?:Epoch|Iter)\(train\) *(\[.*\]) ')


def steps(output):
    """Where each logged iteration was: '[2][1/3]' in epochs, '[4/6]' in iterations."""
    return [match.replace(' ', '') for match in STEP.findall(output)]


def test_trains_with_progress_and_metrics(tiny, trained):
    work_dir, output = trained
    assert steps(output) == (
        ['[1][1/3]', '[1][2/3]', '[1][3/3]'] if tiny.task == 'detection' else ['[1/3]', '[2/3]', '[3/3]']
    )
    assert output.count(' eta: ') >= 3 and re.search(tiny.metric + r': \d', output)
    state = read_checkpoint(last_checkpoint(work_dir))
    assert len(list(work_dir.rglob('events.out.tfevents.*'))) == 1, 'what TensorBoard reads'
    assert state['meta']['iter'] == 3 and any(key.startswith('backbone.') for key in state['state_dict'])


def test_resumes_behind_a_finished_epoch(tiny, work_dir, tmp_path):
    if tiny.task == 'segmentation':
        pytest.skip('counts iterations')
    arguments = ('--resume', '--work-dir', work_dir, '--cfg-options', 'train_cfg.max_epochs=2')
    output = run_forked('train', tiny.config, *arguments, cwd=tmp_path)
    assert steps(output) == ['[2][1/3]', '[2][2/3]', '[2][3/3]']


def test_a_stopped_run_goes_on_where_it_was(tiny, tmp_path):
    # Detection counts epochs and is stopped within one, by Ctrl-C; segmentation by what a cluster sends to every
    # process, data workers included. The learning rate tells whether the schedule went on as well.
    detection = tiny.task == 'detection'
    number = signal.SIGINT if detection else signal.SIGTERM
    length = 'train_cfg.max_epochs={}' if detection else 'train_cfg.max_iters={}'
    arguments = ('train', tiny.config, '--work-dir', 'work', '--cfg-options', 'default_hooks.checkpoint.interval=1000')
    process = subprocess.Popen(
        command(*arguments, length.format(1000), 'train_cfg.val_interval=1000'),
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    try:
        output = ''
        for line in process.stdout:
            if STEP.search(line) and len(steps(output)) == 3:  # this is the fourth iteration
                workers = Path(f'/proc/{process.pid}/task/{process.pid}/children').read_text().split()
                for pid in [process.pid] if detection else [process.pid, *map(int, workers)]:
                    os.kill(pid, number)
            output += line
        assert process.wait() == 128 + number, output[-3000:]
    finally:
        process.kill()
    done = len(steps(output))
    assert 4 <= done <= 6, output
    assert f'stopped at iteration {done} and saved {tmp_path}/work/interrupted.pth' in output.splitlines()[-1]
    assert 'Traceback' not in output and not list(tmp_path.glob('work/*.tmp'))

    end = 3 if detection else done + 2
    resume = ['--resume'] if detection else ['--resume', 'work/interrupted.pth']
    again = run_forked(*arguments, length.format(end), 'train_cfg.val_interval=1000', *resume, cwd=tmp_path)
    expected = [(e, i) for e in (1, 2, 3) for i in (1, 2, 3)][done:] if detection else [done + 1, done + 2]
    assert steps(again) == [f'[{e}][{i}/3]' for e, i in expected] if detection else [f'[{i}/{end}]' for i in expected]
    rates = [float(rate) for rate in re.findall(r' lr: (\S+)', output + again)]
    assert rates == pytest.approx([rates[0] + i * (rates[1] - rates[0]) for i in range(len(rates))], rel=1e-3)


def test_says_what_input_is_missing(tiny, refuse, tmp_path):
    assert 'config nowhere.py does not exist' in refuse('train', 'nowhere.py')
    key = 'train_dataloader.dataset.data_root'
    error = refuse('train', tiny.config, '--cfg-options', f'{key}=/nowhere')
    assert '/nowhere (train_dataloader: data_root)' in error and '--cfg-options' in error
    prefix = 'img' if tiny.task == 'detection' else 'img_path'
    error = refuse('train', tiny.config, '--cfg-options', f'val_dataloader.dataset.data_prefix.{prefix}=absent')
    assert f'/absent (val_dataloader: {prefix})' in error
    assert 'checkpoint absent.pth does not exist' in refuse('train', tiny.config, '--resume', 'absent.pth')
    assert 'checkpoint absent.pth does not exist' in refuse(
        'train', tiny.config, '--cfg-options', 'load_from=absent.pth'
    )


def test_says_which_pretrained_weights_are_missing(tiny, refuse, tmp_path):
    config = tmp_path / 'pretrained.py'
    init = "dict(_delete_=True, type='Pretrained', checkpoint='absent.pth')"
    config.write_text(f'_base_ = {str(tiny.config)!r}\nmodel = dict(backbone=dict(init_cfg={init}))\n')
    assert 'checkpoint absent.pth does not exist' in refuse('train', config)


def test_refuses_what_cannot_be_resumed(tiny, refuse, trained, tmp_path):
    whole = last_checkpoint(trained[0]).read_bytes()
    (tmp_path / 'half.pth').write_bytes(whole[: len(whole) // 2])
    assert 'half.pth' in refuse('train', tiny.config, '--resume', 'half.pth')

    torch.save({'state_dict': {'x': torch.zeros(1)}}, tmp_path / 'weights.pth')
    error = refuse('train', tiny.config, '--resume', 'weights.pth')
    assert 'has no meta, message_hub, optimizer' in error and 'load_from' in error

    torch.save({'state_dict': {}, 'meta': Bomb(tmp_path / 'exploded')}, tmp_path / 'bomb.pth')
    assert 'bomb.pth wants to run code' in refuse('train', tiny.config, '--resume', 'bomb.pth')
    assert not (tmp_path / 'exploded').exists()


def test_a_pickle_in_the_config_is_not_opened(tiny, refuse, tmp_path):
    (tmp_path / 'x.pkl').write_bytes(pickle.dumps(Bomb(tmp_path / 'exploded')))
    option = 'train_dataloader.dataset.proposal_file=x.pkl'
    error = refuse('train', tiny.config, '--cfg-options', option)
    assert 'x.pkl (train_dataloader.dataset.proposal_file)' in error and '--allow-pickle' in error
    assert not (tmp_path / 'exploded').exists()


def test_a_work_dir_in_use_is_refused(tiny, tmp_path):
    with locked(tmp_path / 'work'):
        code = in_processes((run_main, 'train', tiny.config, '--work-dir', tmp_path / 'work'))
    assert code == [2] and not list((tmp_path / 'work').glob('*/*.log')), 'nothing is written beside the first run'


def test_training_on_a_full_disk(tiny, tmp_path, capfd):
    arguments = ('train', tiny.config, '--work-dir', tmp_path / 'work')
    assert in_processes((run_on_a_full_disk, '.pth', *arguments)) == [2]
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith('error: ') and 'cannot be written: No space left on device' in error
    assert list((tmp_path / 'work').rglob('*.pth')) == [], 'nothing half-written'


@pytest.mark.parametrize('workers', [0, 1])
def test_an_image_that_cannot_be_read_is_named(tiny, workers, tmp_path, capfd):
    if tiny.task == 'segmentation':
        pytest.skip('the same loader')
    data = tmp_path / 'coco'
    shutil.copytree(Config.fromfile(tiny.config).data_root, data)
    for path in (data / 'train2017').iterdir():
        path.write_bytes(path.read_bytes()[:50])
    options = [f'train_dataloader.{key}' for key in (f'dataset.data_root={data}', f'num_workers={workers}')]
    options += [f'train_dataloader.persistent_workers={workers > 0}']
    assert in_processes((run_main, 'train', tiny.config, '--work-dir', tmp_path / 'w', '--cfg-options', *options)) == [
        2
    ]
    error = capfd.readouterr().err.strip().splitlines()[-1]
    assert error.startswith(f'error: {data}/train2017/') and 'cannot be loaded' in error and 'check_data' in error


@pytest.mark.skipif(torch.cuda.is_available(), reason='these work where there is a GPU')
def test_says_what_needs_a_gpu(tiny, refuse):
    for option in (['--amp'], ['--amp-dtype', 'bf16']):
        assert 'mixed precision' in refuse('train', tiny.config, *option)
    assert 'on CPUs use tools/dist_train.sh' in refuse('train', tiny.config, '--launcher', 'slurm')


def test_says_what_else_is_missing(refuse, tiny, monkeypatch):
    monkeypatch.delenv('RANK', raising=False)
    assert 'processes that torchrun starts' in refuse('train', tiny.config, '--launcher', 'pytorch')
    monkeypatch.setitem(sys.modules, 'wandb', None)
    assert 'pip install wandb' in refuse('train', tiny.config, '--vis', 'wandb')


def test_batch_size_for_the_learning_rate(refuse, tiny):
    if tiny.task == 'segmentation':  # the stock schedule says nothing of it
        assert 'auto_scale_lr = dict(base_batch_size=16)' in refuse('train', tiny.config, '--auto-scale-lr')


@pytest.fixture
def configured(tool, tiny, monkeypatch):
    """The config with which `tools/train.py` would train."""

    def call(*arguments):
        train, trained = tool('train'), []
        monkeypatch.setenv('TORCH_FORCE_WEIGHTS_ONLY_LOAD', '1')  # as the tool does, for this test only
        monkeypatch.setattr(train.training, 'train', lambda cfg, **_: trained.append(cfg))
        monkeypatch.setattr('sys.argv', ['train', str(tiny.config), *arguments])
        train.main(train.parse_args())
        return trained[0]

    return call


def test_the_learning_rate_is_scaled_by_all_images_of_a_step(configured):
    """Accumulated iterations count, too."""
    options = ['auto_scale_lr.base_batch_size=16', 'optim_wrapper.accumulative_counts=4']
    cfg = configured('--auto-scale-lr', '--cfg-options', *options)
    assert cfg.auto_scale_lr == {'enable': True, 'base_batch_size': 4}


def test_writers_are_added_to_those_of_the_config(configured, monkeypatch):
    for package in 'mlflow', 'tensorboard', 'wandb':
        module = ModuleType(package)
        module.__spec__ = ModuleSpec(package, None)
        monkeypatch.setitem(sys.modules, package, module)
    cfg = configured('--vis', 'tensorboard', '--vis', 'wandb')
    writers = [writer.type for writer in cfg.visualizer.vis_backends]
    assert writers == ['LocalVisBackend', 'TensorboardVisBackend', 'WandbVisBackend']
    monkeypatch.delenv('MLFLOW_TRACKING_URI', raising=False)
    (_, mlflow) = configured('--vis', 'mlflow', '--work-dir', '/some/run').visualizer.vis_backends
    assert mlflow.type == 'MLflowVisBackend' and mlflow.exp_name == 'run'
    assert mlflow.tracking_uri == 'sqlite:////some/run/mlflow.db' and mlflow.artifact_location == '/some/run/mlruns'
    monkeypatch.setenv('MLFLOW_TRACKING_URI', 'http://server')
    (_, mlflow) = configured('--vis', 'mlflow').visualizer.vis_backends
    assert mlflow.tracking_uri == 'http://server' and 'artifact_location' not in mlflow


@pytest.mark.parametrize(
    'arguments, dtype, loss_scale',
    [
        (['--amp'], None, 'dynamic'),
        (['--amp-dtype', 'fp16'], 'float16', 'dynamic'),
        (['--amp-dtype', 'bf16'], 'bfloat16', 1.0),
        (['--amp', '--amp-dtype', 'bf16'], 'bfloat16', 1.0),
    ],
)
def test_mixed_precision_and_its_type(configured, arguments, dtype, loss_scale):
    wrapper = configured(*arguments).optim_wrapper
    assert (wrapper.type, wrapper.get('dtype'), wrapper.loss_scale) == ('AmpOptimWrapper', dtype, loss_scale)
