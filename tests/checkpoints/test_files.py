"""Files are opened without running code in them, errors name the file, and writing is atomic."""

import contextlib
import hashlib
import http.server
import io
import os
import pickle
import re
import subprocess
import sys
import threading
import time
import types
import urllib.request
from argparse import Namespace
from collections import Counter, OrderedDict
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch
from mmengine.logging import HistoryBuffer
from safetensors.torch import save_file
from support.tool_fixtures import ROOT

from swin_mm.checkpoints import CheckpointError, read_checkpoint, write_checkpoint
from swin_mm.checkpoints.files import SUFFIXES, current_address
from swin_mm.openmmlab import loading
from swin_mm.utils.compat import LOWEST_TORCH, TORCH
from swin_mm.utils.errors import InputError


class Attack:
    """Creates a file when unpickled."""

    def __init__(self, path) -> None:
        self.path = path

    def __reduce__(self):
        return os.mkdir, (str(self.path),)


def test_pickles_that_run_code_are_refused(tmp_path):
    file, trace = tmp_path / 'attack.pth', tmp_path / 'trace'
    torch.save({'state_dict': {'w': torch.rand(2)}, 'extra': Attack(trace)}, file)
    with pytest.raises(CheckpointError, match=r'attack.pth wants to run code.*mkdir'):
        read_checkpoint(file)
    assert not trace.exists()


class Lookup:
    """Asks for an attribute when unpickled, a first step towards running code."""

    def __reduce__(self):
        return getattr, (torch.Tensor, '__init__')


def test_getattr_is_for_log_histories_only(tmp_path):
    torch.save({'state_dict': {'w': torch.rand(2)}, 'extra': Lookup()}, tmp_path / 'lookup.pth')
    with pytest.raises(CheckpointError, match=r'lookup.pth wants to run code .*getattr\)'):
        read_checkpoint(tmp_path / 'lookup.pth')
    with pytest.raises(CheckpointError, match='lookup.pth wants to run code .getattr of __init__'):
        loading.read_checkpoint(tmp_path / 'lookup.pth')


def test_importing_the_backbones_changes_nothing_for_other_readers(tmp_path):
    """What mmengine's checkpoints need is passed to the reader, not registered for the whole process."""
    torch.save({'w': torch.ones(1), 'history': HistoryBuffer([1.0], [1])}, tmp_path / 'a.pth')
    with pytest.raises(CheckpointError, match='wants to run code .*HistoryBuffer'):
        read_checkpoint(tmp_path / 'a.pth')
    assert HistoryBuffer not in torch.serialization.get_safe_globals()


def test_training_checkpoints_with_plain_data_load(tmp_path):
    content = {
        'state_dict': {'w': torch.rand(2)},
        'message_hub': {'loss': HistoryBuffer([1.0, 2.0], [1, 1]), 'lr': np.float64(0.1), 'n': np.arange(3)},
        'meta': {'epoch': 3, 'seed': np.int64(1), 'classes': ('a', 'b')},
    }
    torch.save(content, tmp_path / 'epoch_3.pth')
    loaded = loading.read_checkpoint(tmp_path / 'epoch_3.pth')
    assert torch.equal(loaded['state_dict']['w'], content['state_dict']['w'])
    history = loaded['message_hub']['loss']
    assert (history.current(), history.mean(), history.max_length) == (2.0, 1.5, 1_000_000)
    assert loaded['message_hub']['lr'] == 0.1 and np.array_equal(loaded['message_hub']['n'], np.arange(3))
    assert loaded['meta'] == content['meta']
    with pytest.raises(CheckpointError, match='malformed log history'):
        history._log_history = 'text'
        torch.save(history, tmp_path / 'bad.pth')
        loading.read_checkpoint(tmp_path / 'bad.pth')


def test_mmengine_gets_no_code_to_run(tmp_path):
    """Runner.resume executes meta.config to look for gpu_ids."""
    content = {'state_dict': {'w': torch.ones(1)}, 'meta': {'epoch': 1, 'config': 'raise SystemExit'}}
    torch.save(content, tmp_path / 'a.pth')
    assert loading.read_for_mmengine(str(tmp_path / 'a.pth'))['meta'] == {'epoch': 1}
    torch.save({'model': content['state_dict']}, tmp_path / 'b.pth')
    assert loading.read_for_mmengine(str(tmp_path / 'b.pth'))['state_dict'].keys() == {'w'}


