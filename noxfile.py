"""Run the tests with other versions of torch and OpenMMLab, each in an environment of its own.

    pip install nox
    nox                                      all sessions
    nox -s lowest -- tests/ops -x            one of them, with arguments for pytest
    nox -s original --install-only           only create its environment, .nox/original

Environments are reused; `nox -r` does not even look for newer packages. mmcv is built in each of them unless a prebuilt
wheel fits, see .ci/install_mmcv.py. Set PIP_EXTRA_INDEX_URL to the index of PyTorch's CPU builds, as the workflow does,
to save several GB of CUDA libraries.
"""

from pathlib import Path

import nox

nox.options.reuse_existing_virtualenvs = True
nox.options.error_on_missing_interpreters = True

# OpenMMLab's two lines of distributions: mmcv, what else the tests need, what stays outside of the environment (see
# tests/support/reference_models.py), and requirements.
ONEDL = ('onedl-mmcv', ['onedl-mmengine', 'onedl-mmdetection', 'onedl-mmsegmentation'], 'onedl-mmpretrain', [])
ORIGINAL = (
    'mmcv==2.1.0',
    ['mmengine==0.10.7', 'mmdet==3.3.0', 'mmsegmentation==1.2.2', 'ftfy', 'regex'],  # mmseg needs the last two
    'mmpretrain==1.2.0',
    ['numpy<2', 'opencv-python<4.12', 'opencv-python-headless<4.12'],  # later builds of OpenCV need numpy 2
)
# Pins of constraints.txt that hold for the newest versions only.
NOT_PINNED = (
    'torch',
    'torchvision',
    'torchao',
    'triton',
    'numpy',
    'setuptools',
    'opencv-python',
    'opencv-python-headless',
)


# mmdet imports transformers, which from 5 on does not import beside torch 2.4.
OLD_TORCH = ['transformers<5']
# transformers and peft import torchao, which from 0.18 on needs torch 2.10; peft needs 0.16.
MIDDLE_TORCH = ['torchao<0.17']


@nox.session(python='3.10')
def lowest(session: nox.Session) -> None:
    """The lowest supported version of torch."""
    run_tests(session, ONEDL, OLD_TORCH, torch='2.4.1', torchvision='0.19.1')


@nox.session(python='3.12')
def middle(session: nox.Session) -> None:
    """A version for which there are wheels of mmcv."""
    run_tests(session, ONEDL, MIDDLE_TORCH, torch='2.8.0', torchvision='0.23.0')


@nox.session(python='3.13')
def newest(session: nox.Session) -> None:
    """The newest version of torch."""
    run_tests(session, ONEDL, [], torch='2.15.0', torchvision='0.29.2')


@nox.session(python='3.10')
def original(session: nox.Session) -> None:
    """The original distributions of OpenMMLab."""
    run_tests(session, ORIGINAL, OLD_TORCH, torch='2.4.1', torchvision='0.19.1')


def run_tests(
    session: nox.Session,
    line: tuple[str, list[str], str, list[str]],
    requirements: list[str],
    torch: str,
    torchvision: str,
) -> None:
    """Install what the tests need, and run them."""
    mmcv, openmmlab, mmpretrain, of_line = line
    requirements = [*requirements, *of_line]
    folder = Path(session.virtualenv.location)
    constraints = folder / 'constraints.txt'
    pins = (line for line in Path('constraints.txt').read_text().splitlines() if '==' in line)
    pins = [pin for pin in pins if pin.partition('==')[0] not in NOT_PINNED]
    constraints.write_text('\n'.join([*pins, f'torch=={torch}', 'setuptools<82', *requirements]))
    pip = ('-c', str(constraints))

    session.install(*pip, 'torch', 'numpy', 'setuptools', 'wheel', 'ninja')
    session.run_install('python', '.ci/install_mmcv.py', folder / 'mmcv.log', '--package', mmcv, *pip)
    session.install(*pip, '--no-build-isolation', '-e', '.[dev]', *openmmlab)
    headless = [name for name in requirements if 'headless' in name] or ['opencv-python-headless']
    session.install('--force-reinstall', '--no-deps', *headless)  # needs no display
    oracles = (f'torchvision=={torchvision}', 'timm', mmpretrain, 'peft', 'accelerate', 'psutil', 'torchao')
    session.install(*pip, '--no-deps', '--upgrade', '--target', str(folder / 'oracles'), *oracles)
    session.run('python', '-m', 'swin_mm.doctor')
    session.run('python', '-m', 'pytest', *session.posargs, env={'OMP_NUM_THREADS': '1'})
