"""Install mmcv with its compiled ops: python .ci/install_mmcv.py LOG [--package onedl-mmcv] [pip arguments].

A prebuilt wheel is used where one fits, otherwise mmcv is built from source. Does nothing if a working mmcv is
installed. pip does the work, so that an interrupted installation leaves nothing behind.

MMCV_WHEELS says where wheels are: a folder, the address of a page with links or of an index (which ends in /simple), or
`none` to build in any case. By default, onedl's index is asked for the combinations that it has.
"""

import os
import re
import subprocess
import sys
import tempfile
import time
from argparse import ArgumentParser
from pathlib import Path

# Prebuilt wheels of onedl-mmcv, as of June 2026; one index for each version and build of torch. docs/get_started.md
# shows the same table.
WHEELS = 'https://mmwheels.onedl.ai/{build}-torch{torch}/simple'
WHEEL_PYTHONS = ('3.10', '3.12')
WHEEL_TORCHES = ('2.4.1', '2.8.0', '2.9.0', '2.10.0', '2.12.0')
WHEEL_TIMEOUT = 10  # seconds without an answer

SHOW_EVERY = 15  # seconds
STEP = re.compile(r'\[(\d+)/(\d+)\] ')
REBUILD = ['--force-reinstall', '--no-deps', '--no-cache-dir']
# Run by the Python that mmcv is installed for.
DESCRIBE = """
import platform, torch
from pathlib import Path
print('.'.join(platform.python_version_tuple()[:2]))
print(torch.__version__.partition('+')[0])
print('cu' + torch.version.cuda.replace('.', '') if torch.version.cuda else 'cpu')
headers = Path(torch.__file__).parent / 'include/ATen/ATen.h'
print('-std=c++20' if headers.exists() and '202002L' in headers.read_text() else '-std=c++17')
"""


def main() -> int:
    """Install mmcv unless it works; returns an exit code."""
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument('log', type=Path, help="file for pip's output")
    parser.add_argument(
        '--package', default='onedl-mmcv', help='the distribution, such as mmcv==2.1.0 (default: %(default)s)'
    )
    args, pip_arguments = parser.parse_known_args()
    if works():
        return 0
    describe = subprocess.run([sys.executable, '-c', DESCRIBE], check=True, capture_output=True, text=True)
    python, torch, build, std = describe.stdout.split()
    source, reason = wheel_source(os.environ.get('MMCV_WHEELS', ''), args.package, python, torch, build)
    if source:
        print(f'looking for a prebuilt wheel of {args.package} ({reason})', flush=True)
        if install_wheel(args.log, args.package, source, pip_arguments):
            print('  installed; nothing to compile')
            return 0
        reason = f'the wheel could not be installed, or does not work here; see {args.log}'
    print(f'building {args.package} from source: {reason}', flush=True)
    return build_from_source(args.log, args.package, std, pip_arguments)


def wheel_source(chosen: str, package: str, python: str, torch: str, build: str) -> tuple[list[str], str]:
    """Return pip's arguments that name the source of wheels, if there is one, and the reason.

    Args:
        chosen: the value of MMCV_WHEELS.
        package: the distribution.
        python: 3.12.
        torch: 2.8.0.
        build: cpu, or the version of CUDA that torch is built for, such as cu128.
    """
    if chosen == 'none':
        return [], 'MMCV_WHEELS=none'
    if chosen:
        option = '--extra-index-url' if chosen.rstrip('/').endswith('/simple') else '--find-links'
        return [option, chosen], f'MMCV_WHEELS={chosen}'
    have = f'torch {", ".join(WHEEL_TORCHES)} with Python {" or ".join(WHEEL_PYTHONS)}'
    if not package.startswith('onedl-mmcv'):
        return [], f'there are no wheels of {package}'
    if python not in WHEEL_PYTHONS or torch not in WHEEL_TORCHES:
        return [], f'wheels exist for {have}; this is torch {torch} with Python {python}'
    index = WHEELS.format(build=build, torch=torch.replace('.', ''))
    return ['--extra-index-url', index], f'they exist for {have}; MMCV_WHEELS=none builds from source instead'


def install_wheel(log: Path, package: str, source: list[str], pip_arguments: list[str]) -> bool:
    """Install a wheel; whether it works."""
    # A wheel that an earlier run built for another torch has the same name: none from the cache.
    options = ['--only-binary', re.split('[=<>~!]', package)[0], '--timeout', str(WHEEL_TIMEOUT), '--retries', '0']
    with log.open('w') as file:
        done = subprocess.run([*pip(package), *options, *source, *pip_arguments], stdout=file, stderr=subprocess.STDOUT)
    if done.returncode == 0 and works():
        return True
    if done.returncode == 0:
        subprocess.run([sys.executable, '-m', 'pip', 'uninstall', '-qy', re.split('[=<>~!]', package)[0]])
    return False


def build_from_source(log: Path, package: str, std: str, pip_arguments: list[str]) -> int:
    """Build and install; returns an exit code."""
    # A wheel in pip's cache may have been built against another torch. In that case, build it again.
    for attempt in ([], REBUILD):
        arguments = ['-v', '--no-build-isolation', *pip_arguments, *attempt]
        with tempfile.TemporaryDirectory(prefix='mmcv-') as folder:
            code = install(log, [*pip(package), *arguments], {'MMCV_PRECOMPILED': folder, 'MMCV_STD': std})
        if code:
            print(f'\nmmcv could not be built. The end of {log}:\n')
            print('\n'.join(log.read_text(errors='replace').splitlines()[-40:]))
            return code
        if works():
            return 0
    print(f'mmcv was built, but its compiled ops do not load; see {log} and run: python -c "import torch, mmcv._ext"')
    return 1


def pip(package: str) -> list[str]:
    """The beginning of the command."""
    return [sys.executable, '-m', 'pip', 'install', package]


def works() -> bool:
    """Whether the compiled ops load; tried in a new process, because a broken library may crash it."""
    return subprocess.run([sys.executable, '-c', 'import torch, mmcv._ext'], capture_output=True).returncode == 0


def install(log: Path, command: list[str], settings: dict[str, str]) -> int:
    """Run pip; print a line of progress now and then and write the full output to ``log``."""
    jobs = os.environ.get('MAX_JOBS') or str(os.cpu_count())
    print(f'  {jobs} jobs, about 5 CPU minutes, once; full log in {log}', flush=True)
    begin = shown = time.monotonic()
    environment = os.environ | {'MMCV_WITH_OPS': '1', 'MAX_JOBS': jobs} | settings
    environment.setdefault('CXX', str(Path(__file__).with_name('mmcv-g++')))
    with (
        log.open('w') as file,
        subprocess.Popen(
            command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors='replace'
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
