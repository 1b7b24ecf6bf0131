"""Files are opened without running anything in them, and what cannot be opened is named."""

import http.server
import os
import threading
from functools import partial

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer

import swin_mm  # noqa: F401 (allows mmengine's plain data)
from swin_mm.checkpoints import CheckpointError, read_checkpoint


class Attack:
    """Creates a file when unpickled."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_a_pickle_that_runs_code_is_refused_and_named(tmp_path):
    file, trace = tmp_path / 'attack.pth', tmp_path / 'trace'
    torch.save({'state_dict': {'w': torch.rand(2)}, 'extra': Attack(trace)}, file)
    with pytest.raises(CheckpointError, match=r'attack.pth wants to run code.*mkdir'):
        read_checkpoint(file)
    assert not trace.exists()


class Lookup:
    """Asks for an attribute when unpickled, a first step towards running code."""

    def __reduce__(self):
        return getattr, (torch.Tensor, '__init__')


def test_getattr_serves_log_histories_only(tmp_path):
    torch.save({'state_dict': {'w': torch.rand(2)}, 'extra': Lookup()}, tmp_path / 'lookup.pth')
    with pytest.raises(CheckpointError, match='lookup.pth cannot be read: it asks for __init__'):
        read_checkpoint(tmp_path / 'lookup.pth')


def test_training_checkpoints_with_plain_data_load(tmp_path):
    content = {
        'state_dict': {'w': torch.rand(2)},
        'message_hub': {'loss': HistoryBuffer([1.0, 2.0], [1, 1]), 'lr': np.float64(0.1), 'n': np.arange(3)},
        'meta': {'epoch': 3, 'seed': np.int64(1), 'classes': ('a', 'b')},
    }
    torch.save(content, tmp_path / 'epoch_3.pth')
    loaded = read_checkpoint(tmp_path / 'epoch_3.pth')
    assert torch.equal(loaded['state_dict']['w'], content['state_dict']['w'])
    assert loaded['message_hub']['loss'].current() == 2.0


def test_what_cannot_be_read_is_named(tmp_path):
    whole = tmp_path / 'whole.pth'
    torch.save({'w': torch.rand(1000)}, whole)
    (tmp_path / 'truncated.pth').write_bytes(whole.read_bytes()[:2000])
    (tmp_path / 'empty.pth').write_bytes(b'')
    (tmp_path / 'text.pth').write_text('<html>not found</html>')
    (tmp_path / 'folder.pth').mkdir()
    for name, message in {
        'missing.pth': 'does not exist',
        'folder.pth': 'a folder',
        'truncated.pth': 'cannot be read|damaged',
        'empty.pth': 'cannot be read|damaged',
        'text.pth': 'damaged or not a PyTorch file',
    }.items():
        with pytest.raises(CheckpointError, match=f'{name} (is )?({message})') as caught:
            read_checkpoint(tmp_path / name)
        assert '\n' not in str(caught.value)


def test_addresses_are_downloaded_once_into_the_hub(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    (tmp_path / 'site').mkdir()
    torch.save({'w': torch.ones(2)}, tmp_path / 'site' / 'swin.pth')
    handler = partial(http.server.SimpleHTTPRequestHandler, directory=tmp_path / 'site')
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        address = f'http://127.0.0.1:{server.server_port}'
        assert torch.equal(read_checkpoint(f'{address}/swin.pth')['w'], torch.ones(2))
        with pytest.raises(CheckpointError, match='absent.pth cannot be read: .*404'):
            read_checkpoint(f'{address}/absent.pth')
        server.shutdown()
    assert torch.equal(read_checkpoint(f'{address}/swin.pth')['w'], torch.ones(2))  # from the cache