@pytest.mark.parametrize('form', ['zip', 'older', 'pickle'])
def test_settings_of_official_scripts_are_read_without_their_classes(tmp_path, form, monkeypatch):
    module = types.ModuleType('yacs.config')

    class CfgNode(dict):
        """As in yacs: a dict with attributes of its own."""

        def __init__(self, **options) -> None:
            super().__init__(options)
            self.__dict__['__immutable__'] = True

    CfgNode.__module__, CfgNode.__qualname__, module.CfgNode = 'yacs.config', 'CfgNode', CfgNode
    config = CfgNode(MODEL=CfgNode(TYPE='swin', SWIN=CfgNode(DEPTHS=[2, 2, 6, 2])))
    content = {'model': {'w': torch.ones(2)}, 'config': config, 'args': Namespace(lr=0.1), 'steps': Counter([8, 11])}
    with monkeypatch.context() as patch:
        patch.setitem(sys.modules, 'yacs', types.ModuleType('yacs'))
        patch.setitem(sys.modules, 'yacs.config', module)
        if form == 'pickle':
            (tmp_path / 'swin.pth').write_bytes(pickle.dumps(content))
        else:
            torch.save(content, tmp_path / 'swin.pth', _use_new_zipfile_serialization=form == 'zip')
    loaded = read_checkpoint(tmp_path / 'swin.pth')
    assert torch.equal(loaded['model']['w'], torch.ones(2))
    assert loaded['config']['MODEL']['SWIN']['DEPTHS'] == [2, 2, 6, 2]
    assert (loaded['args'].lr, loaded['steps'][11]) == (0.1, 1)


def same(ours, theirs) -> bool:
    """Whether two contents are equal, types and layouts included."""
    if isinstance(theirs, torch.Tensor):
        layout = [(t.dtype, t.shape, t.stride(), t.requires_grad) for t in (ours, theirs)]
        return type(ours) is type(theirs) and layout[0] == layout[1] and torch.equal(ours, theirs)
    if isinstance(theirs, dict):
        return ours.keys() == theirs.keys() and all(same(ours[key], value) for key, value in theirs.items())
    if isinstance(theirs, list | tuple):
        return type(ours) is type(theirs) and len(ours) == len(theirs) and all(map(same, ours, theirs))
    return type(ours) is type(theirs) and ours == theirs


@pytest.mark.parametrize('form', ['zip', 'older'])
def test_content_equals_that_of_torch_load(tmp_path, form):
    net = torch.nn.BatchNorm1d(3)
    optimizer = torch.optim.AdamW(net.parameters())
    net(torch.rand(4, 3)).sum().backward()
    optimizer.step()
    w = torch.rand(100)
    content = {
        'state_dict': net.state_dict(),
        'optimizer': optimizer.state_dict(),
        'views': [w[::2], w.view(10, 10).T, w],
        'types': [w.to(dtype) for dtype in (torch.float16, torch.bfloat16, torch.int8, torch.bool, torch.complex64)],
        'sizes': [torch.empty(0, 3), torch.tensor(3)],
        'parameters': [torch.nn.Parameter(w), torch.nn.Parameter(w, requires_grad=False), w.clone().requires_grad_()],
        'others': [torch.Size([1, 2]), torch.device('cpu'), torch.float16, {1, 2}, 2**80, b'bytes', (None, True), 1.5],
    }
    if form == 'zip' and TORCH > LOWEST_TORCH:  # the older format and torch 2.4 do not have it
        content['new types'] = torch.tensor([1, 2]).to(torch.uint16)
    torch.save(content, tmp_path / 'a.pth', _use_new_zipfile_serialization=form == 'zip')
    ours, theirs = read_checkpoint(tmp_path / 'a.pth'), torch.load(tmp_path / 'a.pth', weights_only=False)
    assert same(ours, theirs) and same(theirs, content)
    assert ours['state_dict']._metadata == theirs['state_dict']._metadata
    assert ours['views'][0].data_ptr() == ours['views'][2].data_ptr()  # shared, as they were
    assert read_checkpoint(tmp_path / 'a.pth', 'meta')['views'][1].is_meta
    assert same(read_checkpoint(tmp_path / 'a.pth', lambda storage, location: storage), content)


