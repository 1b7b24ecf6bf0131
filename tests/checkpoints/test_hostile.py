"""Small hostile files take neither much time nor much memory, and run nothing."""

import io
import os
import pickle
import signal
import time
import zipfile
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from support.oracles import SMALL

import swin_mm
from swin_mm.checkpoints import CheckpointError, adapt, convert, parse, read_checkpoint, unwrap
from swin_mm.checkpoints.pickles import HEADROOM, MAX_EXPANSION

SECONDS = 10
SLACK = 64 * 2**20


def status(field: str) -> int:
    """Bytes that /proc tells of this process."""
    line = next(line for line in Path('/proc/self/status').read_text().splitlines() if line.startswith(field))
    return 1024 * int(line.split()[1])


@contextmanager
def bounds(file_size: int):
    """Time and memory that a file of this size may take."""

    def too_long(*_) -> None:
        raise AssertionError('it hangs')

    previous = signal.signal(signal.SIGALRM, too_long)
    signal.alarm(2 * SECONDS)
    Path('/proc/self/clear_refs').write_text('5')  # forget the peak
    before, start = status('VmRSS'), time.process_time()
    try:
        yield
    finally:
        signal.alarm(0)
        signal.signal(signal.SIGALRM, previous)
    assert time.process_time() - start < SECONDS
    assert status('VmHWM') - before < MAX_EXPANSION * file_size + HEADROOM + SLACK


class Reduced:
    """Pickles as a call."""

    def __init__(self, *call) -> None:
        self.call = call

    def __reduce__(self):
        return self.call


def torch_zip(content, storages: dict[str, bytes], compression: int = zipfile.ZIP_STORED) -> bytes:
    """A file in torch's zip format; ``('id', ...)`` tuples become persistent ids of storages."""

    class Pickler(pickle.Pickler):
        def persistent_id(self, value):
            return value[1:] if isinstance(value, tuple) and value[:1] == ('id',) else None

    program, file = io.BytesIO(), io.BytesIO()
    Pickler(program, protocol=2).dump(content)
    with zipfile.ZipFile(file, 'w', compression) as archive:
        archive.writestr('a/data.pkl', program.getvalue())
        for key, data in storages.items():
            archive.writestr(f'a/data/{key}', data)
    return file.getvalue()


def tensor(size: tuple, stride: tuple, elements: int, offset: int = 0, key: str = '0') -> Reduced:
    storage = ('id', 'storage', torch.FloatStorage, key, 'cpu', elements)
    return Reduced(torch._utils._rebuild_tensor_v2, (storage, offset, size, stride, False, {}))


def saved(content, **options) -> bytes:
    file = io.BytesIO()
    torch.save(content, file, **options)
    return file.getvalue()


def doubling(kind: Callable) -> object:
    """Nested containers that a visitor without memory visits 2 ** 60 times."""
    value = kind()
    for _ in range(60):
        value = kind((value, value))
    return value


def key_of_nested_tuples() -> bytes:
    """A dictionary whose key is such a tuple; making it takes 2 ** 31 steps, which no signal interrupts."""
    return b'\x80\x02})' + b'2\x86' * 31 + b'K\x01s.'


def repeated(data: bytes, times: int, use: bytes) -> bytes:
    """A pickle that makes something of the same bytes again and again."""
    text = b'X' + len(data).to_bytes(4, 'little') + data + b'q\x00'
    return b'\x80\x02(' + text + times * use + b'l.'


def encode_call() -> bytes:
    return b'c_codecs\nencode\nh\x00X\x06\x00\x00\x00latin1\x86R'


def huge(opcode: bytes, width: int = 8) -> bytes:
    """A length of a terabyte, or what fits."""
    return b'\x80\x05' + opcode + min(2**40, 2 ** (8 * width - 1) - 1).to_bytes(width, 'little') + b'abc.'


def flat_settings() -> bytes:
    """Attributes copied into an object again and again."""
    entries = b''.join(b'X\x06\x00\x00\x00%06dK\x01' % i for i in range(3000))
    make = b'cargparse\nNamespace\n)R'
    return b'\x80\x02(}q\x00(' + entries + b'u' + 20000 * (make + b'h\x00b') + b'l.'


ZEROS = bytes(200 * 2**20)

