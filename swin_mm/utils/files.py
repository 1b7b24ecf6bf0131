"""Writing files atomically."""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from swin_mm.utils.errors import InputError


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Write a file so that readers see the old content or all of the new, never a part.

    Yields a new temporary file in the same folder and with the same suffix. When the block ends without an error, the
    temporary file is flushed to disk and replaces ``path``; otherwise it is removed. An existing file keeps its mode.

    Args:
        path: the file to write; its folder is created if missing.

    Raises:
        InputError: the file cannot be written.
    """
    part = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        # A new file of a random name: a fixed one could be a link that somebody else placed there.
        handle, name = tempfile.mkstemp(prefix=f'.{path.stem[:40]}.', suffix=path.suffix, dir=path.parent)
        os.close(handle)
        part = Path(name)
        yield part
        with part.open('rb+') as file:
            os.fsync(file.fileno())
        part.chmod(path.stat().st_mode & 0o7777 if path.exists() else 0o666 & ~_umask())
        part.replace(path)
    except OSError as error:
        raise InputError(f'{path} cannot be written: {error.strerror or error}') from error
    finally:
        if part:
            with suppress(OSError):
                part.unlink()


def _umask() -> int:
    """Permissions that new files of this process do not get."""
    mask = os.umask(0)  # the only way to read it is to set it
    os.umask(mask)
    return mask
