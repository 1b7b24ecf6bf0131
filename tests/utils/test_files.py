"""Atomic writes: all or nothing, whatever the name, the mode and the disk."""

import os
import resource
from contextlib import contextmanager
from pathlib import Path

import pytest

from swin_mm.utils.errors import InputError
from swin_mm.utils.files import atomic_write


def write(path: Path, text: str) -> None:
    with atomic_write(path) as part:
        part.write_text(text)


def mode(path: Path) -> int:
    return path.stat().st_mode & 0o7777


@contextmanager
def umask(mask: int):
    before = os.umask(mask)
    try:
        yield
    finally:
        os.umask(before)


@pytest.mark.parametrize('mask', [0o022, 0o077, 0o002])
def test_new_files_get_the_mode_of_the_umask(tmp_path, mask):
    with umask(mask):
        write(tmp_path / 'new', 'a')
        (tmp_path / 'plain').write_text('a')
    assert mode(tmp_path / 'new') == mode(tmp_path / 'plain') == 0o666 & ~mask


def test_existing_files_keep_their_mode(tmp_path):
    path = tmp_path / 'a.txt'
    path.write_text('old')
    for bits in (0o600, 0o444, 0o755):
        path.chmod(bits)
        write(path, str(bits))
        assert (path.read_text(), mode(path)) == (str(bits), bits)


def test_of_a_link_the_target_is_replaced(tmp_path):
    (tmp_path / 'there').mkdir()
    target, link = tmp_path / 'there' / 'target', tmp_path / 'link'
    link.symlink_to(target)
    for text in ('new', 'replaced'):  # a link to nowhere first
        write(link, text)
        assert link.is_symlink() and target.read_text() == text
    assert len(os.listdir(tmp_path / 'there')) == 1


def test_the_temporary_file_is_new_and_private_to_the_writer(tmp_path):
    names = set()
    for _ in range(5):
        with atomic_write(tmp_path / 'a.png') as part:
            assert part.parent == tmp_path and part.suffix == '.png' and part.stat().st_size == 0
            names.add(part.name)
    assert len(names) == 5
    assert os.listdir(tmp_path) == ['a.png']


@pytest.mark.parametrize(
    'name', ['x' * 255, 'ä' * 127, '.' + 'x' * 254, 'a.' + 'x' * 253, os.fsdecode(b'\xff\xfe.png')]
)
def test_every_name_that_the_file_system_takes_can_be_written(tmp_path, name):
    write(tmp_path / name, 'a')
    assert os.listdir(tmp_path) == [name]


def test_missing_folders_are_created(tmp_path):
    write(tmp_path / 'a' / 'b' / 'c', 'x')
    assert (tmp_path / 'a' / 'b' / 'c').read_text() == 'x'


@pytest.mark.parametrize('error', [ValueError, KeyboardInterrupt])
def test_after_an_error_the_old_file_remains(tmp_path, error):
    (tmp_path / 'a').write_text('old')
    with pytest.raises(error), atomic_write(tmp_path / 'a') as part:
        part.write_text('half')
        raise error
    assert (tmp_path / 'a').read_text() == 'old'
    assert os.listdir(tmp_path) == ['a']


@contextmanager
def full_disk(size: int):
    """No file of this process can grow beyond ``size`` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def test_a_full_disk_is_one_clear_error(tmp_path):
    (tmp_path / 'a').write_text('old')
    with full_disk(1000), pytest.raises(InputError) as caught:
        write(tmp_path / 'a', 'x' * 5000)
    assert str(caught.value) == f'{tmp_path / "a"} cannot be written: File too large'
    assert (tmp_path / 'a').read_text() == 'old'
    assert os.listdir(tmp_path) == ['a']


def test_folders_that_cannot_be_written_are_one_clear_error(tmp_path):
    (tmp_path / 'file').touch()
    for path in (tmp_path / 'file' / 'a', tmp_path / ('x' * 256), Path('/proc/swin_mm/a'), tmp_path):
        with pytest.raises(InputError, match='cannot be written: ') as caught:
            write(path, 'x')
        assert str(path) in str(caught.value) and '\n' not in str(caught.value)
    assert os.listdir(tmp_path) == ['file']
