"""Reading checkpoint files without running anything in them, and writing them atomically."""

import contextlib
import hashlib
import http.client
import os
import pickle
import re
import sys
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import torch
from torch import Tensor

from swin_mm.checkpoints.pickles import Budget, Names, UnknownName, placement, read_pickle, read_torch
from swin_mm.utils.errors import CheckpointError, InputError
from swin_mm.utils.files import atomic_write, folder_lock

SUFFIXES = ('.pth', '.pt', '.bin', '.safetensors')  # of the files written here

# Hosts that are gone -> the host that has the same files under the same paths.
MOVED_HOSTS = {'download.openmmlab.com': 'mmassets.onedl.ai'}  # since June 2026, see open-mmlab/mmdetection#12446

Fetch = Callable[[str], AbstractContextManager[Path]]


def fetch(source: str) -> AbstractContextManager[Path]:
    """The local path of a checkpoint, valid inside the context.

    Args:
        source: see :func:`read_checkpoint`.

    Raises:
        CheckpointError: there is no such file, or its address is of an unknown scheme.
    """
    scheme, colon, _ = source.partition('://')
    if scheme in ('http', 'https'):
        return contextlib.nullcontext(_download(source))
    if scheme == 'hf':
        return contextlib.nullcontext(_from_hugging_face(source))
    if colon:
        raise CheckpointError(f'checkpoint {source}: expected a path, or an address with http(s):// or hf://')
    path = Path(source).expanduser()
    if path.is_dir():
        raise CheckpointError(f'checkpoint {source} is a folder; name the file in it')
    if not path.exists():
        raise CheckpointError(f'checkpoint {source} does not exist; check the path')
    if not path.is_file():  # reading a pipe or a device may never end
        raise CheckpointError(f'checkpoint {source} is not a regular file; copy its content to a file first')
    return contextlib.nullcontext(path)


def read_checkpoint(
    source: str | os.PathLike[str], map_location: Any = 'cpu', *, names: Names | None = None, fetch: Fetch = fetch
) -> Any:
    """Read a checkpoint of any format: PyTorch's (zip or older), safetensors, or a pickle of arrays or tensors.

    The format is recognised by content. Pickles run no code, and memory is bounded by the file's size, see
    :mod:`swin_mm.checkpoints.pickles`.

    Args:
        source: a path, an http(s) address (cached in ``torch.hub.get_dir()``), or
            ``hf://owner/name[/file][@revision]`` for a file on the Hugging Face Hub.
        map_location: where tensors go, as for ``torch.load``.
        names: further names that pickles may use: name -> the function called in its place.
        fetch: finds the local file of a source.

    Raises:
        CheckpointError: no such file, not a checkpoint, damaged, or it would run code.
    """
    source = os.fspath(source)
    with _named_errors(source), fetch(source) as path:
        try:
            return _read(path, map_location, names or {})
        except CheckpointError as error:
            where = '' if str(path) == source else f' (cached as {path}: delete that file to fetch it again)'
            raise CheckpointError(f'checkpoint {source} {error}{where}') from error.__cause__


@contextlib.contextmanager
def _named_errors(source: str) -> Iterator[None]:
    """Name the source in whatever goes wrong while it is fetched."""
    try:
        yield
    except (CheckpointError, InputError):
        raise
    except Exception as error:
        raise CheckpointError(f'checkpoint {source} cannot be read: {_first_line(error)}') from error


def current_address(address: str) -> str:
    """An http(s) address on the host that has its file today, see :data:`MOVED_HOSTS`; any other text unchanged."""
    scheme, _, rest = address.partition('://')
    host, slash, path = rest.partition('/')
    if scheme in ('http', 'https') and host in MOVED_HOSTS:
        return f'https://{MOVED_HOSTS[host]}{slash}{path}'
    return address


def promised_hash(name: str) -> str | None:
    """The beginning of the SHA-256 that a file name carries, as in ``swin-9d6b7cfa.pth``; dates are not taken for one.

    Args:
        name: of the file, without folders.
    """
    found = re.search(r'-(?!(?:19|20)\d{6}\.)([0-9a-f]{8,64})\.\w+\Z', name)
    return found[1] if found else None


def _download(address: str) -> Path:
    """Download a file into the cache, or find it there.

    The cache is by host, path and query: torch.hub's is by name alone, and many addresses end in pytorch_model.bin. A
    file is kept only if it has the length that the server announced and the hash that its name carries.
    """
    asked, address = address, current_address(address)
    parts = urlsplit(address)
    folders = [part for part in parts.path.split('/') if part]
    if not folders or parts.path.endswith('/') or {'.', '..'} & set(folders):
        raise CheckpointError(f'checkpoint {address} names no file')
    name = folders.pop()
    if parts.query:
        folders.append('query-' + hashlib.sha256(parts.query.encode()).hexdigest()[:16])
    path = Path(torch.hub.get_dir(), 'swin_mm', parts.netloc.rpartition('@')[2], *folders, name)
    if path.exists():
        return path
    with folder_lock(path.parent):  # the processes of a run ask for the same file at the same time
        if not path.exists():
            moved = '' if address == asked else f' (the host of {asked} is gone)'
            print(f'downloading {address}{moved} to {path}', file=sys.stderr)
            _write_download(address, path)
    return path


