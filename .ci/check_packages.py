"""Build the sdist and the wheel, install them into empty environments, and use them there as a stranger would.

    python .ci/check_packages.py core det all

builds in isolation, from a copy of the sources. ``core`` installs the wheel alone, ``det`` and ``all`` with that extra,
each into a new virtual environment, away from the repository; ``all`` tries mim, too. Each trains a step and predicts.
Every command is printed with the time that it took: minutes in sum, and more where pip has to compile mmcv.
"""

import argparse
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).parents[1]
CONSTRAINTS = ['-c', str(ROOT / 'constraints.txt')]
IGNORED = (
    '.git',
    '.venv*',
    '.*_cache',
    '__pycache__',
    'work_dirs',
    'build',
    'dist',
    'site',
    '*.egg-info',
    '*.so',
    'data',
)
SMALL = [
    *('--cfg-options', 'train_dataloader.batch_size=2', 'train_dataloader.dataset.indices=2'),
    *('val_dataloader.dataset.indices=1', 'test_dataloader.dataset.indices=1'),
]
STEP = """
import torch
from swin_mm.models.swin import SwinPyramid
from swin_mm.ops.attention import cpu
model = SwinPyramid()
optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
image = torch.rand(1, 3, 224, 224)
loss = sum(m.square().mean() for m in model(image))
loss.backward()
optimizer.step()
with torch.no_grad():
    print('loss', loss.item(), 'maps', [tuple(m.shape) for m in model.eval()(image)])
"""
CONFIGS = {
    'detector': """
_base_ = 'swin_mm::nuclei/mask-rcnn_swin-nano_fpn_nuclei.py'
train_cfg = dict(max_epochs=1, val_interval=1)
""",
    'segmentor': """
_base_ = 'swin_mm::nuclei/upernet_swin-nano_nuclei.py'
train_cfg = dict(max_iters=1, val_interval=1)
default_hooks = dict(checkpoint=dict(interval=1))
""",
}
LAST = {'detector': 'epoch_1.pth', 'segmentor': 'iter_1.pth'}