@pytest.mark.parametrize('protocol', [2, 4])
def test_plain_pickles_of_arrays_and_tensors_open(tmp_path, protocol):
    arrays = {'a': np.arange(6.0).reshape(2, 3), 'n': np.float32(2), 'of ints': np.arange(3)}
    tensors = OrderedDict(t=torch.rand(3, 4), half=torch.rand(2).half(), view=torch.arange(8)[2:6])
    content = {'model': arrays | tensors, '__author__': 'third_party', 'matching_heuristics': True}
    (tmp_path / 'd2.pkl').write_bytes(pickle.dumps(content, protocol))
    loaded = read_checkpoint(tmp_path / 'd2.pkl')
    assert loaded['matching_heuristics'] is True
    assert all(np.array_equal(loaded['model'][key], value) for key, value in arrays.items())
    assert all(torch.equal(loaded['model'][key], value) for key, value in tensors.items())


@pytest.mark.parametrize('inner', [False, True], ids=['pickle', 'tensor bytes in a pickle'])
def test_plain_pickles_that_run_code_are_refused(tmp_path, inner):
    trace = tmp_path / 'trace'
    evil: object = Attack(trace)
    if inner:  # what torch's own `_load_from_bytes` would open without looking
        buffer = io.BytesIO()
        torch.save(evil, buffer)

        class Bytes:
            def __reduce__(self):
                return torch.storage._load_from_bytes, (buffer.getvalue(),)

        evil = Bytes()
    (tmp_path / 'evil.pkl').write_bytes(pickle.dumps({'model': evil}))
    with pytest.raises(CheckpointError, match='evil.pkl wants to run code .*mkdir'):
        read_checkpoint(tmp_path / 'evil.pkl')
    assert not trace.exists()


def test_older_torch_files_and_safetensors_open(tmp_path):
    state = {'w': torch.rand(4, 5), 'n': torch.arange(3)}
    torch.save({'state_dict': state}, tmp_path / 'old.pth', _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / 'new.safetensors')
    (tmp_path / 'new.safetensors').rename(tmp_path / 'told_by_content.bin')
    for loaded in (
        read_checkpoint(tmp_path / 'old.pth')['state_dict'],
        read_checkpoint(tmp_path / 'told_by_content.bin'),
    ):
        assert all(torch.equal(loaded[key], value) for key, value in state.items())


@pytest.mark.parametrize('begin', [b'\x80', b'PK'])
def test_safetensors_may_begin_like_other_formats(tmp_path, begin):
    """It begins with the length of its header."""
    for length in range(0, 25000, 8):
        save_file({'w': torch.ones(2)}, tmp_path / 'a', metadata={'note': 'x' * length})
        if (tmp_path / 'a').read_bytes().startswith(begin):
            break
    assert torch.equal(read_checkpoint(tmp_path / 'a')['w'], torch.ones(2))


class Calls:
    """Pickles as the call of something, and then perhaps as setting its state."""

    def __init__(self, *reduced) -> None:
        self.reduced = reduced

    def __reduce__(self):
        return self.reduced


FORGED = {
    'pointers': pickle.dumps(Calls(np.ndarray, ((1,), np.dtype('O'), b'A' * 8)), 2),
    'objects': pickle.dumps(np.array([None, 1], dtype=object), 2),
    'records': pickle.dumps(np.zeros(2, dtype=[('a', 'f4')]), 2),
    'a class': b'\x80\x02cargparse\nNamespace\nN}U\x08__init__ccollections\nOrderedDict\ns\x86b.',
    'a function': b'\x80\x02ctorch._utils\n_rebuild_tensor_v2\nN}U\x0c__defaults__K\x01\x85s\x86b.',
}


