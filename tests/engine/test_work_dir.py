"""One run at a time in a work_dir; atomic checkpoints."""

import os
import signal
import time

import pytest
from mmengine.fileio import get_file_backend
from support.processes import in_processes

from swin_mm.engine.work_dir import last_checkpoint, locked
from swin_mm.utils.errors import InputError

BACKEND = {'backend': 'swin_mm'}


def hold_and_die(folder):
    """Hold the lock, try to take it in a second process, and get killed."""
    with locked(folder):
        code = in_processes((try_lock, folder))
        (folder / 'second').write_text(str(code))
        child = os.fork()
        if child == 0:  # like a data worker that outlives the run
            time.sleep(30)
            os._exit(0)
        (folder / 'child').write_text(str(child))
        os.kill(os.getpid(), signal.SIGKILL)


def try_lock(folder):
    """Exit with 7 if the lock is held and the error names the holder."""
    try:
        with locked(folder):
            pass
    except InputError as error:
        assert f'process {os.getppid()} on ' in str(error) and '--work-dir' in str(error)
        os._exit(7)


def test_a_second_run_is_refused_and_a_killed_one_leaves_no_lock(tmp_path):
    (tmp_path / '.0123456789abcdef.part.pth').touch()
    (tmp_path / '.mine.pth').touch()
    process = os.fork()
    if process == 0:
        hold_and_die(tmp_path)
    assert os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) == -signal.SIGKILL
    assert (tmp_path / 'second').read_text() == '[7]'
    with locked(tmp_path):  # although a child of the killed one is alive
        os.kill(int((tmp_path / 'child').read_text()), signal.SIGKILL)
    assert sorted(path.name for path in tmp_path.glob('.*.pth')) == ['.mine.pth'], 'half-written ones are removed'


def test_a_work_dir_that_cannot_be_created_is_an_error(tmp_path):
    (tmp_path / 'file').touch()
    with pytest.raises(InputError, match='cannot be written to.*--work-dir'), locked(tmp_path / 'file'):
        pass


def test_the_old_checkpoint_is_removed_after_the_new_one_is_written(tmp_path):
    backend = get_file_backend(tmp_path, backend_args=BACKEND)
    backend.put(b'old', tmp_path / 'epoch_1.pth')
    backend.remove(tmp_path / 'epoch_1.pth')
    assert (tmp_path / 'epoch_1.pth').exists(), 'a run killed now has a checkpoint'
    get_file_backend(tmp_path, backend_args=BACKEND).put(b'new', tmp_path / 'epoch_2.pth')
    assert [path.name for path in tmp_path.iterdir()] == ['epoch_2.pth']
    backend.remove(tmp_path / 'epoch_2.pth')
    backend.put(b'newer', tmp_path / 'epoch_2.pth')
    assert (tmp_path / 'epoch_2.pth').read_bytes() == b'newer'


def test_the_last_checkpoint_is_found_without_a_valid_last_checkpoint_file(tmp_path):
    for age, name in enumerate(('.0123456789abcdef.part.pth', 'best_loss_epoch_9.pth', 'epoch_10.pth', 'epoch_9.pth')):
        (tmp_path / name).touch()
        os.utime(tmp_path / name, (0, 1000 - age))
    assert last_checkpoint(tmp_path) == str(tmp_path / 'epoch_10.pth')
    (tmp_path / 'last_checkpoint').touch()
    assert last_checkpoint(tmp_path) == str(tmp_path / 'epoch_10.pth')
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_8.pth'))  # deleted for the newest
    assert last_checkpoint(tmp_path) == str(tmp_path / 'epoch_10.pth')
    (tmp_path / 'last_checkpoint').write_text(str(tmp_path / 'epoch_9.pth'))
    assert last_checkpoint(tmp_path) == str(tmp_path / 'epoch_9.pth')
