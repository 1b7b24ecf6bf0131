"""Shared code of the command-line tools: arguments, reading the config, exit codes.

Exit codes: 0 success, 1 failure, 2 invalid input, 128 + signal number when interrupted (130 for Ctrl-C).
"""

import os
import signal
import sys
import traceback
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.device import get_device

from swin_mm.openmmlab.config import apply_options, load_config
from swin_mm.utils.errors import CheckpointError, DependencyError, InputError, Stopped


def parser(description: str, runner: bool = True, **kwargs: Any) -> ArgumentParser:
    """Create a parser with the arguments of all tools that take a config, named as in mmdet and mmseg.

    Args:
        description: what the tool does.
        runner: whether the tool builds mmengine's Runner, which needs a work_dir and a launcher.
        kwargs: further arguments of ArgumentParser; an ``epilog`` keeps its line breaks.
    """
    kwargs.setdefault('formatter_class', RawDescriptionHelpFormatter)
    result = ArgumentParser(description=description, **kwargs)
    result.add_argument('config', help='config file, or a name in a library such as mmdet::retinanet/...')
    result.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        metavar='KEY=VALUE',
        help='change settings of the config: model.backbone.with_cp=True, or lists as key="[a,b]" or key=a,b',
    )
    result.add_argument('--debug', action='store_true', help='show the traceback of an error')
    if not runner:
        return result
    result.add_argument('--work-dir', help='folder for logs and checkpoints (default: work_dirs/<name of the config>)')
    result.add_argument(
        '--allow-pickle',
        action='store_true',
        help='open pickles that the config names (proposal_file=x.pkl): they can run any code, so only trusted ones',
    )
    result.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='job launcher')
    # torchrun and its forerunners pass the rank by one of these names or in the environment.
    result.add_argument('--local_rank', '--local-rank', type=int, default=0, help='set by the launcher')
    return result


def add_runtime(parser: ArgumentParser) -> None:
    """Add the argument that chooses the runtime of an exported file."""
    parser.add_argument(
        '--runtime',
        choices=('onnxruntime', 'openvino'),
        help='what runs an exported file (default: onnxruntime for .onnx, openvino for .xml)',
    )


def run(main: Callable[[Namespace], None], args: Namespace) -> int:
    """Call ``main`` and turn errors about the input into one line and an exit code.

    Other errors keep their traceback, since they may occur hours into a run.
    """
    _open_streams()
    try:
        main(args)
        sys.stdout.flush()
    except (InputError, CheckpointError, DependencyError, SyntaxError) as error:
        if _was_interrupted(error):  # mmengine turns Ctrl-C while it formats a config into a SyntaxError
            return _stopped_at_once()
        if isinstance(error, SyntaxError):
            raise
        if args.debug:
            traceback.print_exc()
        print(f'error: {error}', file=sys.stderr)
        return 2
    except BrokenPipeError:  # the reader of a pipe has ended, as in `| head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # Python flushes it at the end
        return 128 + signal.SIGPIPE
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.code
    except KeyboardInterrupt:
        return _stopped_at_once()
    return 0


def _stopped_at_once() -> int:
    print('stopped at once, without saving', file=sys.stderr)
    return 128 + signal.SIGINT


def _was_interrupted(error: BaseException | None) -> bool:
    """Whether an error was raised because of Ctrl-C."""
    while error is not None and not isinstance(error, KeyboardInterrupt):
        error = error.__cause__ or error.__context__
    return error is not None


def _open_streams() -> None:
    """Make the standard streams writable even if the shell closed them or the locale cannot encode some text.

    If standard output is closed, the next file to be opened would get its descriptor and receive the printed text.
    """
    for number in (0, 1, 2):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # gets the lowest free descriptor, this one
    for name in ('stdout', 'stderr'):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, 'w'))  # noqa: SIM115 (open as long as the process)
        elif hasattr(getattr(sys, name), 'reconfigure'):
            getattr(sys, name).reconfigure(errors='backslashreplace')


def read_config(args: Namespace, change: Callable[[Config], Config] = lambda cfg: cfg) -> Config:
    """Read the config named on the command line, and apply ``--cfg-options`` and, for a runner, work_dir and launcher.

    Args:
        args: the result of ``parser().parse_args()``.
        change: applied to the config before its options.

    Raises:
        InputError: the config does not exist or cannot be read, or the options do not fit it.
        DependencyError: the config needs a library that is missing or broken.
    """
    cfg = change(load_config(args.config))
    for warning in apply_options(cfg, args.cfg_options):
        print(f'warning: {warning}', file=sys.stderr)

    if 'launcher' not in args:
        return cfg
    if not args.allow_pickle:
        # In this process torch.load never runs code, also where mmengine, mmdet or mmseg call it for a part of a model.
        os.environ['TORCH_FORCE_WEIGHTS_ONLY_LOAD'] = '1'
    cfg.launcher = args.launcher
    if args.launcher in ('slurm', 'mpi') and get_device() == 'cpu':
        raise InputError(f'--launcher {args.launcher} needs GPUs and torch sees none; on CPUs use tools/dist_train.sh')
    if args.launcher == 'pytorch' and 'RANK' not in os.environ:
        raise InputError('--launcher pytorch is for processes that torchrun starts; use tools/dist_train.sh')
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or str(Path('work_dirs', Path(args.config).stem))
    _require_utf8(os.path.abspath(args.config), os.path.abspath(cfg.work_dir))
    return cfg


def _require_utf8(*paths: str) -> None:
    """Raise for paths that are not UTF-8, which logs and the config that mmengine writes cannot contain."""
    for path in paths:
        try:
            path.encode()
        except UnicodeEncodeError as error:
            shown = path.encode('utf-8', 'backslashreplace').decode()
            raise InputError(f'the path {shown} is not UTF-8; rename it, or choose another folder') from error


def parse_size(option: str, text: str | None, separator: str, least: int = 0) -> tuple[int, int] | None:
    """Parse two integers, such as 1333x800; None if the option is not given.

    Raises:
        InputError: the text is something else.
    """
    if text is None:
        return None
    try:
        first, second = map(int, text.lower().split(separator))
    except ValueError:
        raise InputError(f'{option} {text}: expected two whole numbers with {separator!r} between them') from None
    if min(first, second) < least:
        raise InputError(f'{option} {text}: expected numbers from {least} up')
    return first, second
