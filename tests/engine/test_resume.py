"""A run that was stopped anywhere and resumed equals an uninterrupted one, bit for bit."""

import signal

import pytest
import torch
from mmengine.device import get_device
from support.processes import in_processes, preload, run_main

pytestmark = pytest.mark.skipif(get_device() != 'cpu', reason='operators of GPUs add up in any order')

# Random numbers in the data (crops, flips) and in the model (stochastic depth, dropout); BatchNorm in UPerNet.
CONFIG = """
_base_ = {base!r}
model = dict(backbone=dict(drop_path_rate=0.5))
train_dataloader = dict(num_workers={workers}, persistent_workers={workers} > 0, batch_size=2)
val_dataloader = dict(num_workers=0, persistent_workers=False)
train_cfg = {length}
default_hooks = dict(checkpoint=dict(interval={interval}, save_best='auto'))
randomness = dict(seed=3)
custom_hooks = {hooks}
"""


@pytest.fixture
def run(tiny, tmp_path):
    """Train in a folder, possibly until a signal, and return the content of the last checkpoint."""

    preload(tiny.task)

    def call(folder, workers, *arguments, stop=None):
        detection = tiny.task == 'detection'
        hook = dict(type='support.processes.SignalHook', stop=stop)
        config = tmp_path / f'{folder}.py'
        config.write_text(
            CONFIG.format(
                base=str(tiny.config),
                workers=workers,
                length=dict(max_epochs=3) if detection else dict(max_iters=9, val_interval=3),
                interval=1 if detection else 2,
                hooks=[hook] if stop else [],
            )
        )
        expected = 0 if stop is None else -stop[0] if stop[0] == signal.SIGKILL else 128 + stop[0]
        work_dir = tmp_path / folder
        assert in_processes((run_main, 'train', config, '--work-dir', work_dir, *arguments)) == [expected]
        last = work_dir / ('epoch_3.pth' if detection else 'iter_9.pth')
        return torch.load(last, weights_only=False) if last.exists() else None

    return call


def differences(ours, theirs, path=''):
    """The keys at which two nested containers of tensors differ."""
    if isinstance(theirs, torch.Tensor):
        return [] if torch.equal(ours, theirs) else [path]
    if isinstance(theirs, dict):
        assert ours.keys() == theirs.keys(), path
        return [found for key in theirs for found in differences(ours[key], theirs[key], f'{path}.{key}')]
    if isinstance(theirs, (list, tuple)):
        assert len(ours) == len(theirs), path
        return differences(dict(enumerate(ours)), dict(enumerate(theirs)), path)
    return [] if ours == theirs else [path]


@pytest.mark.parametrize('workers', [2, pytest.param(0, marks=pytest.mark.slow)])
def test_a_resumed_run_equals_an_uninterrupted_one(run, workers):
    whole = run('whole', workers)
    # In the fifth iteration, after a checkpoint; then in the same one, to be saved after it; then in the validation.
    stops = [(signal.SIGKILL, 4, False), (signal.SIGTERM, 4, False), (signal.SIGHUP, 6, True)]
    for index, (number, *where) in enumerate(stops):
        run('broken', workers, *['--resume'] * (index > 0), stop=(int(number), *where))
    resumed = run('broken', workers, '--resume')
    for part in ('state_dict', 'optimizer', 'param_schedulers'):
        assert differences(resumed[part], whole[part]) == []
    ours, theirs = (state['message_hub']['log_scalars'] for state in (resumed, whole))
    assert ours.keys() == theirs.keys()
    assert [key for key in theirs if 'time' not in key and list(ours[key].data[0]) != list(theirs[key].data[0])] == []
