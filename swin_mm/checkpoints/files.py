"""Reading checkpoint files without executing anything in them, and writing them whole or not at all."""

import contextlib
import os
import pickle
import re
import zipfile
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from swin_mm.checkpoints.pickles import read_pickle, read_torch
from swin_mm.utils.errors import CheckpointError
from swin_mm.utils.files import atomic_write

SUFFIXES = ('.pth', '.pt', '.bin', '.safetensors')  # of the files written here


def read_checkpoint(source: str | os.PathLike[str], map_location: Any = 'cpu') -> Any:
    """Read a checkpoint of any format: PyTorch's (zip or older), safetensors, or a pickle of arrays or tensors.

    The format is told from the content. Of pickles, only tensors and plain data are opened, see
    :mod:`swin_mm.checkpoints.pickles`.

    Args:
        source: a path, an http(s) address (kept in ``torch.hub.get_dir()``), ``hf://owner/name[/file][@revision]`` for
            a file on the Hugging Face Hub, or an address of another scheme in :data:`FETCHERS`.
        map_location: where tensors go, as for ``torch.load``.

    Raises:
        CheckpointError: no such file, not a checkpoint, damaged, or it wants to run code.
    """
    source = os.fspath(source)
    with _errors_named(source), fetch(source) as path:
        try:
            return _read(path, map_location)
        except CheckpointError as error:
            where = '' if str(path) == source else f' (kept as {path}: delete that to have it fetched again)'
            raise CheckpointError(f'checkpoint {source} {error}{where}') from error.__cause__


def fetch(source: str) -> AbstractContextManager[Path]:
    """The local path of a source, valid inside the context.

    Raises:
        CheckpointError: there is no such file, or its address is of no known scheme.
    """
    scheme, colon, _ = source.partition('://')
    if colon:
        return FETCHERS.get(scheme, FETCHERS['*'])(source)
    path = Path(source).expanduser()
    if path.is_dir():
        raise CheckpointError(f'checkpoint {source} is a folder; name the file in it')
    if not path.exists():
        raise CheckpointError(f'checkpoint {source} does not exist; check the path')
    return contextlib.nullcontext(path)


