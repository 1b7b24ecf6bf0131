"""What the hook makes of errors; that runs go on is tested with the tools and with several ranks."""

from types import SimpleNamespace

import pytest

from swin_mm.engine.preemption import InterruptHook
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
def test_a_worker_that_the_signal_has_ended_is_no_error(error, signalled, stops, monkeypatch):
    def train():
        hook._signal = 15 * signalled
        raise error

    def stop(runner, iteration):
        raise Stopped(f'at {iteration}', 15)

    hook, runner = InterruptHook(), SimpleNamespace(register_hook=lambda _: None, train=train, iter=3)
    monkeypatch.setattr(hook, 'stop', stop)
    with pytest.raises(Stopped if stops else type(error), match='at 3' if stops else None):
        hook.train(runner)