# Each expands or loops in a reader without bounds. True: it is harmless and opens.
HOSTILE = {
    'expanded tensor': (lambda: saved({'w': torch.zeros(1).expand(400_000_000)}), False),
    'expanded tensor, older format': (
        lambda: saved({'w': torch.zeros(1).expand(400_000_000)}, _use_new_zipfile_serialization=False),
        False,
    ),
    'expanded tensor in a pickle': (lambda: pickle.dumps({'w': torch.zeros(1).expand(400_000_000)}), False),
    'many expanded tensors': (lambda: saved({str(i): torch.zeros(1).expand(4_000_000) for i in range(100)}), False),
    'tensor beyond its storage': (lambda: torch_zip(tensor((10**10,), (1,), 1), {'0': bytes(4)}), False),
    'tensor of negative stride': (lambda: torch_zip(tensor((2,), (-1,), 1, 1), {'0': bytes(4)}), False),
    'storage longer than its file': (lambda: torch_zip(tensor((1,), (1,), 10**12), {'0': bytes(4)}), False),
    'deflated storage': (
        lambda: torch_zip(tensor((1,), (1,), len(ZEROS) // 4), {'0': ZEROS}, zipfile.ZIP_DEFLATED),
        False,
    ),
    'deflated program': (lambda: torch_zip('x' * len(ZEROS), {}, zipfile.ZIP_DEFLATED), False),
    'shared lists, zip': (lambda: saved({'w': torch.ones(1), 'x': doubling(list)}), True),
    'shared lists, older': (
        lambda: saved({'w': torch.ones(1), 'x': doubling(list)}, _use_new_zipfile_serialization=False),
        True,
    ),
    'shared tuples, pickle': (lambda: pickle.dumps({'w': np.ones(1), 'x': doubling(tuple)}), True),
    'key of nested tuples': (key_of_nested_tuples, False),
    'list in itself, deep': (lambda: b'\x80\x02' + b']' * 100_000 + b'a' * 99_999 + b'.', True),
    'bytes encoded again and again': (lambda: repeated(b'x' * 100_000, 50_000, encode_call()), False),
    'settings again and again': (flat_settings, False),
    'memo index': (lambda: b'\x80\x02}r\xff\xff\xff\x7f.', True),
    'long bytes': (lambda: huge(b'\x8e'), False),
    'long text': (lambda: huge(b'\x8d'), False),
    'long bytearray': (lambda: huge(b'\x96'), False),
    'long string': (lambda: huge(b'T', 4), False),
    'long integer': (lambda: huge(b'\x8b', 4), False),
    'bytearray by size': (
        lambda: b'\x80\x02c__builtin__\nbytearray\n\x8a\x08' + (2**40).to_bytes(8, 'little') + b'\x85R.',
        False,
    ),
    'number of many digits': (lambda: b'\x80\x02L' + b'9' * 10**6 + b'L\n.', False),
    'files within files': (lambda: pickle.dumps([torch.ones(1)] * 3), True),
}


@pytest.mark.parametrize('kind', HOSTILE)
def test_small_files_use_little_memory_and_time(tmp_path, kind):
    make, opens = HOSTILE[kind]
    file = tmp_path / 'hostile.pth'
    file.write_bytes(make())
    with bounds(file.stat().st_size):
        if opens:
            read_checkpoint(file)
        else:
            with pytest.raises(CheckpointError, match='hostile.pth ') as caught:
                read_checkpoint(file)
            assert '\n' not in str(caught.value)


def test_pipes_and_devices_are_not_opened(tmp_path):
    os.mkfifo(tmp_path / 'pipe')
    for path in (tmp_path / 'pipe', Path('/dev/zero')):
        with bounds(0), pytest.raises(CheckpointError, match='is not a regular file'):
            read_checkpoint(path)


SWIN = {'patch_embed.proj.weight': torch.zeros(32, 3, 4, 4), 'layers.0.blocks.0.norm1.weight': torch.zeros(32)}
SMALL_WEIGHT = torch.zeros(1)

# State dicts whose keys or shapes claim a model of any size.
STATES = {
    'stage': lambda: SWIN | {'layers.1000000000.blocks.0.norm1.weight': SMALL_WEIGHT},
    'block': lambda: SWIN | {'layers.0.blocks.1000000000.norm1.weight': SMALL_WEIGHT},
    'digits': lambda: SWIN | {f'layers.{"9" * 5000}.blocks.0.norm1.weight': SMALL_WEIGHT},
    'many stages': lambda: SWIN | {f'layers.{i}.blocks.0.norm1.weight': SMALL_WEIGHT for i in range(20_000)},
    'many backbones': lambda: {f'x{i}.{key}': value for i in range(5_000) for key, value in SWIN.items()},
    'large patch': lambda: SWIN | {'patch_embed.proj.weight': torch.zeros(32, 1, 300, 300)},
    'empty patch': lambda: SWIN | {'patch_embed.proj.weight': torch.zeros(32, 0, 10**5, 10**5)},
    'empty table': lambda: SWIN | {'layers.0.blocks.0.attn.relative_position_bias_table': torch.zeros(0, 1)},
    'empty position': lambda: SWIN | {'absolute_pos_embed': torch.zeros(1, 32, 0, 0)},
    'scalar': lambda: SWIN | {'patch_embed.proj.weight': torch.zeros(())},
    'long key': lambda: SWIN | {'layers.0.blocks.0.' + 'attn.' * 200_000 + 'logit_scale': SMALL_WEIGHT},
}


@pytest.mark.parametrize('kind', STATES)
def test_keys_and_shapes_cannot_exhaust_time_or_memory(kind):
    state = STATES[kind]()
    model = swin_mm.SwinTransformer(**SMALL, use_abs_pos_embed=True)
    size = sum(len(key) + value.nbytes for key, value in state.items())
    with bounds(size), pytest.raises(CheckpointError) as caught:
        adapt(state, model)
    assert len(str(caught.value)) < 2000


@pytest.mark.parametrize('target', ['official', 'torchvision'])
def test_conversions_reject_tables_much_larger_than_the_weights(target):
    state = swin_mm.SwinTransformer(**SMALL, window_size=7).state_dict()
    table = 'layers.0.blocks.0.attn.relative_position_bias_table'
    state = state | {key.replace('norm3', 'norm'): value for key, value in state.items() if 'norm3' in key}
    state = {key: value for key, value in state.items() if 'norm' not in key.split('.')[0] or key[:5] == 'norm.'}
    state |= {'head.weight': torch.zeros(10, 256), table: torch.zeros(399**2, 1)}
    size = sum(value.nbytes for value in state.values())
    with bounds(size), pytest.raises(CheckpointError, match='windows of 200, which would take 2. GB'):
        convert(parse(state), target)


def test_unwrap_terminates_on_cyclic_content(tmp_path):
    """unwrap looks for a state dict in content that refers to itself."""
    content: dict = {'w': torch.ones(1)}
    content['model'] = content
    (tmp_path / 'a.pkl').write_bytes(pickle.dumps(content))
    with bounds(1000):
        assert unwrap(read_checkpoint(tmp_path / 'a.pkl'))['w'] == 1
