"""Signals and errors. Resuming is tested in test_resume.py, test_distributed.py and with the tools."""

import signal
from types import SimpleNamespace

import pytest
import torch
from mmengine.hooks import EMAHook
from mmengine.optim import OptimWrapper
from torch import nn

from swin_mm.engine.preemption import ExactResumeHook, PreemptionHook
from swin_mm.utils.errors import Stopped


@pytest.mark.parametrize(
    'error, signalled, stops',
    [
        (RuntimeError('DataLoader worker (pid 7) is killed by signal: Terminated.'), True, True),
        (ConnectionResetError(), True, True),
        (EOFError(), True, True),
        (RuntimeError('DataLoader worker (pid 7) is killed by signal: Killed.'), False, False),
        (ConnectionResetError(), False, False),
        (RuntimeError('the loss is infinite'), True, False),
    ],
)
def test_a_worker_ended_by_the_signal_is_not_an_error(error, signalled, stops, monkeypatch):
    def train():
        hook._signal = 15 * signalled
        raise error

    def stop(runner, iteration):
        raise Stopped(f'at {iteration}', 15)

    hook, runner = PreemptionHook(), SimpleNamespace(train=train, iter=3)
    monkeypatch.setattr(hook, 'stop', stop)
    with pytest.raises(Stopped if stops else type(error), match='at 3' if stops else None):
        hook.train(runner)


def runner(**attributes):
    return SimpleNamespace(iter=0, hooks=[], train_loop=None, **attributes)


def test_handlers_are_restored_and_nohup_is_respected(monkeypatch):
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    hangup = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        hook = PreemptionHook()
        hook.before_train(runner())
        assert signal.getsignal(signal.SIGTERM) == hook._receive
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
        hook.after_train(None)
        assert {number: signal.getsignal(number) for number in before} == before
    finally:
        signal.signal(signal.SIGHUP, hangup)


def test_stopping_in_validation_restores_the_weights_swapped_by_ema(monkeypatch):
    returned, stopped = [], []
    monkeypatch.setattr(EMAHook, 'after_val_epoch', lambda self, runner, metrics=None: returned.append(not stopped))
    hook = PreemptionHook()
    hook._signal = signal.SIGTERM
    monkeypatch.setattr(hook, 'stop', lambda runner, iteration: stopped.append(iteration))
    hook.after_val_iter(SimpleNamespace(iter=7, hooks=[EMAHook(), hook]))
    assert returned == [True] and stopped == [7]


def test_accumulated_gradients_are_saved_in_the_checkpoint():
    def made():
        torch.manual_seed(0)
        model = nn.Linear(2, 1)
        wrapper = OptimWrapper(torch.optim.SGD(model.parameters(), 0.1), accumulative_counts=2)
        return runner(model=model, optim_wrapper=wrapper)

    batches = torch.randn(4, 3, 2)

    def train(one, numbers):
        for index in numbers:
            one.optim_wrapper.initialize_count_status(one.model, index, 4)
            one.optim_wrapper.update_params(one.model(batches[index]).square().mean())
            one.iter = index + 1
        return one

    whole = train(made(), range(4))
    first, checkpoint = train(made(), range(3)), {}
    ExactResumeHook().before_save_checkpoint(first, checkpoint)
    assert checkpoint['gradients']['weight'].abs().sum() > 0
    second, hook = made(), ExactResumeHook()
    second.model.load_state_dict(first.model.state_dict())
    second.iter = 3
    hook.after_load_checkpoint(second, checkpoint)
    hook.before_train(second)
    train(second, [3])
    assert torch.equal(second.model.weight, whole.model.weight)

    complete: dict = {}
    ExactResumeHook().before_save_checkpoint(train(made(), range(2)), complete)
    assert complete == {}