@pytest.mark.parametrize('forged', FORGED)
def test_known_names_cannot_be_abused(tmp_path, forged):
    (tmp_path / 'a.pkl').write_bytes(FORGED[forged])
    before = (Namespace.__init__, torch._utils._rebuild_tensor_v2.__defaults__)
    with contextlib.suppress(CheckpointError):
        content = read_checkpoint(tmp_path / 'a.pkl')
        assert not isinstance(content, np.ndarray)
    assert (Namespace.__init__, torch._utils._rebuild_tensor_v2.__defaults__) == before
    if forged == 'pointers':  # torch's own reader of such data, which calls what it is allowed to name
        torch.save({'w': Calls(np.ndarray, ((1,), np.dtype('O'), b'A' * 8))}, tmp_path / 'a.pth')
        with pytest.raises(CheckpointError):
            read_checkpoint(tmp_path / 'a.pth')


def test_arrays_of_every_numeric_type_are_read_exactly(tmp_path):
    rng = np.random.default_rng(0)
    arrays = [
        (rng.standard_normal((3, 4)) * 9).astype(code) for code in ('f2', 'f4', '>f8', 'i1', 'u2', '>i4', 'i8', '?')
    ]
    arrays += [np.asfortranarray(arrays[0]), arrays[1][:, ::2], np.zeros((0, 3)), np.array(2.5)]
    content = {'list': arrays, 'tuple': (arrays[0], {'in': arrays[1]}), 'settings': Namespace(w=arrays[2])}
    torch.save(content, tmp_path / 'a.pth')
    sources = [tmp_path / 'a.pth']
    for protocol in (2, 4, 5):
        sources.append(tmp_path / f'{protocol}.pkl')
        sources[-1].write_bytes(pickle.dumps(content, protocol))
    for source in sources:
        loaded = read_checkpoint(source)
        for mine, expected in zip(loaded['list'], arrays, strict=True):
            assert mine.dtype.newbyteorder('=') == expected.dtype.newbyteorder('=')
            assert np.array_equal(mine, expected)
        assert np.array_equal(loaded['tuple'][1]['in'], arrays[1])
        assert np.array_equal(loaded['settings'].w, arrays[2])


def test_unreadable_files_are_named_with_the_reason(tmp_path):
    whole, older, tensors, plain = (tmp_path / name for name in ('whole', 'older', 'tensors', 'plain'))
    state = {'w': torch.rand(1000)}
    torch.save(state, whole)
    torch.save(state, older, _use_new_zipfile_serialization=False)
    save_file(state, tensors)
    plain.write_bytes(pickle.dumps({'model': {'w': np.ones(1000)}}))
    for path in (whole, older, tensors, plain):
        path.with_suffix('.cut').write_bytes(path.read_bytes()[:1500])
    flipped = bytearray(whole.read_bytes())
    flipped[2000] ^= 1  # within the numbers
    (tmp_path / 'flipped').write_bytes(flipped)
    (tmp_path / 'empty').write_bytes(b'')
    (tmp_path / 'page').write_text('\n<!DOCTYPE html><title>Not found</title>')
    (tmp_path / 'pointer').write_text('version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 3\n')
    (tmp_path / 'image').write_bytes(b'\x89PNG\r\n\x1a\n' + bytes(50))
    (tmp_path / 'zeros').write_bytes(bytes(600))
    (tmp_path / 'folder').mkdir()
    torch.jit.save(torch.jit.script(torch.nn.Linear(2, 2)), tmp_path / 'program')
    for name, message in {
        'missing': 'does not exist',
        'folder': 'is a folder',
        'whole.cut': 'is damaged',
        'older.cut': 'is damaged',
        'tensors.cut': 'is damaged',
        'plain.cut': 'is damaged',
        'flipped': 'is damaged, or not a checkpoint: Bad CRC-32',
        'empty': 'is not a checkpoint: it is empty',
        'page': 'is not a checkpoint: it is a web page',
        'pointer': 'is not a checkpoint: .*git lfs pull',
        'image': 'is not a checkpoint: it begins with',
        'zeros': 'is not a checkpoint: it begins with',
        'program': 'is a TorchScript program',
    }.items():
        with pytest.raises(CheckpointError, match=f'/{name} {message}') as caught:
            read_checkpoint(tmp_path / name)
        assert '\n' not in str(caught.value)