def run(*command: str | Path, cwd: Path, show: int = 6) -> str:
    """Run a command outside of the repository; print it, the last lines of its output, and its time."""
    words = [str(word) for word in command]
    print('$', ' '.join(word if word.isprintable() else "'...'" for word in words), flush=True)
    environment = {key: value for key, value in os.environ.items() if not key.startswith('PYTHON')}
    begin = time.monotonic()
    done = subprocess.run(words, cwd=cwd, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
    lines = done.stdout.rstrip().splitlines()
    print(*(f'    {line}' for line in lines[-(show if not done.returncode else 60) :]), sep='\n')
    print(f'  ({time.monotonic() - begin:.0f} s)', flush=True)
    if done.returncode:
        sys.exit(f'exit code {done.returncode}: {" ".join(words)}')
    return done.stdout


def environment(folder: Path) -> Path:
    """Make a virtual environment; returns its Python."""
    run(sys.executable, '-m', 'venv', folder, cwd=folder.parent)
    return folder / 'bin/python'


def build(work: Path) -> Path:
    """Build in isolation from a copy of the sources; returns the wheel."""
    source = work / 'source'
    shutil.copytree(ROOT, source, symlinks=True, ignore=shutil.ignore_patterns(*IGNORED))
    python = environment(work / 'build')
    run(python, '-m', 'pip', 'install', '-q', 'build', cwd=work)
    run(python, '-m', 'build', '--outdir', work / 'dist', source, cwd=work, show=1)
    shutil.rmtree(source)
    (wheel,) = (work / 'dist').glob('*.whl')
    return wheel


def doctor(python: Path, cwd: Path) -> None:
    """Run the doctor, which must say whether the compiled kernel works."""
    text = run(python, '-m', 'swin_mm.doctor', cwd=cwd, show=60)
    row = next(line for line in text.splitlines() if 'attention kernel for CPUs' in line)
    assert 'works' in row or 'the attention kernel for CPUs cannot be used' in text, row


def try_core(work: Path, wheel: Path) -> None:
    """The wheel alone: the plain model."""
    python, cwd = environment(work / 'core'), work / 'core'
    run(python, '-m', 'pip', 'install', '-q', *CONSTRAINTS, wheel, cwd=cwd)
    doctor(python, cwd)
    run(python, '-c', STEP, cwd=cwd)


def try_extra(work: Path, wheel: Path, extra: str) -> None:
    """The wheel with an extra, as in docs/get_started.md: train, test and predict from configs of the wheel."""
    python, cwd = environment(work / extra), work / extra
    pip = [python, '-m', 'pip', 'install', '-q', *CONSTRAINTS]
    run(*pip, 'torch', 'numpy', 'setuptools', 'wheel', 'ninja', cwd=cwd)
    run('env', 'MMCV_WITH_OPS=1', *pip, '--no-build-isolation', 'onedl-mmcv', cwd=cwd)
    run(*pip, f'{wheel}[{extra}]', cwd=cwd)
    # For machines without libGL.
    run(*pip, '--force-reinstall', '--no-deps', 'opencv-python-headless', cwd=cwd)
    doctor(python, cwd)
    where = run(python, '-c', 'import swin_mm; print(swin_mm.__path__[0])', cwd=cwd).splitlines()[-1]
    assert Path(where).is_relative_to(cwd), where
    tools = Path(where, '.mim/tools')
    (cwd / 'data').mkdir()
    shutil.copytree(ROOT / 'data/nuclei', cwd / 'data/nuclei')
    for name in CONFIGS if extra == 'all' else ('detector',):
        config = cwd / f'{name}.py'
        config.write_text(CONFIGS[name])
        run(python, tools / 'train.py', config.name, *SMALL, cwd=cwd)
        checkpoint = f'work_dirs/{name}/{LAST[name]}'
        run(python, tools / 'test.py', config.name, checkpoint, *SMALL, cwd=cwd)
        run(python, tools / 'predict.py', config.name, checkpoint, 'data/nuclei/val/02a.jpg', '--out', name, cwd=cwd)
        assert any((cwd / name / 'vis').iterdir())
    if extra == 'all':
        try_mim(python, cwd)


def try_mim(python: Path, cwd: Path) -> None:
    """Let mim find configs and tools in the wheel; its own tools for data sets are left out."""
    needs = ['click', 'colorama', 'model-index', 'pandas', 'requests', 'rich', 'tabulate', 'pyyaml']
    run(python, '-m', 'pip', 'install', '-q', *CONSTRAINTS, *needs, cwd=cwd)
    run(python, '-m', 'pip', 'install', '-q', '--no-deps', 'openmim', cwd=cwd)
    mim = cwd / 'bin/mim'
    found = run(mim, 'search', 'swin_mm', '--config', 'mask-rcnn_swin-t-p4-w7_fpn_1x_coco', cwd=cwd, show=20)
    assert 'configs/mask_rcnn/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py' in found
    options = ['--gpus', '0', '--work-dir', 'mim_run', *SMALL, 'train_cfg.max_epochs=1', 'train_cfg.val_interval=1']
    run(mim, 'train', 'swin_mm', 'mask-rcnn_swin-nano_fpn_nuclei.py', *options, cwd=cwd)
    run(mim, 'test', 'swin_mm', 'detector.py', '--checkpoint', 'mim_run/epoch_1.pth', '--gpus', '0', *SMALL, cwd=cwd)


def main() -> None:
    """Build once, then try each kind of installation."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument('kinds', nargs='+', choices=['core', 'det', 'seg', 'all'])
    parser.add_argument('--work', type=Path, help='a new folder outside of the repository (default: a temporary one)')
    args = parser.parse_args()
    work = (args.work or Path(tempfile.mkdtemp(prefix='packages-'))).resolve()
    if work.is_relative_to(ROOT):
        parser.error(f'--work {work} is inside the repository, from where its own packages could be imported')
    work.mkdir(parents=True, exist_ok=args.work is None)
    wheel = build(work)
    for kind in args.kinds:
        print(f'\n== {kind}')
        try_core(work, wheel) if kind == 'core' else try_extra(work, wheel, kind)
    print('\nall work')


if __name__ == '__main__':
    main()
