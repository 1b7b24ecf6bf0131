"""Build mmcv and its compiled ops from source and show the progress: python .ci/install_mmcv.py LOG [pip arguments].

Does nothing if a working mmcv is installed. pip does the build, so an interrupted one leaves nothing behind.
"""

import os
import re
import subprocess
import sys
import time
from pathlib import Path

SHOW_EVERY = 15  # seconds
STEP = re.compile(r'\[(\d+)/(\d+)\] ')
REBUILD = ['--force-reinstall', '--no-deps', '--no-cache-dir']


def main() -> int:
    """Install mmcv unless it works; returns pip's exit code."""
    log, arguments = Path(sys.argv[1]), sys.argv[2:]
    if works():
        return 0
    # A wheel in pip's cache may have been built against another torch. In that case, build it again.
    for attempt in ([], REBUILD):
        if code := install(log, [*arguments, *attempt]):
            print(f'\nmmcv could not be built. The end of {log}:\n')
            print('\n'.join(log.read_text(errors='replace').splitlines()[-40:]))
            return code
        if works():
            return 0
    print(f'mmcv was built, but its compiled ops do not load; see {log} and run: python -c "import torch, mmcv._ext"')
    return 1


def works() -> bool:
    """Whether the compiled ops load; tried in a new process, because a broken library may crash it."""
    return subprocess.run([sys.executable, '-c', 'import torch, mmcv._ext'], capture_output=True).returncode == 0


def install(log: Path, arguments: list[str]) -> int:
    """Run pip; print a line of progress now and then and write the full output to ``log``."""
    jobs = os.environ.get('MAX_JOBS') or str(os.cpu_count())
    print(f'installing mmcv from source with {jobs} jobs (about 25 CPU minutes, once); full log in {log}', flush=True)
    begin = shown = time.monotonic()
    pip = [sys.executable, '-m', 'pip', 'install', '-v', '--no-build-isolation', 'onedl-mmcv', *arguments]
    environment = os.environ | {'MMCV_WITH_OPS': '1', 'MAX_JOBS': jobs}
    with (
        log.open('w') as file,
        subprocess.Popen(
            pip, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors='replace'
        ) as process,
    ):
        for line in process.stdout:
            file.write(line)
            file.flush()
            now = time.monotonic()
            if (step := STEP.search(line)) and (now - shown >= SHOW_EVERY or step[1] == step[2]):
                done, total = map(int, step.groups())
                left = (now - begin) * (total - done) / done
                print(f'  {done} of {total} files, {clock(now - begin)} so far, about {clock(left)} left', flush=True)
                shown = now
    print(f'  pip finished after {clock(time.monotonic() - begin)}', flush=True)
    return process.returncode


def clock(seconds: float) -> str:
    """Format seconds as minutes:seconds."""
    return f'{int(seconds) // 60}:{int(seconds) % 60:02d} min'


if __name__ == '__main__':
    sys.exit(main())