def test_hugging_face_files_are_read_from_the_cache_offline(tmp_path):
    """In a process of its own: the hub reads its settings when it is imported."""
    pytest.importorskip('huggingface_hub')
    repo = tmp_path / 'hub' / 'models--someone--swin'
    for revision, name, commit in (('main', 'model.safetensors', 'a' * 40), ('v2', 'pytorch_model.bin', 'b' * 40)):
        folder = repo / 'snapshots' / commit
        folder.mkdir(parents=True)
        state = {'w': torch.full((2,), float(ord(commit[0])))}
        save_file(state, folder / name) if name.endswith('s') else torch.save(state, folder / name)
        (repo / 'refs').mkdir(exist_ok=True)
        (repo / 'refs' / revision).write_text(commit)
    script = """
import sys
from swin_mm.checkpoints import CheckpointError, read_checkpoint, write_checkpoint
from swin_mm.checkpoints.files import SUFFIXES, current_address
for source in sys.argv[1:]:
    try:
        print(read_checkpoint(source)['w'][0].item())
    except CheckpointError as error:
        print(error)
"""
    sources = ['hf://someone/swin', 'hf://someone/swin@v2', 'hf://someone/swin/pytorch_model.bin@v2']
    sources += ['hf://someone/swin/other.bin', 'hf://nobody/swin', 'hf://swin']
    environment = os.environ | {'HF_HUB_CACHE': str(tmp_path / 'hub'), 'HF_HUB_OFFLINE': '1'}
    done = subprocess.run(
        [sys.executable, '-c', script, *sources], env=environment, capture_output=True, text=True, check=True
    )
    lines = done.stdout.splitlines()
    assert lines[:3] == ['97.0', '98.0', '98.0']
    assert [line.partition(' cannot be read: ')[0] for line in lines[3:5]] == [f'checkpoint {s}' for s in sources[3:5]]
    assert 'expected hf://owner/name' in lines[5]


def test_mmengine_backends_are_asked_for_other_schemes(tmp_path, monkeypatch):
    from mmengine.fileio import LocalBackend, register_backend

    class Store(LocalBackend):
        def get_local_path(self, path):
            return super().get_local_path(str(tmp_path / path.removeprefix('teststore://')))

    register_backend('teststore', Store, prefixes='teststore', force=True)
    torch.save({'w': torch.ones(2)}, tmp_path / 'swin.pth')
    assert torch.equal(loading.read_checkpoint('teststore://swin.pth')['w'], torch.ones(2))
    with pytest.raises(CheckpointError, match='nosuch://swin.pth cannot be read'):
        loading.read_checkpoint('nosuch://swin.pth')
    with pytest.raises(CheckpointError, match='nosuch://swin.pth: expected a path'):
        read_checkpoint('nosuch://swin.pth')


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_writing_is_atomic(tmp_path, monkeypatch, suffix):
    path = tmp_path / f'swin{suffix}'
    write_checkpoint({'w': torch.ones(3)}, path)
    assert torch.equal(read_checkpoint(path)['w'], torch.ones(3))
    with pytest.raises(CheckpointError, match='exists already.*--force'):
        write_checkpoint({'w': torch.zeros(3)}, path)
    write_checkpoint({'w': torch.zeros(3)}, path, force=True)

    def fail(content, file=None, **_):
        if file is not None and Path(file) != path:
            Path(file).write_bytes(b'half')
        raise OSError('disk full')

    monkeypatch.setattr('torch.save', fail)
    monkeypatch.setattr('safetensors.torch.save', fail)
    with pytest.raises(InputError, match=f'{path.name} cannot be written: disk full'):
        write_checkpoint({'w': torch.ones(3)}, path, force=True)
    monkeypatch.undo()
    monkeypatch.setattr('pathlib.Path.replace', fail)
    with pytest.raises(InputError, match=f'{path.name} cannot be written: disk full'):
        write_checkpoint({'w': torch.ones(3)}, path, force=True)
    assert torch.equal(read_checkpoint(path)['w'], torch.zeros(3))
    assert os.listdir(tmp_path) == [path.name]


def test_invalid_targets_are_refused(tmp_path):
    for name, message in {'swin': 'must end in', 'none/swin.pth': 'folder .* does not exist'}.items():
        with pytest.raises(CheckpointError, match=message):
            write_checkpoint({}, tmp_path / name)


