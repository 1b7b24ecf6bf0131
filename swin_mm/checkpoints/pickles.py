"""Opening pickles without running anything in them.

Pickles name functions and classes and say what to call. Only the names listed here are known, and what they lead to are
stand-ins that make plain data: even numpy's own functions can be told to make arrays of forged pointers.
"""

import io
import pickle
import re
from argparse import Namespace
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor


class DType:
    """Stands in for ``numpy.dtype``: numbers only, no objects and no records."""

    def __init__(self, code: str, *_: Any) -> None:
        if not re.fullmatch(r'b1|[iu][1248]|f[248]', code):
            raise pickle.UnpicklingError(f'arrays of type {code!r} are not numbers')
        self.code, self.order = code, '='

    def __setstate__(self, state: tuple) -> None:
        if state[1] not in ('<', '>', '|', '='):
            raise pickle.UnpicklingError(f'a byte order of {state[1]!r}')
        self.order = state[1]

    def read(self, data: Any, shape: tuple[int, ...], order: str) -> np.ndarray:
        """The numbers in ``data``."""
        if isinstance(data, str):  # bytes of Python 2
            data = data.encode('latin1')
        if not isinstance(data, (bytes, bytearray)):
            raise pickle.UnpicklingError('an array of objects')
        return np.frombuffer(data, np.dtype(self.order + self.code)).reshape(shape, order=order).copy()


class Array:
    """Stands in for ``numpy.ndarray``; ``settle`` puts the array in its place."""

    value: np.ndarray

    def __setstate__(self, state: tuple) -> None:
        _, shape, dtype, fortran, data = state
        self.value = dtype.read(data, shape, 'F' if fortran else 'C')


def _new_array(*_: Any) -> Array:
    """Stands in for ``numpy.core.multiarray._reconstruct``."""
    return Array()


def _scalar(dtype: DType, data: bytes) -> Any:
    """Stands in for ``numpy.core.multiarray.scalar``."""
    return dtype.read(data, (), 'C')[()]


def _array_of_buffer(data: Any, dtype: DType, shape: tuple[int, ...], order: str) -> Array:
    """Stands in for ``numpy.core.numeric._frombuffer``."""
    array = Array()
    array.value = dtype.read(data, shape, order)
    return array


def _no_bytes() -> bytes:
    """Stands in for ``bytes``, which protocol 2 calls for none of them."""
    return b''


# Names that files may use, in the terms of torch.serialization.safe_globals: plain data that training checkpoints hold
# beside tensors. Other modules add what they know of.
ALLOWED: list[tuple[Any, str]] = [
    (DType, 'numpy.dtype'),
    (Array, 'numpy.ndarray'),
    # numpy 2 renamed its core; files carry the name of the version that wrote them.
    *((_new_array, f'numpy.{core}.multiarray._reconstruct') for core in ('core', '_core')),
    *((_scalar, f'numpy.{core}.multiarray.scalar') for core in ('core', '_core')),
    *((_array_of_buffer, f'numpy.{core}.numeric._frombuffer') for core in ('core', '_core')),
    # Settings that official training scripts save along: dicts, of which none of the code is run.
    *((OrderedDict, f'{module}.CfgNode') for module in ('yacs.config', 'fvcore.common.config')),
    (OrderedDict, 'detectron2.config.config.CfgNode'),
    *((_no_bytes, f'{module}.bytes') for module in ('builtins', '__builtin__')),
    (Namespace, 'argparse.Namespace'),
    (Counter, 'collections.Counter'),
]


def read_torch(path: Path, map_location: Any) -> Any:
    """Read what ``torch.save`` wrote, in its zip format or the older one."""
    with torch.serialization.safe_globals(ALLOWED):
        return settle(torch.load(path, map_location=map_location, weights_only=True))


def read_pickle(path: Path, map_location: Any) -> Any:
    """Read what ``pickle.dump`` wrote, as detectron2 and Mask2Former publish: arrays or tensors in dicts."""
    with path.open('rb') as file:
        return settle(_PlainUnpickler(file, map_location).load())


def settle(content: Any) -> Any:
    """Put arrays in the places of their stand-ins, within containers and plain objects."""
    if isinstance(content, Array):
        return content.value
    if isinstance(content, dict):
        for key, value in content.items():
            content[key] = settle(value)
    elif isinstance(content, list):
        content[:] = [settle(value) for value in content]
    elif type(content) is tuple:
        return tuple(settle(value) for value in content)
    elif hasattr(content, '__dict__') and not isinstance(content, (Tensor, type)):
        settle(vars(content))
    return content


class _Call:
    """A function that can be called and not changed."""

    __slots__ = ('_function',)

    def __init__(self, function: Any) -> None:
        object.__setattr__(self, '_function', function)

    def __call__(self, *args: Any) -> Any:
        return self._function(*args)

    def __setattr__(self, name: str, value: Any) -> None:
        raise pickle.UnpicklingError(f'GLOBAL setattr of {name}')


class _PlainUnpickler(pickle.Unpickler):
    """Knows the names of ALLOWED and those of tensors; nothing it makes reaches what the process uses."""

    def __init__(self, file: Any, map_location: Any) -> None:
        super().__init__(file, encoding='latin1')  # written by Python 2, some of them
        self._known: dict[str, Any] = {
            'collections.OrderedDict': OrderedDict,
            '_codecs.encode': _latin1_bytes,
            'torch._utils._rebuild_tensor_v2': torch._utils._rebuild_tensor_v2,
            # torch's own would open the bytes as a pickle without restrictions.
            'torch.storage._load_from_bytes': lambda data: torch.load(
                io.BytesIO(data), map_location=map_location, weights_only=True
            ),
        }
        self._known |= {name: what for what, name in ALLOWED}

    def find_class(self, module: str, name: str) -> Any:
        """What the pickle may name: functions sealed, classes as subclasses of its own, which it may spoil."""
        what = self._known.get(f'{module}.{name}')
        if what is None:
            raise pickle.UnpicklingError(f'GLOBAL {module}.{name}')
        return type(what.__name__, (what,), {}) if isinstance(what, type) else _Call(what)


def _latin1_bytes(text: str, encoding: str) -> bytes:
    """How pickle's protocol 2 writes bytes."""
    if encoding != 'latin1':
        raise pickle.UnpicklingError(f'bytes in {encoding}')
    return text.encode('latin1')