def _write_download(address: str, path: Path) -> None:
    """Download a file to a path.

    Raises:
        CheckpointError: the server cannot be reached, has no such file, or sends something else.
        InputError: the path cannot be written.
    """
    digest, size = hashlib.sha256(), 0
    request = urllib.request.Request(address, headers={'User-Agent': 'swin_mm'})
    try:
        response = urllib.request.urlopen(request, timeout=60)
    except (OSError, http.client.HTTPException) as error:
        raise CheckpointError(_by_hand(address, path, error)) from error
    with response, atomic_write(path) as part:
        with part.open('wb') as file:
            while block := _read_block(response, address, path):
                file.write(block)
                digest.update(block)
                size += len(block)
        announced = response.headers.get('Content-Length')
        if announced is not None and int(announced) != size:
            raise CheckpointError(
                f'checkpoint {address}: the connection broke off after {size:,} of {int(announced):,} bytes; nothing '
                'was kept, try again'
            )
        promised = promised_hash(path.name)
        if promised and not digest.hexdigest().startswith(promised):
            raise CheckpointError(
                f'checkpoint {address}: the download has the SHA-256 {digest.hexdigest()}, but its name promises '
                f'{promised}...; nothing was kept. Try again, or download it yourself if you trust it and give its path'
            )


def _read_block(response: http.client.HTTPResponse, address: str, path: Path) -> bytes:
    """The next part of a download; errors of the connection are told from those of the disk."""
    try:
        return response.read(2**20)
    except (OSError, http.client.HTTPException) as error:
        raise CheckpointError(_by_hand(address, path, error)) from error


def _by_hand(address: str, path: Path, error: Exception) -> str:
    return (
        f'checkpoint {address} cannot be downloaded: {_first_line(error)}; get the file {path.name} by hand and save '
        f'it as {path}, or give its path instead of the address'
    )


def _from_hugging_face(address: str) -> Path:
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
    return Path(hf_hub_download(repo, file or 'pytorch_model.bin', revision=revision))


def _read(path: Path, map_location: Any, names: Names) -> Any:
    """Read a local file, whatever its format; errors do not name it."""
    place = placement(map_location)
    with path.open('rb') as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(512)
        file.seek(0)
        try:
            # First, because safetensors files begin with a length, which may look like any other format.
            if head[8:9] == b'{' and int.from_bytes(head[:8], 'little') < size:
                return _read_safetensors(path, place)
            if head.startswith(b'PK') or _is_older_torch(head):
                return read_torch(file, size, Budget(size), names, place)
            if head.startswith(b'\x80'):
                return read_pickle(file, size, Budget(size), names, place)
        except CheckpointError:
            raise
        except UnknownName as error:
            raise CheckpointError(
                f'wants to run code ({error}) when it is opened, so it was not opened; if you trust its origin, open '
                'it with torch.load(..., weights_only=False) or pickle.load and save its state_dict alone'
            ) from error
        except Exception as error:
            raise CheckpointError(f'is damaged, or not a checkpoint: {_first_line(error)}') from error
    raise CheckpointError(f'is not a checkpoint: {_what_else(head)}; expected PyTorch, safetensors or pickle')


def _what_else(head: bytes) -> str:
    if not head:
        return 'it is empty'
    if head.startswith(b'version https://git-lfs'):
        return 'it is a pointer of Git LFS, get the file itself with `git lfs pull`'
    if head.lstrip()[:1] == b'<':
        return 'it is a web page, the address leads to a page about the file'
    return f'it begins with {head[:8]!r}'


def _read_safetensors(path: Path, place: Callable[[Tensor, str], Tensor]) -> dict[str, Tensor]:
    from safetensors.torch import load, load_file

    try:
        os.fspath(path).encode()
        state = load_file(path)
    except UnicodeEncodeError:  # the library opens only files whose names are UTF-8
        state = load(path.read_bytes())
    return {key: place(value, 'cpu') for key, value in state.items()}


def _is_older_torch(head: bytes) -> bool:
    """Whether a file begins with the magic number of torch.save's format from before PyTorch 1.6."""
    return head.startswith(b'\x80') and head[2:].startswith(pickle.dumps(0x1950A86A20F9469CFC6C, protocol=2)[2:])


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [''])[0] or type(error).__name__


def write_checkpoint(content: Mapping[str, Any], path: str | os.PathLike[str], force: bool = False) -> None:
    """Write a checkpoint atomically, in the format that the suffix names.

    Args:
        content: what to save; for ``.safetensors`` tensors by name.
        path: ends in one of :data:`SUFFIXES`.
        force: replace an existing file, whose mode is kept.

    Raises:
        CheckpointError: the file exists, its folder does not, or the suffix is unknown.
        InputError: the disk is full or the folder cannot be written to.
    """
    path = Path(path).expanduser()
    check_writable(path, force)
    with atomic_write(path) as part:
        if path.suffix == '.safetensors':
            from safetensors.torch import save

            try:
                part.write_bytes(save(dict(content), metadata={'format': 'pt'}))
            except ModuleNotFoundError as error:
                raise CheckpointError(
                    f'{path}: safetensors needs {error.name} to write files; install it with: pip install {error.name}'
                ) from error
            return
        try:
            torch.save(content, part)
        except RuntimeError as error:  # what torch makes of a full disk
            raise InputError(f'{path} cannot be written: {_first_line(error)}') from error


def check_writable(path: Path, force: bool) -> None:
    """Check early that :func:`write_checkpoint` can write to a path.

    Raises:
        CheckpointError: see :func:`write_checkpoint`.
    """
    if path.suffix not in SUFFIXES:
        raise CheckpointError(f'{path} must end in one of {", ".join(SUFFIXES)}: the suffix tells the format')
    if not path.parent.is_dir():
        raise CheckpointError(f'the folder {path.parent} does not exist; create it first')
    if path.is_dir() or (path.exists() and not force):
        raise CheckpointError(f'{path} exists already; choose another name, or --force to replace a file')
