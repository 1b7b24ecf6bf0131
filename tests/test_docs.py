"""Run every command and snippet of the documentation, on tiny data in the documented layouts and with tiny models.

Each runs in its own folder and in a process forked from this one, which has imported everything already. A command
that no rule below covers fails.
"""

import ast
import gc
import glob
import importlib
import json
import multiprocessing
import os
import re
import runpy
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from functools import cache
from itertools import chain, pairwise
from pathlib import Path
from pkgutil import resolve_name
from typing import NamedTuple

import cv2
import mmengine.runner.runner
import numpy as np
import pytest
import torch
import yapf.yapflib.yapf_api
from mmengine.config import Config
from mmengine.device import get_device
from mmengine.optim import build_optim_wrapper
from mmengine.registry import MODELS, init_default_scope
from support.tool_fixtures import ROOT, make_data

from swin_mm import cli
from swin_mm.checkpoints.files import current_address
from swin_mm.models.swin import ARCHS, SwinPyramid
from swin_mm.openmmlab import config
from swin_mm.openmmlab.config import iter_dicts
from swin_mm.utils.environment import SCOPES, require

PAGES = [ROOT / 'README.md', ROOT / 'CONTRIBUTING.md', *sorted((ROOT / 'docs').rglob('*.md'))]
NOT_RUN = {
    r'make (demo|test|setup)\b': 'sets up the environment that this test runs in',
    r'(MMCV_WITH_OPS=1 )?pip install ': 'changes the environment; tests/test_packaging.py checks what is installed',
    r'\. \.venv/bin/activate': 'the tests run in it',
    r'mkdir -p \S+ && ln -s ': "links the reader's own folders; the data is in place already",
    r'MM(DET|SEG)=|python \$MM(DET|SEG)/': 'tools of mmdet and mmseg; see tests/openmmlab/test_openmmlab_tools.py',
    r'mim ': 'needs openmim; see .ci/check_packages.py',
    r'docker ': 'cannot run here; tests/test_packaging.py compares its commands with the documented ones',
    r'python tools/demo\.py ': 'takes minutes; see tests/tools/test_demo.py',
    r'python tools/(quantize|fp16_nodes)\.py ': 'takes minutes; see tests/analysis/test_quantization.py',
    r'python tools/(predict|test)\.py .*\.(onnx|xml)\b': 'needs an exported file; see tests/analysis/test_runtime.py',
    r'python -m benchmarks.exported\b': 'takes minutes',
    r'python tools/export\.py ': 'takes up to a minute; see tests/tools/test_export.py. Its arguments are parsed below',
    r'python -m benchmarks\.': 'takes half a minute, and decides how Triton is imported; see tests/benchmarks',
}
QUICK = {'benchmark.py': ['--quick', '--device', 'cpu']}
SLOW = r'--preset (models|gpu)'
FENCED = re.compile(r'^ *```(.*?)\n(.*?)^ *```$', re.DOTALL | re.MULTILINE)
STARTS_COMMANDS = re.compile(r'(\w+=\S+ )*(python|pip|make|git|cd|mkdir|ln|\.|tools/\w+\.sh) ')
# Blocks without a language that are not commands.
OUTPUTS = ('Swin weights, official naming:', '                Swin from random weights', 'swin_mm/\n')
ARCH = {'embed_dims': 24, 'depths': (1, 1, 1, 1), 'num_heads': (1, 1, 2, 2)}
WEIGHTS = 'swin_tiny_patch4_window7_224.pth'

on_cpu = pytest.mark.skipif(get_device() != 'cpu', reason='a process that has used a GPU cannot be forked')


# Reading the pages


class Piece(NamedTuple):
    """A command or a block, and its position."""

    page: str
    line: int
    text: str

    def __str__(self) -> str:
        return f'{self.page}:{self.line} {self.text[:70]}'


