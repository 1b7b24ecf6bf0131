"""Rules of the code's structure, read from the sources: who imports whom, and which ways are closed.

The order of the packages is explained in "How it is built" of the README.
"""

import ast
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from pkgutil import resolve_name
from typing import NamedTuple

import pytest

ROOT = Path(__file__).parents[1]

# Each package may import itself and the packages before it.
ORDER = ('utils', 'ops', 'models', 'checkpoints', 'openmmlab', 'engine', 'analysis', 'cli', 'tools')
LEVELS = {name: level for level, name in enumerate(ORDER)} | {
    'version': 0,
    'registry': ORDER.index('openmmlab'),
    'doctor': ORDER.index('cli'),
    'benchmarks': ORDER.index('tools'),
}

OURS = ('swin_mm', 'tools', 'benchmarks')

# Private API of other libraries that has no public equivalent on all supported versions, by the file that may use it.
# `test_private_api_exists` fails when one of them is gone.
PRIVATE_API = {
    'benchmarks/count_gpu.py': ['torch.utils._python_dispatch:TorchDispatchMode'],  # documented in PyTorch's notes
    'swin_mm/engine/fsdp.py': ['mmengine._strategy:FSDPStrategy'],
    'swin_mm/models/inference.py': ['torch:_addmm_activation'],  # GELU in the epilogue; with a fallback
    'swin_mm/ops/attention/triton.py': ['torch:_C'],  # for _len_torch_dispatch_stack, with a fallback
    'swin_mm/ops/windows.py': ['torch:_C'],  # for _are_functorch_transforms_active, with a fallback
}


def sources(*folders: str) -> list[Path]:
    """All Python files in some folders of the repository."""
    return [p for folder in folders for p in sorted((ROOT / folder).rglob('*.py')) if '.mim' not in p.parts]


@cache
def parse(path: Path) -> ast.Module:
    return ast.parse(path.read_text())


def module_name(path: Path) -> str:
    return '.'.join(path.relative_to(ROOT).with_suffix('').parts).removesuffix('.__init__')


def is_module(name: str) -> bool:
    path = ROOT / name.replace('.', '/')
    return path.with_suffix('.py').exists() or path.is_dir()


class Import(NamedTuple):
    """One import: ``import a.b`` has bound 'a' and name 'a.b'; ``from a import b as c`` has 'a.b' for both."""

    line: int
    local: str
    bound: str
    name: str


