"""Running functions and tools in separate processes, whose signal or exit code is tested.

The processes are forked from this one, which has imported everything.
"""

import errno
import gc
import importlib
import multiprocessing
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import mmengine.runner.runner
import pytest
import torch
import yapf.yapflib.yapf_api
from mmengine.hooks import Hook
from mmengine.runner import Runner
from support.tool_fixtures import run_tool

from swin_mm import cli

TOOLS = {name: importlib.import_module(f'tools.{name}') for name in ('train', 'test')}


def preload(task: str) -> None:
    """Import the library of a task here, once for all the processes that follow."""
    library = 'mmdet' if task == 'detection' else 'mmseg'
    for part in ('datasets', 'engine', 'evaluation', 'models', 'visualization'):
        importlib.import_module(f'{library}.{part}')


def in_processes(*calls: tuple, timeout: int = 300) -> list[int | None]:
    """Run each (function, *arguments) in a separate process, and return the exit codes when all have ended.

    Skips the test where forked processes cannot compute gradients.
    """
    if torch.version.cuda and not _forked_processes_have_gradients():
        # Seen with CUDA builds of torch 2.15 on machines without a GPU, after torch.compile or FakeTensorMode.
        pytest.skip('an earlier test of this process keeps PyTorch from computing gradients in forks: run this alone')
    processes = [multiprocessing.get_context('fork').Process(target=_in_process, args=call) for call in calls]
    for process in processes:
        process.start()
    for process in processes:
        process.join(timeout=timeout)
        process.kill()
        process.join()
    return [process.exitcode for process in processes]


def _forked_processes_have_gradients() -> bool:
    number = os.fork()
    if number == 0:
        try:
            torch.ones(1, requires_grad=True).sum().backward()
        except RuntimeError:
            os._exit(1)
        os._exit(0)
    return os.waitpid(number, 0)[1] == 0


def _in_process(function: Callable, *arguments: Any) -> None:
    signal.signal(signal.SIGHUP, signal.SIG_DFL)  # nohup, under which the tests may run, has it ignored
    gc.freeze()  # finalizers of the parent's garbage must not run in the middle of what is tested here
    torch.set_num_threads(1)  # the other threads of the parent are not here
    # What takes seconds and is not tested: formatting configs for logs, and the versions of compilers.
    yapf.yapflib.yapf_api.FormatCode = lambda text, **_: (text, True)
    mmengine.runner.runner.collect_env = dict
    function(*arguments)


def run_forked(tool: str, *arguments: object, cwd: Path, timeout: int = 300) -> str:
    """``run_tool`` without the seconds in which a new process imports the libraries: the output of the tool."""
    if torch.cuda.is_initialized():  # such a process cannot be forked
        return run_tool(tool, *arguments, cwd=cwd, timeout=timeout)
    with TemporaryDirectory() as folder:
        output = Path(folder, 'output.txt')
        codes = in_processes((_run_into, output, cwd, tool, *arguments), timeout=timeout)
        text = output.read_text(errors='replace')
    assert codes == [0], text[-6000:]
    return text


def _run_into(output: Path, cwd: Path, tool: str, *arguments: object) -> None:
    file = os.open(output, os.O_WRONLY | os.O_CREAT)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout = sys.stderr = os.fdopen(file, 'w', buffering=1)
    os.chdir(cwd)
    run_main(tool, *arguments)


def run_main(tool: str, *arguments: object) -> None:
    """Run the main function of a tool and exit with its exit code; for ``in_processes``."""
    sys.argv = [f'{tool}.py', *map(str, arguments)]
    module = TOOLS[tool]
    sys.exit(cli.run(module.main, module.parse_args()))


def run_on_a_full_disk(suffix: str, tool: str, *arguments: object) -> None:
    """``run_main`` where no file with this suffix can be flushed to the disk; for ``in_processes``."""
    flush = os.fsync

    def fsync(file: int) -> None:
        path = os.readlink(f'/proc/self/fd/{file}')
        if path.endswith(suffix):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)
        flush(file)

    os.fsync = fsync
    run_main(tool, *arguments)


class SignalHook(Hook):
    """Sends this process a signal in the middle of an iteration; configs name it by its path."""

    def __init__(self, stop: tuple[int, int, bool]) -> None:
        self.number, self.iteration, self.validation = stop

    def before_train_iter(self, runner: Runner, **_: Any) -> None:
        if runner.iter == self.iteration and not self.validation:
            os.kill(os.getpid(), self.number)

    def before_val_iter(self, runner: Runner, **_: Any) -> None:
        if runner.iter == self.iteration and self.validation:
            os.kill(os.getpid(), self.number)
