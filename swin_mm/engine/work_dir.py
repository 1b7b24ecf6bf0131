"""The folder of a training run: one run at a time, checkpoints written atomically, the last one found."""

import contextlib
import errno
import fcntl
import os
import re
import socket
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar

from mmengine.fileio import LocalBackend, register_backend

from swin_mm.utils.errors import InputError
from swin_mm.utils.files import atomic_write

LOCK = '.lock'
_TEMPORARY = re.compile(r'\.[0-9a-f]{16}\.part\.pth')  # the names that atomic_write gives checkpoints


class AtomicBackend(LocalBackend):
    """mmengine's local file backend with atomic writes, which removes a file only after the next one is written.

    mmengine first deletes the checkpoints beyond ``max_keep_ckpts`` and then writes the new one in place, so a run
    killed at that moment could be left without any. Configs name it ``backend_args=dict(backend='swin_mm')``.
    """

    _to_remove: ClassVar[set[str]] = set()  # mmengine makes a new backend for every file

    def put(self, obj: bytes, filepath: str | Path) -> None:
        """Write a file, then remove the files passed to :meth:`remove` before."""
        with atomic_write(Path(filepath)) as part:
            part.write_bytes(obj)
        for path in self._to_remove - {str(filepath)}:
            with contextlib.suppress(FileNotFoundError):
                super().remove(path)
        self._to_remove.clear()

    def remove(self, filepath: str | Path) -> None:
        """Schedule a file for removal after the next :meth:`put`."""
        self._to_remove.add(str(filepath))


register_backend('swin_mm', AtomicBackend, force=True)  # a new name; `force` for modules that are imported twice


@contextlib.contextmanager
def locked(work_dir: str | Path) -> Iterator[None]:
    """Hold a lock on a folder, and remove incomplete files that a killed run has left there.

    The operating system frees the lock when the process ends, however that happens; data workers do not inherit it.

    Raises:
        InputError: another process holds it, or the folder cannot be written to.
    """
    path = Path(work_dir, LOCK)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        file = path.open('a+')
    except OSError as error:
        raise InputError(
            f'work_dir {work_dir} cannot be written to: {error.strerror}; choose another with --work-dir'
        ) from error
    with file:
        try:
            fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            if error.errno in (errno.EACCES, errno.EAGAIN):
                file.seek(0)
                raise InputError(
                    f'work_dir {work_dir} is in use by another run ({file.read().strip() or "no details"}); choose '
                    'another with --work-dir, or stop that run first'
                ) from error
            # Some network file systems have no locks.
            print(f'warning: work_dir {work_dir} cannot be locked ({error.strerror}); start no second run in it')
        file.truncate(0)
        file.write(f'process {os.getpid()} on {socket.gethostname()}')
        file.flush()
        for left in path.parent.glob('.*.pth'):
            if _TEMPORARY.fullmatch(left.name):
                left.unlink()
        yield


def last_checkpoint(work_dir: str | Path) -> str | None:
    """The checkpoint to resume from, if there is one."""
    pointer = Path(work_dir, 'last_checkpoint')
    named = pointer.read_text(errors='replace').strip() if pointer.is_file() else ''
    if named and ('://' in named or os.path.exists(named)):
        return named
    # The run was killed while it wrote the name, or before it did. The best ones have no optimizer.
    found = [path for path in Path(work_dir).glob('*.pth') if not path.name.startswith(('best_', '.'))]
    return str(max(found, key=os.path.getmtime)) if found else None