def blocks() -> Iterator[tuple[str, Piece]]:
    """Every fenced block and its language."""
    for page in PAGES:
        text = page.read_text()
        for found in FENCED.finditer(text):
            yield (
                found[1],
                Piece(str(page.relative_to(ROOT)), text.count('\n', 0, found.start(2)) + 1, found[2].rstrip()),
            )


def prose(page: Path) -> str:
    """A page without its fenced blocks."""
    return FENCED.sub('', page.read_text())


def commands() -> list[Piece]:
    """Every command, once."""
    found: dict[str, Piece] = {}
    for language, block in blocks():
        if language == 'sh' or (not language and STARTS_COMMANDS.match(block.text)):
            parts: list[str] = []
            for number, line in enumerate(block.text.splitlines(), start=block.line):
                parts.append(line.removesuffix('\\'))
                if line.endswith('\\'):
                    continue
                text = re.sub(r'(^|\s+)#.*', '', ' '.join(' '.join(parts).split()))
                if text:
                    found.setdefault(text, Piece(block.page, number + 1 - len(parts), text))
                parts = []
    return list(found.values())


def not_run(command: Piece) -> bool:
    return any(re.match(pattern, command.text) for pattern in NOT_RUN)


COMMANDS = commands()
PYTHON = [block for language, block in blocks() if language == 'python']


def is_config(block: Piece) -> bool:
    return all(isinstance(statement, ast.Assign) for statement in ast.parse(block.text).body)


def each(pieces: list[Piece]) -> pytest.MarkDecorator:
    """One test for each, named by page and line."""
    marked = [pytest.param(p, id=str(p), marks=[pytest.mark.slow] * bool(re.search(SLOW, p.text))) for p in pieces]
    return pytest.mark.parametrize('piece', marked)


def test_every_code_block_has_a_known_kind():
    for language, block in blocks():
        assert language in ('', 'sh', 'python', 'text', 'json'), block
        if language == 'json':
            json.loads(block.text)
        if not language:
            assert STARTS_COMMANDS.match(block.text) or block.text.startswith(OUTPUTS), f'{block}: say ```sh or ```text'
    for pattern in NOT_RUN:
        assert any(re.match(pattern, command.text) for command in COMMANDS), f'no command matches {pattern}'


# The folder that commands run in


