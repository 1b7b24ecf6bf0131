"""What the command-line tools share: arguments, reading the config, exit codes.

Exit codes: 0 success, 1 failure, 2 invalid input, 128 + signal number when interrupted (130 for Ctrl-C).
"""

import os
import sys
import traceback
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from typing import Any

from mmengine.config import Config, DictAction
from mmengine.device import get_device

from swin_mm.openmmlab.config import apply_options, load_config
from swin_mm.utils.errors import CheckpointError, DependencyError, InputError, Stopped


def parser(description: str, runner: bool = True, **kwargs: Any) -> ArgumentParser:
    """The arguments that all tools on a config have, with the names that mmdet and mmseg use.

    Args:
        description: What the tool does.
        runner: Whether it builds mmengine's Runner, which wants a work_dir and a launcher.
        kwargs: More for ArgumentParser.
    """
    result = ArgumentParser(description=description, **kwargs)
    result.add_argument('config', help='config file')
    result.add_argument(
        '--cfg-options',
        nargs='+',
        action=DictAction,
        default={},
        metavar='KEY=VALUE',
        help='change settings of the config: model.backbone.with_cp=True, or lists as key="[a,b]" or key=a,b',
    )
    result.add_argument('--debug', action='store_true', help='show where an error arose')
    if not runner:
        return result
    result.add_argument('--work-dir', help='folder for logs and checkpoints (default: work_dirs/<name of the config>)')
    result.add_argument('--launcher', choices=['none', 'pytorch', 'slurm', 'mpi'], default='none', help='job launcher')
    # torchrun and its forerunners pass the rank by one of these names or in the environment.
    result.add_argument('--local_rank', '--local-rank', type=int, default=0, help='set by the launcher')
    return result


def run(main: Callable[[Namespace], None], args: Namespace) -> int:
    """Call ``main`` and turn what it raises into one line and an exit code.

    An error that is not about the input keeps its traceback: it may come hours into a run.
    """
    try:
        main(args)
    except (InputError, CheckpointError, DependencyError) as error:
        if args.debug:
            traceback.print_exc()
        print(f'error: {error}', file=sys.stderr)
        return 2
    except Stopped as stopped:
        print(stopped, file=sys.stderr)
        return stopped.code
    except KeyboardInterrupt:
        print('stopped at once; nothing was saved by this', file=sys.stderr)
        return 130
    return 0


def read_config(args: Namespace, change: Callable[[Config], Config] = lambda cfg: cfg) -> Config:
    """Read the config that ``parser`` was given, with its options and, for a runner, work_dir and launcher set.

    Args:
        args: what ``parser`` gives.
        change: what happens to the config before its options are set.

    Raises:
        InputError: it is not there or does not read.
        DependencyError: it builds on a library that is absent or broken.
    """
    cfg = change(load_config(args.config))
    for warning in apply_options(cfg, args.cfg_options):
        print(f'warning: {warning}', file=sys.stderr)

    if 'launcher' not in args:
        return cfg
    cfg.launcher = args.launcher
    if args.launcher in ('slurm', 'mpi') and get_device() == 'cpu':
        raise InputError(f'--launcher {args.launcher} needs GPUs and torch sees none; on CPUs use tools/dist_train.sh')
    if args.launcher == 'pytorch' and 'RANK' not in os.environ:
        raise InputError('--launcher pytorch is for processes that torchrun starts; use tools/dist_train.sh')
    os.environ.setdefault('LOCAL_RANK', str(args.local_rank))
    cfg.work_dir = args.work_dir or cfg.get('work_dir') or str(Path('work_dirs', Path(args.config).stem))
    return cfg


def parse_size(option: str, text: str | None, separator: str, least: int = 0) -> tuple[int, int] | None:
    """Two whole numbers that an option gives, such as 1333x800, or None if it is not given.

    Raises:
        InputError: it gives something else.
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