def test_tensors_are_read_where_numpy_is_not_installed(tmp_path):
    """torch and safetensors, the only requirements, do not bring it."""
    state = {'w': torch.arange(6.0).view(2, 3), 'empty': torch.ones(0)}
    torch.save(state, tmp_path / 'zip.pth')
    torch.save(state, tmp_path / 'older.pth', _use_new_zipfile_serialization=False)
    save_file(state, tmp_path / 'x.safetensors')
    code = """
import sys
sys.modules.update(numpy=None, mmengine=None)
import torch
from swin_mm.checkpoints import CheckpointError, read_checkpoint, write_checkpoint
for name in ('zip.pth', 'older.pth', 'x.safetensors'):
    state = read_checkpoint(name)
    assert torch.equal(state['w'], torch.arange(6.0).view(2, 3)) and not state['empty'].numel(), name
write_checkpoint(state, 'written.pth')
try:
    write_checkpoint(state, 'written.safetensors')
except CheckpointError as error:
    assert 'install it with: pip install numpy' in str(error), error
"""
    environment = os.environ | {'PYTHONPATH': str(ROOT)}
    done = subprocess.run([sys.executable, '-c', code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    assert torch.equal(read_checkpoint(tmp_path / 'written.pth')['w'], state['w'])


class Site(http.server.BaseHTTPRequestHandler):
    """Files by path and query; those in ``cut`` break off after half of their content."""

    files: ClassVar[dict[str, bytes]] = {}
    cut: ClassVar[set[str]] = set()
    asked: ClassVar[list[str]] = []
    slow: ClassVar[float] = 0  # seconds

    def do_GET(self) -> None:
        """Send a file."""
        self.asked.append(self.path)
        time.sleep(self.slow)
        content = self.files.get(self.path)
        self.send_response(200 if content else 404)
        self.send_header('Content-Length', str(len(content or b'')))
        self.end_headers()
        content = content or b''
        self.wfile.write(content[: len(content) // 2] if self.path in self.cut else content)

    def log_message(self, *_) -> None:
        """Say nothing."""


@pytest.fixture
def site(tmp_path, monkeypatch):
    """The address of a server of such files, and a cache of its own."""
    monkeypatch.setenv('TORCH_HOME', str(tmp_path / 'home'))
    Site.files, Site.cut, Site.asked, Site.slow = {}, set(), [], 0
    with http.server.ThreadingHTTPServer(('127.0.0.1', 0), Site) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f'http://127.0.0.1:{server.server_port}'
        server.shutdown()


def content_of(number: float) -> bytes:
    file = io.BytesIO()
    torch.save({'w': torch.full((2,), number)}, file)
    return file.getvalue()


def test_each_address_is_downloaded_once(site):
    """Also those that differ by folder or query alone."""
    paths = ['/swin.pth', '/other/swin.pth', '/uc?id=1', '/uc?id=2', '/uc', '/uc?id=1&x=..%2F']
    Site.files = {path: content_of(number) for number, path in enumerate(paths)}
    for _ in range(2):
        for number, path in enumerate(paths):
            assert read_checkpoint(site + path)['w'][0] == number
    assert paths == Site.asked
    for path in ('/other/', '', '/a/../swin.pth'):
        with pytest.raises(CheckpointError, match='names no file'):
            read_checkpoint(site + path)
    with pytest.raises(CheckpointError, match='absent.pth cannot be downloaded: .*404'):
        read_checkpoint(f'{site}/absent.pth')


def test_incomplete_downloads_are_not_kept(site, tmp_path):
    Site.files, Site.cut = {'/swin.pth': content_of(1)}, {'/swin.pth'}
    with pytest.raises(CheckpointError, match=r'broke off after [\d,]+ of [\d,]+ bytes; nothing was kept'):
        read_checkpoint(f'{site}/swin.pth')
    assert not [path for path in (tmp_path / 'home').rglob('*') if path.is_file()]
    Site.cut = set()
    assert read_checkpoint(f'{site}/swin.pth')['w'][0] == 1


def test_a_failed_download_says_what_to_get_and_where_to_put_it(site, tmp_path):
    for address in (f'{site}/v1/absent.pth', 'http://127.0.0.1:9/v1/absent.pth'):
        with pytest.raises(
            CheckpointError, match=r'cannot be downloaded: .+; get the file absent.pth by hand'
        ) as caught:
            read_checkpoint(address)
        assert address in str(caught.value)
        place = Path(re.search(r'save it as (\S+),', str(caught.value))[1])
        place.parent.mkdir(parents=True, exist_ok=True)
        place.write_bytes(content_of(3))
        assert read_checkpoint(address)['w'][0] == 3, 'the file that was put there by hand is taken'


def test_errors_of_the_connection_are_not_taken_for_a_full_disk(site, monkeypatch):
    def broken(self, *_):
        raise TimeoutError('timed out')

    Site.files = {'/swin.pth': content_of(1)}
    monkeypatch.setattr('http.client.HTTPResponse.read', broken)
    with pytest.raises(CheckpointError, match='cannot be downloaded: timed out'):
        read_checkpoint(f'{site}/swin.pth')


def test_addresses_at_hosts_that_are_gone_are_read_from_the_new_ones(site, monkeypatch, capsys):
    path = 'mmdetection/v2.0/swin/mask_rcnn_swin-t.pth'
    for scheme in ('http', 'https'):
        assert current_address(f'{scheme}://download.openmmlab.com/{path}') == f'https://mmassets.onedl.ai/{path}'
    for address in (
        f'https://mmassets.onedl.ai/{path}',
        f'https://site/download.openmmlab.com/{path}',
        f'https://download.openmmlab.com.site/{path}',
        f's3://download.openmmlab.com/{path}',
        'download.openmmlab.com/x.pth',
        'open-mmlab://resnet50_v1c',
    ):
        assert current_address(address) == address

    Site.files = {f'/{path}': content_of(2)}
    opened = urllib.request.urlopen

    def to_site(request, **options):
        request.full_url = request.full_url.replace('https://mmassets.onedl.ai', site)
        return opened(request, **options)

    monkeypatch.setattr(urllib.request, 'urlopen', to_site)
    for _ in range(2):
        assert read_checkpoint(f'https://download.openmmlab.com/{path}')['w'][0] == 2
    assert read_checkpoint(f'https://mmassets.onedl.ai/{path}')['w'][0] == 2
    assert Site.asked == [f'/{path}'], 'one file in the cache for both addresses'
    assert capsys.readouterr().err.count('(the host of https://download.openmmlab.com') == 1


def test_several_processes_download_a_file_once(site, tmp_path):
    """The ranks of a run ask for the same weights at the same time."""
    Site.files, Site.slow = {'/swin.pth': content_of(1)}, 2
    code = f'import sys; from swin_mm.checkpoints.files import fetch\nwith fetch("{site}/swin.pth") as p: print(p)'
    ranks = [subprocess.Popen([sys.executable, '-c', code], stdout=subprocess.PIPE, cwd=ROOT) for _ in range(2)]
    assert len({rank.communicate(timeout=100)[0] for rank in ranks}) == 1
    assert [rank.returncode for rank in ranks] == [0, 0]
    assert Site.asked == ['/swin.pth']


def test_the_hash_in_a_name_is_checked(site, tmp_path):
    right = f'/swin-{hashlib.sha256(content_of(1)).hexdigest()[:8]}.pth'
    Site.files = {path: content_of(1) for path in (right, '/swin-deadbeef.pth', '/swin-20211231.pth')}
    with pytest.raises(CheckpointError, match=r'name promises deadbeef\.\.\.; nothing was kept'):
        read_checkpoint(f'{site}/swin-deadbeef.pth')
    assert not [path for path in (tmp_path / 'home').rglob('*') if path.is_file()]
    for path in (right, '/swin-20211231.pth'):
        assert read_checkpoint(site + path)['w'][0] == 1


def test_damaged_downloads_say_where_they_are_cached(tmp_path, monkeypatch):
    monkeypatch.setenv('TORCH_HOME', str(tmp_path))
    kept = tmp_path / 'hub' / 'swin_mm' / 'site' / 'swin.pth'
    kept.parent.mkdir(parents=True)
    kept.write_bytes(b'PK half')
    with pytest.raises(CheckpointError, match=f'https://site/swin.pth is damaged.*cached as {kept}: delete that'):
        read_checkpoint('https://site/swin.pth')