@pytest.fixture(scope='module')
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the repository with data in the documented layouts. Imports what the tools import."""
    from mmdet.utils import register_all_modules as import_mmdet
    from mmseg.utils import register_all_modules as import_mmseg

    import_mmdet(init_default_scope=False)
    import_mmseg(init_default_scope=False)
    require(*SCOPES['mmdet'])  # caches which libraries are installed
    from mmdet.datasets import CocoDataset

    folder = tmp_path_factory.mktemp('docs')
    for name in ('configs', 'tools'):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns('__pycache__'))
    made = folder / 'made'
    make_data(made)

    def instances(split: str, images: str, file: str, classes: list[str]) -> None:
        shutil.copytree(made / f'coco/{split}2017', folder / images)
        content = json.loads((made / f'coco/annotations/instances_{split}2017.json').read_text())
        content['categories'] = [{'id': number, 'name': name} for number, name in enumerate(classes, start=1)]
        for annotation in content['annotations']:
            annotation['category_id'] = min(annotation['category_id'], len(classes))
        (folder / file).parent.mkdir(exist_ok=True)
        (folder / file).write_text(json.dumps(content))

    for split in ('train', 'val'):
        coco = f'data/coco/annotations/instances_{split}2017.json'
        instances(split, f'data/coco/{split}2017', coco, list(CocoDataset.METAINFO['classes']))
        for own in ('nuclei', 'mine'):
            instances(split, f'data/{own}/{split}', f'data/{own}/annotations/{split}.json', ['nucleus'])
            masks = folder / f'data/{own}/masks/{split}'
            masks.mkdir(parents=True)
            for image in (folder / f'data/{own}/{split}').iterdir():
                cv2.imwrite(str(masks / f'{image.stem}.png'), np.eye(64, 96, dtype=np.uint8))
        four = folder / f'data/mine16/{split}'
        shutil.copytree(folder / f'data/mine/masks/{split}', folder / f'data/mine16/masks/{split}')
        four.mkdir()
        for image in (folder / f'data/mine/{split}').iterdir():
            pixels = cv2.imread(str(image)).astype(np.uint16) * 257
            cv2.imwrite(str(four / f'{image.stem}.tif'), np.dstack([pixels, pixels[..., 0]]))
        instances(split, f'data/custom/{split}', f'data/custom/annotations/{split}.json', ['cat', 'dog'])
    for semantic in ('data/ade/ADEChallengeData2016', 'data/custom'):
        shutil.copytree(made / 'ade', folder / semantic, dirs_exist_ok=True)
    return folder


def clone(place: Path, folder: Path) -> Path:
    """Link the repository into a folder, and write the configs that pages tell the reader to write."""
    (folder / 'data').mkdir()
    for name in ('configs', 'tools', *(f'data/{path.name}' for path in (place / 'data').iterdir())):
        (folder / name).symlink_to(place / name)
    for block in PYTHON:
        if written := re.match(r'# (\w+\.py)\n', block.text):
            (folder / written[1]).write_text(block.text)
    return folder


@pytest.fixture
def folder(place: Path, tmp_path: Path) -> Iterator[Path]:
    yield clone(place, tmp_path)
    shutil.rmtree(tmp_path)  # or pytest keeps the checkpoints


@pytest.fixture(scope='module')
def runs(place: Path, tmp_path_factory: pytest.TempPathFactory):
    """Train on a config, once; returns the work_dir."""

    @cache
    def run(config: str) -> Path:
        folder = clone(place, tmp_path_factory.mktemp('run'))
        in_process(folder, call, ['tools/train.py', config])
        return folder / 'work_dirs' / Path(config).stem

    return run


def in_process(folder, function, *arguments) -> str:
    """Call a function in a forked process in a folder; returns what it printed."""
    log = folder / 'printed.txt'
    process = multiprocessing.get_context('fork').Process(target=_in_process, args=(folder, function, *arguments))
    process.start()
    process.join(timeout=600)
    process.kill()
    process.join()
    assert process.exitcode == 0, f'exit code {process.exitcode}\n{log.read_text()[-4000:]}'
    return log.read_text()


def _in_process(folder, function, *arguments):
    torch.set_num_threads(1)  # a forked process has none of the parent's other threads
    os.chdir(folder)
    sys.stdout = sys.stderr = Path('printed.txt').open('w', buffering=1)  # noqa: SIM115 (open until the process ends)
    for stream in (1, 2):
        os.dup2(sys.stdout.fileno(), stream)
    function(*arguments)


def call(words, environment=()):
    """Run ``python WORDS`` in this process, with configs made small."""
    os.environ.update(environment)
    read = cli.read_config
    cli.read_config = lambda *arguments: shrink(read(*arguments))
    # These take three quarters of the time: formatting configs for logs, garbage collection, versions of compilers.
    yapf.yapflib.yapf_api.FormatCode = lambda text, **_: (text, True)
    gc.freeze()
    mmengine.runner.runner.collect_env = dict
    if words[0] == '-m':
        words = words[1:]
        name = words[0]
    else:
        sys.path.insert(0, str(Path(words[0]).parent))  # as Python does for a script
        name = module_name(words[0])
    sys.argv = words
    runpy.run_module(name, run_name='__main__')


def module_name(script: str) -> str:
    """tools/train.py -> tools.train."""
    return '.'.join(Path(script).with_suffix('').parts)


def shrink(cfg: Config) -> Config:
    """Make a config small: a tiny Swin, narrow heads, small images, two or three iterations."""
    backbone = cfg.model.backbone
    if 'Swin' not in str(backbone.type):
        return cfg
    channels = backbone.get('in_channels', 3)  # of images
    narrow(cfg.model, (ARCHS[backbone.get('arch', 't')] | backbone)['embed_dims'] // ARCH['embed_dims'])
    backbone.update(ARCH, in_channels=channels)
    if '://' in str(backbone.get('init_cfg')):
        backbone.init_cfg = None
    small = {'scale': (96, 64), 'scales': [(96, 64)], 'crop_size': (64, 64), 'size': (64, 64)}
    for node in iter_dicts(dict(cfg.items())):
        node.update({key: value for key, value in small.items() if isinstance(node.get(key), (list, tuple))})
    for part in ('train', 'val', 'test'):
        cfg[f'{part}_dataloader'].update(num_workers=0, persistent_workers=False)
    cfg.train_dataloader.batch_size = 2
    cfg.default_hooks.logger.interval = 1
    if 'max_iters' in cfg.train_cfg:
        cfg.train_cfg.update(max_iters=2, val_interval=2)
        cfg.default_hooks.checkpoint.interval = 2
    else:
        cfg.train_cfg.update(max_epochs=1, val_interval=1)
    return cfg


def narrow(node, factor: int) -> None:
    """Divide all channels in a model by a factor."""
    for key, value in list(node.items() if isinstance(node, dict) else enumerate(node)):
        if isinstance(value, dict) or (isinstance(value, list) and value and isinstance(value[0], dict)):
            narrow(value, factor)
        elif isinstance(key, str) and re.fullmatch(r'((fc_|conv_)?out_|in_|feat_)?channels', key) and value != 3:
            node[key] = value // factor if isinstance(value, int) else [channels // factor for channels in value]


# Files that commands need and write


def prepare(words: list[str], folder: Path, runs) -> list[str]:
    """Create the user's files that a command names; returns the command with files instead of URLs."""
    result = words[:1]
    for before, word in pairwise(words):
        key, equals, value = word.rpartition('=')
        if before not in WRITES:
            value = provide(value.replace('...', Path(words[1]).stem), words[1], folder, runs)
        result.append(key + equals + value)
    return result


