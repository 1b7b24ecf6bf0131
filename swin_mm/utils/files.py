"""Writing files atomically, and by one process at a time."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from swin_mm.utils.errors import InputError


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a file atomically: readers see the complete old or new content, never a part.

    Yields a new temporary file in the same folder and with the same suffix. When the block ends without an error, the
    temporary file is flushed to disk and replaces ``path``; otherwise it is removed. An existing file keeps its mode, a
    new one gets the default mode; if ``path`` is a symbolic link, its target is replaced.

    Args:
        path: the file to write; its folder is created if missing.

    Raises:
        InputError: the file cannot be written, for example because the disk is full or read-only.
    """
    part = None
    try:
        target = Path(os.path.realpath(path))
        target.parent.mkdir(parents=True, exist_ok=True)
        # A random name that must be new: a predictable one could be a link that somebody else placed there.
        suffix = target.suffix if len(target.suffix) <= 20 else ''
        part = target.with_name(f'.{secrets.token_hex(8)}.part{suffix}')
        handle = os.open(part, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        mode = os.fstat(handle).st_mode & 0o7777
        os.close(handle)
        if target.exists():
            mode = target.stat().st_mode & 0o7777
        yield part
        with part.open('rb+') as file:
            os.fsync(file.fileno())
        part.chmod(mode)
        part.replace(target)
    except OSError as error:
        raise InputError(f'{path} cannot be written: {error.strerror or error}') from error
    finally:
        if part:
            with suppress(OSError):
                part.unlink()


def require_new_file(path: Path, force: bool) -> None:
    """Check early that the file of ``--out`` can be written without replacing what is not meant to be replaced.

    Args:
        path: of the file.
        force: allow it to replace a file.

    Raises:
        InputError: its folder does not exist, or the path exists.
    """
    if not path.parent.is_dir():
        raise InputError(f'--out {path}: the folder {path.parent} does not exist; make it first')
    if path.exists() and not (force and path.is_file()):
        raise InputError(f'--out {path} exists; choose another name, or --force to replace a file')


@contextmanager
def folder_lock(folder: Path) -> Iterator[None]:
    """Let one process at a time pass, for instance to download a file into a folder; the others wait.

    The lock is on the folder itself, so no file is left behind, and the operating system frees it when the process
    ends. Where the file system or the operating system has no locks, all processes pass.

    Args:
        folder: is created if missing.

    Raises:
        InputError: the folder cannot be created.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(folder, os.O_RDONLY)
    except OSError as error:
        raise InputError(f'{folder} cannot be written: {error.strerror or error}') from error
    try:
        with suppress(ImportError, OSError):
            import fcntl

            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)