@cache
def imports(path: Path) -> list[Import]:
    """Every import of a file, also inside functions."""
    package = module_name(path).split('.')
    if path.name != '__init__.py':
        package = package[:-1]
    found = []
    for node in ast.walk(parse(path)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                root = alias.name.partition('.')[0]
                found.append(
                    Import(node.lineno, alias.asname or root, alias.name if alias.asname else root, alias.name)
                )
        elif isinstance(node, ast.ImportFrom):
            parents = package[: len(package) - node.level + 1] if node.level else []
            base = '.'.join([*parents, *([node.module] if node.module else [])])
            for alias in node.names:
                name = f'{base}.{alias.name}'
                found.append(Import(node.lineno, alias.asname or alias.name, name, name))
    return found


def imported_modules(path: Path) -> Iterator[tuple[int, str]]:
    """Our modules that a file imports; ``from swin_mm.ops import windows`` imports swin_mm.ops.windows."""
    for line, _, _, name in imports(path):
        if name.startswith(OURS):
            yield line, name if is_module(name) else name.rpartition('.')[0]


def uses(path: Path) -> Iterator[tuple[int, str, ast.AST]]:
    """Imports, and attributes of what was imported, by their full names: ``F.gelu`` is torch.nn.functional.gelu."""
    known = {local: bound for _, local, bound, _ in imports(path)}
    for line, _, _, name in imports(path):
        yield line, name, parse(path)
    for node in ast.walk(parse(path)):
        parts: list[str] = []
        inner = node
        while isinstance(inner, ast.Attribute):
            parts.append(inner.attr)
            inner = inner.value
        if parts and isinstance(inner, ast.Name) and inner.id in known:
            yield node.lineno, '.'.join([known[inner.id], *reversed(parts)]), node


def lines_for_types(path: Path) -> set[int]:
    """The lines of a file under ``if TYPE_CHECKING:``."""
    return {
        line
        for node in ast.walk(parse(path))
        if isinstance(node, ast.If) and isinstance(node.test, ast.Name) and node.test.id == 'TYPE_CHECKING'
        for statement in node.body
        for line in range(statement.lineno, (statement.end_lineno or statement.lineno) + 1)
    }


def level(module: str) -> int:
    """Where a module stands in the order; the package swin_mm itself, which registers the backbones, is above all."""
    parts = module.split('.')
    if parts[0] != 'swin_mm':
        return LEVELS[parts[0]]
    return LEVELS[parts[1]] if len(parts) > 1 else ORDER.index('tools')


def is_private(name: str) -> bool:
    return any(part.startswith('_') and not part.startswith('__') for part in name.split('.'))


def place(path: Path, line: int) -> str:
    return f'{path.relative_to(ROOT)}:{line}'


def test_every_part_of_the_package_has_its_place():
    parts = {p.stem for p in (ROOT / 'swin_mm').iterdir() if (p.suffix == '.py' or (p / '__init__.py').exists())}
    assert parts - {'__init__'} == {*ORDER, 'version', 'registry', 'doctor'} - {'tools'}


def test_imports_point_one_way():
    files = [path for path in sources('swin_mm', 'tools', 'benchmarks') if path != ROOT / 'swin_mm/__init__.py']
    wrong = [
        f'{place(path, line)} imports {module}'
        for path in files
        for line, module in imported_modules(path)
        if level(module) > level(module_name(path))
    ]
    assert not wrong, '\n'.join(sorted(wrong))


def test_modules_do_not_import_each_other_in_circles():
    """The order above forbids circles between packages; this is about modules. Type-only imports do not count."""
    graph = {
        module_name(path): {name for line, name in imported_modules(path) if line not in lines_for_types(path)}
        - {module_name(path)}
        for path in sources('swin_mm')
    }
    done: set[str] = set()

    def visit(module: str, path: tuple[str, ...]) -> None:
        assert module not in path, ' -> '.join((*path, module))
        if module not in done:
            for name in graph.get(module, ()):
                visit(name, (*path, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def test_only_tools_import_cli():
    wrong = [
        place(path, line)
        for path in sources('swin_mm')
        for line, module in imported_modules(path)
        if module == 'swin_mm.cli'
    ]
    assert not wrong, '\n'.join(sorted(wrong))


def test_plain_torch_below_openmmlab():
    """The model and the checkpoint reader work without OpenMMLab."""
    wrong = [
        f'{place(path, line)} imports {name}'
        for path in sources('swin_mm/ops', 'swin_mm/models', 'swin_mm/checkpoints')
        for line, _, _, name in imports(path)
        if name.partition('.')[0] in ('mmengine', 'mmcv', 'mmdet', 'mmseg', 'mmpretrain')
    ]
    assert not wrong, '\n'.join(sorted(wrong))


def test_no_patches_and_no_stack_frames():
    closed = ('unittest.mock', 'inspect.currentframe', 'inspect.stack', 'sys._getframe')
    wrong = {
        f'{place(path, line)} uses {name}'
        for path in sources('swin_mm', 'tools', 'benchmarks')
        for line, name, _ in uses(path)
        if name.startswith(closed)
    }
    assert not wrong, '\n'.join(sorted(wrong))


def test_other_libraries_are_not_changed():
    """No assignment to an attribute of an imported library, such as ``mmengine.X.method = ours``."""
    wrong = {
        f'{place(path, line)} sets {name}'
        for path in sources('swin_mm', 'tools', 'benchmarks')
        for line, name, node in uses(path)
        if isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store | ast.Del) and not name.startswith(OURS)
    }
    assert not wrong, '\n'.join(sorted(wrong))


def test_versions_of_torch_differ_in_one_file():
    """These are missing, limited or wrong on some of the supported versions."""
    closed = ('torch.library.custom_op', 'torch.compiler.is_exporting')
    wrong = {
        f'{place(path, line)} uses {name} instead of swin_mm.utils.compat'
        for path in sources('swin_mm', 'tools', 'benchmarks')
        for line, name, _ in uses(path)
        if name.startswith(closed) and path != ROOT / 'swin_mm/utils/compat.py'
    }
    assert not wrong, '\n'.join(sorted(wrong))


def test_private_api_of_other_libraries_is_listed():
    used = {
        (str(path.relative_to(ROOT)), place(path, line), name)
        for path in sources('swin_mm', 'tools', 'benchmarks')
        for line, name, _ in uses(path)
        if is_private(name) and not name.startswith(OURS)
    }
    listed = {(file, name.replace(':', '.')) for file, names in PRIVATE_API.items() for name in names}
    wrong = [
        f'{where}: {name}'
        for file, where, name in used
        if not any(file == own and (allowed + '.').startswith(name + '.') for own, allowed in listed)
    ]
    assert not wrong, '\n'.join(sorted(wrong))
    unused = [entry for entry in listed if not any((entry[0], entry[1]) == (file, name) for file, _, name in used)]
    assert not unused, f'no longer used, remove from PRIVATE_API: {unused}'


@pytest.mark.parametrize('name', sorted({name for names in PRIVATE_API.values() for name in names}))
def test_private_api_exists(name):
    pytest.importorskip(name.partition(':')[0].partition('.')[0])
    resolve_name(name)


def test_tests_load_no_script_by_path():
    closed = ('importlib.util.spec_from_file_location', 'importlib.machinery.SourceFileLoader', 'runpy.run_path')
    wrong = {
        f'{place(path, line)} uses {name}'
        for path in sources('tests')
        for line, name, _ in uses(path)
        if name.startswith(closed)
    }
    assert not wrong, '\n'.join(sorted(wrong))


def test_tests_use_no_private_names_of_ours():
    wrong = {
        f'{place(path, line)}: {name}'
        for path in sources('tests')
        for line, name, _ in uses(path)
        if name.startswith(OURS) and is_private(name)
    }
    for path in sources('tests'):  # monkeypatch.setattr('swin_mm.x._y', ...)
        for node in ast.walk(parse(path)):
            if isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value.startswith(OURS):
                name = node.value
                if all(part.isidentifier() for part in name.split('.')) and is_private(name):
                    wrong.add(f'{place(path, node.lineno)}: {name}')
    assert not wrong, '\n'.join(sorted(wrong))


def test_tests_mirror_the_package():
    """tests/ops/test_windows.py tests swin_mm/ops/windows.py, or what is called ops/windows."""
    parts = {p.name for p in (ROOT / 'tests').iterdir() if p.is_dir() and any(p.glob('**/test_*.py'))}
    assert parts <= {*ORDER, 'configs', 'support', 'benchmarks', 'docs'}, parts


def test_recipes_are_short():
    """Recipes differ from their base in a few lines; the templates to copy (custom/) spell out what users change."""
    long = {}
    for path in sources('configs'):
        parts = path.relative_to(ROOT).parts
        lines = sum(bool(line.strip()) for line in path.read_text().splitlines())
        if '_base_' not in parts and lines > (25 if 'custom' in parts else 10):
            long[str(path.relative_to(ROOT))] = lines
    assert not long, long
