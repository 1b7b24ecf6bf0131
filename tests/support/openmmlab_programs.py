"""Run programs one after the other, each in a process in which OpenMMLab is imported and swin_mm is not.

``python openmmlab_programs.py`` reads a JSON list of [name, file, arguments...] from standard input. Each program runs
as ``python FILE ARGUMENTS`` would, in a fork of this process, which has imported the libraries: importing them takes
longer than most programs. What it prints goes to ``NAME.txt``, and its exit code is printed here as JSON, by name.
"""

import json
import os
import sys
import traceback
from pathlib import Path


def main() -> None:
    """Run all programs and print their exit codes."""
    import matplotlib

    matplotlib.use('agg')
    import mmdet.apis
    import mmengine.runner.runner
    import mmseg.apis
    import torch

    mmengine.runner.runner.collect_env = dict  # asks compilers for their versions, which takes seconds
    torch.set_num_threads(1)  # a forked process has none of this one's other threads
    assert mmdet.apis and mmseg.apis and 'swin_mm' not in sys.modules
    codes = {}
    for name, *argv in json.load(sys.stdin):
        child = os.fork()
        if not child:
            run(name, argv)
        codes[name] = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    print(json.dumps(codes))


def run(name: str, argv: list[str]) -> None:
    """Run a program in this process, which ends with it."""
    output = os.open(f'{name}.txt', os.O_WRONLY | os.O_CREAT)
    os.dup2(output, 1)
    os.dup2(output, 2)
    sys.argv = argv
    sys.path[0] = str(Path(argv[0]).parent)
    code = 1
    try:
        exec(compile(Path(argv[0]).read_text(), argv[0], 'exec'), {'__name__': '__main__', '__file__': argv[0]})
        code = 0
    except SystemExit as error:
        code = error.code if isinstance(error.code, int) else int(bool(error.code))
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


if __name__ == '__main__':
    main()