WRITES = ('--out', '--show-dir', '--work-dir')


def provide(name: str, config: str, folder: Path, runs) -> str:
    """Create the file of that name unless it exists; returns the name to use."""
    path = folder / name
    if path.exists() or '::' in name or name.startswith(('configs/', 'tools/', 'data/')):
        return name  # a missing file of the repository must be noticed
    if '://' in name:
        assert name in published(), 'no installed library lists this file'
        path = folder / 'downloaded.pth'
        shutil.copy(next(runs(config).glob('*_[0-9]*.pth')), path)
        return str(path)
    trained = f'{(path.parent if path.suffix else path).name}.py'
    configs = chain(ROOT.glob(f'configs/*/{glob.escape(trained)}'), folder.glob(glob.escape(trained)))
    if made_by := next(configs, None):
        work_dir = folder / name if not path.suffix else path.parent
        shutil.copytree(runs(os.path.relpath(made_by, ROOT if made_by.is_relative_to(ROOT) else folder)), work_dir)
        if path.suffix:
            train = Config.fromfile(made_by).train_cfg
            last = f'epoch_{train.max_epochs}.pth' if 'max_epochs' in train else f'iter_{train.max_iters}.pth'
            assert path.name == last, f'training ends with {last}'
            next(work_dir.glob('*_[0-9]*.pth')).rename(path)
    elif path.suffix == '.pth':
        torch.save({'model': SwinPyramid(**ARCH).state_dict()}, path)
    elif path.suffix == '.py':
        path.write_text("_base_ = 'mmdet::atss/atss_r50_fpn_1x_coco.py'\n")
    elif path.suffix == '.mp4':
        video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*'mp4v'), 25, (96, 64))
        video.write(np.zeros((64, 96, 3), np.uint8))
        video.release()
    elif name == 'photos':
        shutil.copytree(folder / 'data/coco/val2017', path)
    elif path.suffix == '.jpg':
        shutil.copy(folder / 'data/coco/val2017/1.jpg', path)
    return name