@contextlib.contextmanager
def _errors_named(source: str) -> Iterator[None]:
    """Name the file in whatever goes wrong while it is fetched."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:
        raise CheckpointError(f'checkpoint {source} cannot be read: {_first_line(error)}') from error


def _download(address: str) -> AbstractContextManager[Path]:
    # By host and path: torch.hub keeps files by name alone, and many addresses end in pytorch_model.bin.
    host, _, rest = address.partition('://')[2].partition('?')[0].partition('/')
    path = Path(torch.hub.get_dir(), 'swin_mm', host, *rest.split('/'))
    if not rest or rest.endswith('/') or '..' in path.parts:
        raise CheckpointError(f'checkpoint {address} names no file')
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(address, str(path))  # into a temporary file, renamed when it is whole
    return contextlib.nullcontext(path)


def _from_hugging_face(address: str) -> AbstractContextManager[Path]:
    found = re.fullmatch(r'hf://([^/@]+/[^/@]+)(?:/([^@]+))?(?:@(.+))?', address)
    if found is None:
        raise CheckpointError(f'checkpoint {address}: expected hf://owner/name, optionally with /file and @revision')
    try:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import EntryNotFoundError
    except ImportError as error:
        raise CheckpointError(f'checkpoint {address} needs huggingface_hub: pip install huggingface_hub') from error
    repo, file, revision = found.groups()
    if file is None:
        with contextlib.suppress(EntryNotFoundError):  # raised offline too, for what is not in the cache
            return _from_hugging_face(f'hf://{repo}/model.safetensors' + (f'@{revision}' if revision else ''))
    return contextlib.nullcontext(Path(hf_hub_download(repo, file or 'pytorch_model.bin', revision=revision)))


def _unknown_scheme(address: str) -> AbstractContextManager[Path]:
    raise CheckpointError(f'checkpoint {address}: expected a path, or an address with http(s):// or hf://')


# What fetches addresses, by scheme; '*' is for all others.
FETCHERS: dict[str, Callable[[str], AbstractContextManager[Path]]] = {
    'http': _download,
    'https': _download,
    'hf': _from_hugging_face,
    '*': _unknown_scheme,
}


def _read(path: Path, map_location: Any) -> Any:
    """Read a local file by what it is; errors do not name it."""
    with path.open('rb') as file:
        head = file.read(512)
    try:
        # First: the length that safetensors begins with may look like anything.
        if head[8:9] == b'{' and int.from_bytes(head[:8], 'little') < path.stat().st_size:
            return _read_safetensors(path, map_location)
        if head.startswith(b'PK'):
            return _read_zip(path, map_location)
        if head.startswith(b'\x80'):
            return (read_torch if _is_older_torch(head) else read_pickle)(path, map_location)
    except CheckpointError:
        raise
    except Exception as error:
        code = re.search(r'GLOBAL (.+?)(?= was not|$)', str(error), re.MULTILINE)
        if code is None:
            detail = str(error).partition('WeightsUnpickler error:')[2].strip() or str(error)
            raise CheckpointError(f'is damaged, or not a checkpoint: {_first_line(detail, error)}') from error
        raise CheckpointError(
            f'wants to run code ({code[1]}) when it is opened, so it was not opened; if you trust its origin, open it '
            'with torch.load(..., weights_only=False) or pickle.load and save its state_dict alone'
        ) from error
    raise CheckpointError(f'is not a checkpoint: {_what_else(head)}; expected PyTorch, safetensors or pickle')


def _what_else(head: bytes) -> str:
    if not head:
        return 'it is empty'
    if head.startswith(b'version https://git-lfs'):
        return 'it is a pointer of Git LFS, get the file itself with `git lfs pull`'
    if head.lstrip()[:1] == b'<':
        return 'it is a web page, the address leads to a page about the file'
    return f'it begins with {head[:8]!r}'


def _read_zip(path: Path, map_location: Any) -> Any:
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
        if any(name.endswith('/constants.pkl') for name in names):
            raise CheckpointError('is a TorchScript program, not a checkpoint; use the state_dict it was made from')
        # torch.load does not compare checksums.
        if damaged := archive.testzip():
            raise CheckpointError(f'is damaged: its part {damaged} does not have the checksum it was written with')
    return read_torch(path, map_location)


def _read_safetensors(path: Path, map_location: Any) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    state = load_file(path)
    return state if map_location in (None, 'cpu') else {key: value.to(map_location) for key, value in state.items()}


def _is_older_torch(head: bytes) -> bool:
    """Whether a pickle begins with the magic number of torch.save's older format."""
    return head[2:].startswith(pickle.dumps(torch.serialization.MAGIC_NUMBER, protocol=2)[2:])


def _first_line(text: Any, error: BaseException | None = None) -> str:
    return (str(text).splitlines() or [''])[0] or type(error or text).__name__


def write_checkpoint(content: Mapping[str, Any], path: str | os.PathLike[str], force: bool = False) -> None:
    """Write a checkpoint in the format that the suffix names; the file appears whole or not at all.

    Args:
        content: what to save; for ``.safetensors`` tensors by name.
        path: ends in one of :data:`SUFFIXES`.
        force: replace an existing file.

    Raises:
        CheckpointError: the file exists, its folder does not, or the suffix is unknown.
    """
    path = Path(path).expanduser()
    check_writable(path, force)
    with atomic_write(path) as part:
        if path.suffix == '.safetensors':
            from safetensors.torch import save_file

            save_file(dict(content), part, metadata={'format': 'pt'})
        else:
            torch.save(content, part)


def check_writable(path: Path, force: bool) -> None:
    """Say now what :func:`write_checkpoint` would object to.

    Raises:
        CheckpointError: see there.
    """
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f'{path} must end in one of {", ".join(SUFFIXES)}: the suffix tells the format')
    if not path.parent.is_dir():
        raise CheckpointError(f'the folder {path.parent} does not exist; make it first')
    if path.is_dir() or (path.exists() and not force):
        raise CheckpointError(f'{path} exists already; choose another name, or --force to replace a file')