@cache
def published() -> str:
    """The URLs of checkpoints in the libraries' metafiles, on the hosts of today."""
    folders = [Path(resolve_name(name).__file__).parent / '.mim/configs/swin' for name in ('mmdet', 'mmseg')]
    return '\n'.join(
        current_address(word)
        for folder in folders
        for file in folder.glob('metafile.y*ml')
        for word in file.read_text().split()
    )


def launched(words: list[str]) -> list[str]:
    """The command line of the tool that a launch script starts in each process."""
    done = subprocess.run(
        ['bash', *words], cwd=ROOT, env=os.environ | {'PYTHON': 'echo'}, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    started = shlex.split(done.stdout)
    tool = next(i for i, word in enumerate(started) if word.endswith('.py'))
    assert started[-2:] == ['--launcher', 'pytorch']
    return started[tool:-2]


@on_cpu
@each([command for command in COMMANDS if not not_run(command)])
def test_commands_run(piece, folder, runs):
    words = shlex.split(piece.text)
    first = next(i for i, word in enumerate(words) if not re.match(r'[A-Z_]+=', word))
    environment, words = dict(word.split('=', 1) for word in words[:first]), words[first:]
    if re.fullmatch(r'tools/\w+\.sh', words[0]):
        words = launched(words)
    else:
        assert words[0] == 'python', f'{piece}: add a way to run this to tests/test_docs.py, or the reason not to'
        words = words[1:]
    words = prepare(words, folder, runs)
    if '--resume' in words:
        provide(f'work_dirs/{Path(words[1]).stem}', words[1], folder, runs)
    printed = in_process(folder, call, words + QUICK.get(Path(words[0]).name, []), environment)
    assert 'is not in the config' not in printed, printed
    assert '--resume' not in words or 'resumed epoch' in printed, printed
    for option, name in pairwise(words):
        assert option not in WRITES or (folder / name).exists(), f'{name} was not written'


def test_documented_layouts_match_the_data_that_commands_run_on(place):
    described = set()
    for _, block in blocks():
        root, *entries = block.text.split()
        if re.fullmatch(r'data/[\w/]+/', root) and (place / root).exists():
            described.add(root)
            for entry in entries:
                if '/' in entry:
                    assert any(place.glob(str(Path(root, entry).with_suffix('.*')))), f'{block}: {entry}'
    assert described == {'data/coco/', 'data/ade/ADEChallengeData2016/', 'data/custom/', 'data/mine/'}


@on_cpu
@each([command for command in COMMANDS if 'export.py' in command.text])
def test_arguments_of_exports_parse(piece, folder):
    in_process(folder, read_arguments, shlex.split(piece.text)[1:])


def read_arguments(words):
    """Parse the command line and read the config."""
    sys.argv = words
    tool = importlib.import_module(module_name(words[0]))
    cli.read_config(tool.parse_args())


# Python


@each([block for block in PYTHON if is_config(block)])
def test_configs_build(piece, tmp_path):
    # A snippet that is not a whole config changes one with a Swin.
    base = (
        '' if '_base_' in piece.text else f"_base_ = '{ROOT}/configs/mask_rcnn/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'\n"
    )
    (tmp_path / 'config.py').write_text(base + piece.text)
    cfg = Config.fromfile(tmp_path / 'config.py')
    for node in iter_dicts(dict(cfg.items())):
        if str(node.get('type')).startswith('swin_mm.'):
            resolve_name(node.type)
    init_default_scope(cfg.default_scope)
    with torch.device('meta'):
        model = MODELS.build(cfg.model)
    assert isinstance(model.backbone, SwinPyramid)
    build_optim_wrapper(model, cfg.optim_wrapper)


@on_cpu
@each([block for block in PYTHON if not is_config(block)])
def test_python_runs(piece, folder, runs):
    if piece.page in ('docs/export.md', 'docs/openmmlab_tools.md') or 'from_pretrained(' in piece.text:
        ast.parse(piece.text)  # it reads files that tests of tools write, and run so
        return
    for name in re.findall(r"'([\w/.-]+\.pth)'", piece.text):
        if name == WEIGHTS:
            torch.save({'model': SwinPyramid(**ARCHS['t']).state_dict()}, folder / name)
        provide(name, '', folder, runs)
    if 'data/mine' in piece.text:
        (folder / 'data/mine').unlink()  # the snippet makes it
    in_process(folder, execute, piece.text)


def execute(text):
    """Run a snippet with configs made small."""
    importlib.import_module('swin_mm.openmmlab.plug')  # first: it reads configs back, which must not be made small
    load = config.load_config
    config.load_config = lambda name: shrink(load(name))
    exec(text, {})


def test_every_public_module_is_on_an_api_page():
    pages = '\n'.join(page.read_text() for page in (ROOT / 'docs/api').glob('*.md'))
    named = re.findall(r'^::: (swin_mm[\w.]*)$', pages, re.MULTILINE)
    for name in named:
        importlib.import_module(name)
    for path in sorted((ROOT / 'swin_mm').glob('*/**/*.py')):
        module = module_name(str(path.relative_to(ROOT))).removesuffix('.__init__')
        public = not any(part.startswith('_') for part in module.split('.'))
        only_a_docstring = len(ast.parse(path.read_text()).body) == 1
        if '.mim' not in path.parts and public and not only_a_docstring:
            assert any(module == name or module.startswith(name + '.') for name in named), module


# Prose


@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_of_pages_resolve(page):
    for target in re.findall(r'\]\(([^)]+)\)', prose(page)):
        path, _, anchor = target.partition('#')
        if '://' in target:
            continue
        file = page.parent / path if path else page
        assert file.exists(), target
        headings = re.findall(r'^#+ (.+)', file.read_text(), re.MULTILINE) if anchor else ()
        slugs = [re.sub(r'[^\w -]', '', heading.lower()).replace(' ', '-') for heading in headings]
        assert not anchor or anchor in slugs, target


@on_cpu
@pytest.mark.parametrize('page', PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_and_options_named_in_prose_exist(page, folder):
    for span in re.findall(r'`([^`\n]+)`', prose(page)):
        words = span.split()
        for word in words:
            path = re.fullmatch(r'(configs|tools|tests|swin_mm|docs)/[\w./-]+', word)
            assert not path or re.search(r'\.\.\.|NAME|METHOD', word) or (ROOT / word).exists(), span
        tool = next((word for word in words if re.fullmatch(r'tools/(?!NAME)\w+\.(py|sh)', word)), None)
        for option in words if tool else ():
            if option.startswith('--'):
                assert re.search(rf'{option}\b', help_of(tool, folder)), span


HELP: dict[str, str] = {}


def help_of(tool: str, folder: Path) -> str:
    """The output of ``--help``; for a launch script, of the tool that it starts."""
    tool = re.sub(r'(dist|slurm)_(\w+)\.sh', r'\2.py', tool)
    if tool not in HELP:
        HELP[tool] = in_process(folder, call, [tool, '--help'])
    return HELP[tool]


def test_messages_in_troubleshooting_are_in_the_sources():
    known = '\n'.join(
        text
        for source in ('swin_mm/**/*.py', 'tools/*.py')
        for path in ROOT.glob(source)
        for text in literals(ast.parse(path.read_text()))
    )
    checked = 0
    for table in (ROOT / 'docs/troubleshooting.md').read_text().split('\n\n'):
        if not table.startswith(('| message |', '| message of the doctor')):
            continue
        for row in table.splitlines()[2:]:
            for message in re.findall(r'`([^`]+)`', row.split(' | ')[0]):
                for part in message.split('...'):
                    assert part.strip() in known, f'{part!r} of {message!r}'
                checked += 1
    assert checked > 30


def literals(tree: ast.AST) -> Iterator[str]:
    """Every string literal of a program, with NUL where values are formatted in."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value
        elif isinstance(node, ast.JoinedStr):
            yield '\0'.join(part.value if isinstance(part, ast.Constant) else '' for part in node.values)
