"""A pickle reader that runs no code and cannot use more memory than the size of the file allows.

A pickle is a program for a small stack machine, which names functions and calls them. This module implements that
machine on the opcodes of :mod:`pickletools`. It accepts a fixed list of names and calls its own functions in their
place, which check their arguments and create plain data: tensors, arrays of numbers, containers. Python's own unpickler
and ``torch.load`` are not used: a file of a few bytes can make both allocate memory or loop without bound.
"""

import ctypes
import io
import math
import pickle
import pickletools
import re
import zipfile
from argparse import Namespace
from collections import Counter, OrderedDict
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, BinaryIO, Literal, cast

import torch
from torch import Tensor, nn

from swin_mm.utils.errors import CheckpointError

try:
    import numpy as np
except ModuleNotFoundError:  # torch works without it, and so do files of tensors
    np = None  # type: ignore[assignment]

MAX_EXPANSION = 8  # times the file's size; a state dict, its moving average and an optimizer share no memory: about 2
HEADROOM = 64 * 2**20  # bytes beyond that, for small files
PER_ITEM = 100  # bytes, about what an entry of a container takes

Names = Mapping[str, Any]  # name in a pickle -> what is called in its place, or the value it stands for


class UnknownName(Exception):
    """A pickle names something that is not on the list."""


class Budget:
    """Memory that reading a file may take, so that small files cannot make large objects.

    Args:
        file_size: bytes of the file.
    """

    def __init__(self, file_size: int) -> None:
        self.total = self.left = MAX_EXPANSION * file_size + HEADROOM

    def spend(self, amount: int) -> None:
        """Take ``amount`` bytes from what is left.

        Raises:
            CheckpointError: there is not that much left.
        """
        self.left -= amount
        if self.left < 0:
            raise CheckpointError(
                f'is not a usual checkpoint: reading it would take more than {self.total / 1e6:,.0f} MB, '
                f'{MAX_EXPANSION} times its size; save its tensors again, contiguous and uncompressed'
            )


@dataclass(frozen=True)
class Callee:
    """A name found in a pickle, and the function to call in its place.

    Args:
        name: as the pickle gives it.
        function: called in its place; None for names that may be mentioned but not called.
    """

    name: str
    function: Callable[..., Any] | None

    def __call__(self, *args: Any) -> Any:
        """Call the function."""
        if self.function is None:
            raise pickle.UnpicklingError(f'a call of {self.name}')
        return self.function(*args)


class Unfinished:
    """An object that a pickle creates first and fills with its state afterwards."""

    def build(self, state: Any) -> Any:
        """Return the finished object, which replaces this one."""
        raise NotImplementedError


class DType(Unfinished):
    """Stands in for ``numpy.dtype``: numbers only, no objects and no records."""

    def __init__(self, code: str, *_: Any) -> None:
        if not (isinstance(code, str) and re.fullmatch(r'b1|[iu][1248]|f[248]', code)):
            raise pickle.UnpicklingError(f'arrays of type {code!r} are not numbers')
        if np is None:
            raise CheckpointError('holds arrays of numpy, which is not installed; install it with: pip install numpy')
        self.dtype = np.dtype(code)

    def build(self, state: tuple) -> 'DType':
        """Set the byte order."""
        if state[1] not in ('<', '>', '|', '='):
            raise pickle.UnpicklingError(f'a byte order of {state[1]!r}')
        self.dtype = self.dtype.newbyteorder(state[1])
        return self


class Array(Unfinished):
    """Stands in for an empty ``numpy.ndarray``."""

    def __init__(self, machine: 'Machine') -> None:
        self._machine = machine

    def build(self, state: tuple) -> 'np.ndarray':
        """The array of a ``numpy.ndarray``'s pickled state."""
        _, shape, dtype, fortran, data = state
        return self._machine.array(data, dtype, shape, 'F' if fortran else 'C')


@dataclass(frozen=True)
class StorageType:
    """Stands in for ``torch.FloatStorage`` and the like; without a dtype for ``UntypedStorage``."""

    dtype: torch.dtype | None


@dataclass(frozen=True)
class Storage:
    """Bytes that tensors are views of.

    Args:
        content: the bytes; None while only the structure of a file is read.
        dtype: of its elements; None if the tensors say.
        size: elements, or bytes without a dtype.
        start: the first element.
    """

    content: torch.UntypedStorage | None
    dtype: torch.dtype | None
    size: int
    start: int = 0


DTYPES = {name: value for name, value in vars(torch).items() if isinstance(value, torch.dtype)}
STORAGES = {
    'Double': torch.float64,
    'Float': torch.float32,
    'Half': torch.float16,
    'BFloat16': torch.bfloat16,
    'Long': torch.int64,
    'Int': torch.int32,
    'Short': torch.int16,
    'Char': torch.int8,
    'Byte': torch.uint8,
    'Bool': torch.bool,
    'ComplexFloat': torch.complex64,
    'ComplexDouble': torch.complex128,
    'Untyped': None,
}
ATOMS: tuple[type, ...] = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device)
ATOMS += () if np is None else (np.generic,)
ARRAYS: tuple[type, ...] = () if np is None else (np.ndarray,)
PUSH = {
    *('INT', 'BININT', 'BININT1', 'BININT2', 'LONG', 'LONG1', 'LONG4', 'FLOAT', 'BINFLOAT'),
    *('STRING', 'BINSTRING', 'SHORT_BINSTRING', 'UNICODE', 'SHORT_BINUNICODE', 'BINUNICODE', 'BINUNICODE8'),
    *('SHORT_BINBYTES', 'BINBYTES', 'BINBYTES8', 'BYTEARRAY8'),
}


class Machine:
    """Runs the opcodes of a pickle.

    Args:
        budget: what it may take.
        names: more names than those of numpy, torch and the standard library that are known here.
        storage: makes the storage that a persistent id names, in files of torch.
        place: where a storage goes: (bytes, its location in the file) -> bytes.
    """

    def __init__(
        self,
        budget: Budget,
        names: Names,
        place: Callable[[Tensor, str], Tensor],
        storage: Callable[[Any], Storage] | None = None,
    ) -> None:
        self.budget, self.place, self.storage = budget, place, storage
        self.extra = names
        self.names = self._known() | dict(names)

    def run(self, file: Any) -> Any:
        """Return the object pickled at the file's position, and advance the position past it."""
        stack: list[Any] = []
        marks: list[int] = []
        memo: dict[int, Any] = {}
        unfinished: dict[int, list[int]] = {}  # id of an object -> where the memo has it

        def after_mark() -> list[Any]:
            start = marks.pop()
            items = stack[start:]
            del stack[start:]
            return items

        def put(index: int) -> None:
            memo[index] = value = stack[-1]
            if isinstance(value, Unfinished):
                unfinished.setdefault(id(value), []).append(index)

        def pop(count: int) -> list[Any]:
            if marks and len(stack) - marks[-1] < count:
                raise pickle.UnpicklingError('too few values on the stack')
            items = stack[-count:]
            del stack[-count:]
            if len(items) < count:
                raise pickle.UnpicklingError('too few values on the stack')
            return items

        argument: Any
        for opcode, argument, _ in pickletools.genops(file):
            name = opcode.name
            if name in PUSH:
                stack.append(argument)
                continue
            match name:
                case 'BINPUT' | 'LONG_BINPUT' | 'PUT':
                    put(argument)
                case 'MEMOIZE':
                    put(len(memo))
                case 'BINGET' | 'LONG_BINGET' | 'GET':
                    stack.append(memo[argument])
                case 'MARK':
                    marks.append(len(stack))
                case 'NONE':
                    stack.append(None)
                case 'NEWTRUE' | 'NEWFALSE':
                    stack.append(name == 'NEWTRUE')
                case 'EMPTY_TUPLE':
                    stack.append(())
                case 'TUPLE1' | 'TUPLE2' | 'TUPLE3':
                    stack.append(tuple(pop(int(name[-1]))))
                case 'TUPLE':
                    stack.append(tuple(after_mark()))
                case 'EMPTY_LIST':
                    stack.append([])
                case 'LIST':
                    stack.append(after_mark())
                case 'APPEND' | 'APPENDS':
                    items = pop(1) if name == 'APPEND' else after_mark()
                    _instance(stack[-1], list).extend(items)
                case 'EMPTY_DICT':
                    stack.append({})
                case 'DICT':
                    items = after_mark()
                    stack.append(_pairs(items))
                case 'SETITEM' | 'SETITEMS':
                    items = pop(2) if name == 'SETITEM' else after_mark()
                    _instance(stack[-1], dict).update(_pairs(items))
                case 'EMPTY_SET':
                    stack.append(set())
                case 'ADDITEMS':
                    items = _keys(after_mark())
                    _instance(stack[-1], set).update(items)
                case 'FROZENSET':
                    stack.append(frozenset(_keys(after_mark())))
                case 'GLOBAL':
                    stack.append(self._find('.'.join(argument.split(' ', 1))))
                case 'STACK_GLOBAL':
                    stack.append(self._find('.'.join(pop(2))))
                case 'REDUCE' | 'NEWOBJ':
                    function, args = pop(2)
                    stack.append(_instance(function, Callee)(*_instance(args, tuple)))
                case 'NEWOBJ_EX':
                    function, args, options = pop(3)
                    if options:
                        raise pickle.UnpicklingError('an object made with keyword arguments')
                    stack.append(_instance(function, Callee)(*_instance(args, tuple)))
                case 'INST':
                    args = after_mark()
                    stack.append(_instance(self._find('.'.join(argument.split(' ', 1))), Callee)(*args))
                case 'OBJ':
                    function, *args = after_mark()
                    stack.append(_instance(function, Callee)(*args))
                case 'BUILD':
                    (state,) = pop(1)
                    value = stack[-1]
                    stack[-1] = self._build(value, state)
                    if stack[-1] is not value:
                        for index in unfinished.pop(id(value), []):
                            memo[index] = stack[-1]
                case 'BINPERSID':
                    if self.storage is None:
                        raise pickle.UnpicklingError('a reference to outside of the file')
                    stack.append(self.storage(*pop(1)))
                case 'POP':
                    if marks and marks[-1] == len(stack):
                        marks.pop()
                    else:
                        pop(1)
                case 'POP_MARK':
                    after_mark()
                case 'DUP':
                    stack.append(stack[-1])
                case 'PROTO' | 'FRAME':
                    pass
                case 'STOP':
                    return stack.pop()
                case _:
                    raise pickle.UnpicklingError(f'opcode {name}')
        raise pickle.UnpicklingError('it ends too early')

    def _find(self, name: str) -> Any:
        if name not in self.names:
            raise UnknownName(name)
        value = self.names[name]
        return Callee(name, value) if callable(value) or value is None else value

    def _build(self, value: Any, state: Any) -> Any:
        """Give an object its state."""
        if isinstance(value, Unfinished):
            return value.build(state)
        if isinstance(state, tuple) and len(state) == 2:
            state = state[0]  # the second is for slots
        state = _instance(state, dict) if state is not None else {}
        self.budget.spend(PER_ITEM * len(state))
        if isinstance(value, OrderedDict):
            # Other attributes of dictionaries are dropped; torch keeps the versions of modules in this one.
            if isinstance(state.get('_metadata'), dict):
                value._metadata = state['_metadata']  # type: ignore[attr-defined]  # not in OrderedDict's type
        elif isinstance(value, Namespace):
            vars(value).update({key: item for key, item in state.items() if isinstance(key, str)})
        elif state and not isinstance(value, dict | Tensor):
            raise pickle.UnpicklingError(f'attributes for a {type(value).__name__}')
        return value

    def _known(self) -> dict[str, Any]:
        """The names of plain data in checkpoints, and those with which numpy and torch write numbers."""
        known: dict[str, Any] = {
            'numpy.dtype': DType,
            'numpy.ndarray': None,
            'collections.OrderedDict': self._ordered_dict,
            'collections.defaultdict': lambda *_: {},
            'collections.Counter': self._counter,
            'argparse.Namespace': lambda: Namespace(),
            '_codecs.encode': self._encode,
            'torch.storage._load_from_bytes': self._load_from_bytes,
            'torch._utils._rebuild_tensor': self._tensor,
            'torch._utils._rebuild_tensor_v2': self._tensor,
            'torch._utils._rebuild_tensor_v3': lambda s, o, n, t, grad, hooks, dtype, *_: self._tensor(
                s, o, n, t, grad, dtype=dtype
            ),
            'torch._utils._rebuild_parameter': _parameter,
            'torch._utils._rebuild_parameter_with_state': _parameter,
            'torch._tensor._rebuild_from_type_v2': lambda function, kind, args, state: _instance(function, Callee)(
                *args
            ),
            'torch.Tensor': None,
            'torch.nn.parameter.Parameter': None,
            'torch.Size': lambda sizes: torch.Size(_whole_numbers(sizes)),
            'torch.device': lambda kind, *index: torch.device(_instance(kind, str), *index),
            'torch.serialization._get_layout': lambda name: torch.strided,
        }
        # numpy 2 renamed its core; files carry the name of the version that wrote them.
        for core in ('core', '_core'):
            known[f'numpy.{core}.multiarray._reconstruct'] = lambda *_: Array(self)
            known[f'numpy.{core}.multiarray.scalar'] = lambda dtype, data: self.array(data, dtype, (), 'C')[()]
            known[f'numpy.{core}.numeric._frombuffer'] = self.array
        # Settings that official training scripts save along, without the code of their class.
        for settings in ('yacs.config', 'fvcore.common.config', 'detectron2.config.config'):
            known[f'{settings}.CfgNode'] = lambda: OrderedDict()
        for builtins in ('builtins', '__builtin__'):
            known[f'{builtins}.bytes'] = lambda: b''
            known[f'{builtins}.bytearray'] = lambda *args: bytearray(self._encode(*args) if args else b'')
            known[f'{builtins}.set'] = self._set
            known[f'{builtins}.frozenset'] = lambda *items: frozenset(self._set(*items))
            known[f'{builtins}.complex'] = lambda real, imaginary: complex(
                _instance(real, float), _instance(imaginary, float)
            )
        known |= {f'torch.{name}': dtype for name, dtype in DTYPES.items()}
        for module in ('torch', 'torch.storage', 'torch.cuda'):
            known |= {f'{module}.{name}Storage': StorageType(dtype) for name, dtype in STORAGES.items()}
        return known

    def array(self, data: Any, dtype: Any, shape: Any, order: str) -> 'np.ndarray':
        """An array of the numbers in ``data``; the signature is numpy's ``_frombuffer``."""
        if isinstance(data, str):  # bytes of Python 2
            data = data.encode('latin1')
        if not isinstance(data, bytes | bytearray):
            raise pickle.UnpicklingError('an array of objects')
        self.budget.spend(len(data) + PER_ITEM)
        if order not in ('C', 'F'):
            raise pickle.UnpicklingError(f'an array in the order {order!r}')
        kind = _instance(dtype, DType).dtype
        layout = cast(Literal['C', 'F'], order)
        return np.frombuffer(data, kind).reshape(_whole_numbers(shape), order=layout).copy(layout)

    def _encode(self, data: Any, encoding: str = 'latin1') -> bytes:
        """``_codecs.encode``, with which pickle protocol 2 writes bytes."""
        if encoding not in ('latin1', 'latin-1'):
            raise pickle.UnpicklingError(f'bytes in {encoding}')
        self.budget.spend(len(_instance(data, (str, bytes))))
        return data.encode('latin1') if isinstance(data, str) else data

    def _ordered_dict(self, pairs: Any = ()) -> OrderedDict:
        self.budget.spend(PER_ITEM * len(_instance(pairs, (list, tuple))))
        return OrderedDict(_pairs([part for pair in pairs for part in _of_two(pair)]))

    def _counter(self, counts: Any = None) -> Counter:
        counts = _instance(counts, dict) if counts is not None else {}
        self.budget.spend(PER_ITEM * len(counts))
        return Counter(counts)

    def _set(self, items: Any = ()) -> set:
        self.budget.spend(PER_ITEM * len(_instance(items, (list, tuple))))
        return set(_keys(items))

    def _load_from_bytes(self, data: Any) -> Any:
        """A file of torch within a pickle, as ``pickle.dumps`` writes tensors."""
        self.budget.spend(len(_instance(data, (bytes, bytearray))))
        return read_torch(io.BytesIO(data), len(data), self.budget, self.extra, self.place)

    def _tensor(
        self,
        storage: Any,
        offset: Any,
        size: Any,
        stride: Any,
        requires_grad: Any = False,
        *_: Any,
        dtype: torch.dtype | None = None,
    ) -> Tensor:
        """A tensor as a view of a storage, within its bounds."""
        size, stride, (offset,) = _whole_numbers(size), _whole_numbers(stride), _whole_numbers([offset])
        dtype = dtype or _instance(storage, Storage).dtype
        if not isinstance(dtype, torch.dtype) or len(size) != len(stride) or len(size) > 64:
            raise pickle.UnpicklingError('a malformed tensor')
        count, elements = math.prod(size), storage.size if storage.dtype else storage.size // dtype.itemsize
        if count and offset + sum((n - 1) * step for n, step in zip(size, stride, strict=True)) >= elements:
            raise pickle.UnpicklingError('a tensor beyond the end of its storage')
        self.budget.spend(count * dtype.itemsize + PER_ITEM)
        if storage.content is None:
            return torch.empty(0, dtype=dtype)
        tensor = torch.empty(0, dtype=dtype, device=storage.content.device)
        tensor.set_(storage.content, storage.start + offset if count else 0, size, stride)
        return tensor.requires_grad_() if requires_grad is True and tensor.is_floating_point() else tensor


def _parameter(data: Any, requires_grad: Any, *_: Any) -> nn.Parameter:
    return nn.Parameter(_instance(data, Tensor), requires_grad=bool(requires_grad))


def _instance(value: Any, kind: Any) -> Any:
    """The value, if it is of a type."""
    if not isinstance(value, kind):
        raise pickle.UnpicklingError(f'an unexpected {type(value).__name__}')
    return value


def _of_two(pair: Any) -> Any:
    if len(_instance(pair, (list, tuple))) != 2:
        raise pickle.UnpicklingError('a pair that is not of two')
    return pair


def _keys(items: Iterable[Any]) -> list[Any]:
    """Values to be hashed: atoms or flat tuples, since the hash of nested ones may take exponential time."""
    items = list(items)
    for item in items:
        parts = item if isinstance(item, tuple) else (item,)
        if not all(isinstance(part, ATOMS) for part in parts):
            raise pickle.UnpicklingError('a key that is not a plain value')
    return items


def _pairs(items: list[Any]) -> dict[Any, Any]:
    """A dictionary of keys and values in turn."""
    if len(items) % 2:
        raise pickle.UnpicklingError('a key without a value')
    return dict(zip(_keys(items[::2]), items[1::2], strict=True))


def _whole_numbers(values: Any) -> tuple[int, ...]:
    values = tuple(_instance(values, (tuple, list)))
    if not all(isinstance(value, int) and 0 <= value < 2**63 for value in values):
        raise pickle.UnpicklingError('a size that is not a whole number from 0 up')
    return values


class BoundedFile:
    """A file whose ``read`` does not allocate more than there is to read, whatever the pickle claims."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self._file, self._size = file, size
        self.readline, self.tell, self.seek = file.readline, file.tell, file.seek

    def read(self, count: int) -> bytes:
        """Up to ``count`` bytes."""
        return self._file.read(count if count < 2**16 else max(min(count, self._size - self.tell()), 0))

    def fill(self, size: int) -> Tensor:
        """The next bytes as a tensor."""
        if size > self._size - self.tell():
            raise pickle.UnpicklingError('it ends too early')
        content = torch.empty(size, dtype=torch.uint8)
        # Every binary file has readinto, but BinaryIO does not declare it.
        if size and self._file.readinto(_memory(content)) != size:  # type: ignore[attr-defined]
            raise pickle.UnpicklingError('it ends too early')
        return content


def _memory(content: Tensor) -> memoryview:
    """The memory of a tensor of bytes on the CPU, to write to; ``Tensor.numpy`` would need numpy."""
    memory = (ctypes.c_ubyte * content.numel()).from_address(content.data_ptr())
    memory.owner = content  # type: ignore[attr-defined]  # the tensor lives as long as the view
    return memoryview(memory)


def read_pickle(file: BinaryIO, size: int, budget: Budget, names: Names, place: Callable[..., Tensor]) -> Any:
    """Read what ``pickle.dump`` wrote, as detectron2 and Mask2Former publish: arrays or tensors in dicts."""
    return Machine(budget, names, place).run(BoundedFile(file, size))


def read_torch(file: BinaryIO, size: int, budget: Budget, names: Names, place: Callable[..., Tensor]) -> Any:
    """Read what ``torch.save`` wrote, in its zip format or the older one."""
    start = file.tell()
    head = file.read(2)
    file.seek(start)
    return (_read_zip if head == b'PK' else _read_older)(file, size, budget, names, place)


def _storage_id(value: Any) -> tuple[StorageType, str, str, int, Any]:
    """(type, key, location, elements, view) of a persistent id."""
    word, kind, key, location, size, *view = _instance(value, tuple)
    if word != 'storage':
        raise pickle.UnpicklingError('a reference to something else than a storage')
    (size,) = _whole_numbers([size])
    found = _instance(view[0], tuple) if view and view[0] is not None else None
    return _instance(kind, StorageType), _instance(key, str), _instance(location, str), size, found


def _read_zip(file: BinaryIO, _: int, budget: Budget, names: Names, place: Callable[..., Tensor]) -> Any:
    with zipfile.ZipFile(file) as archive:
        members = {info.filename: info for info in archive.infolist()}
        if any(name.endswith('/constants.pkl') for name in members):
            raise CheckpointError('is a TorchScript program, not a checkpoint; use the state_dict it was made from')
        roots = [name.removesuffix('data.pkl') for name in members if name.endswith('/data.pkl')]
        if len(roots) != 1:
            raise CheckpointError('is a zip archive, but not one that torch.save wrote; name a checkpoint in it')
        (root,) = roots
        if f'{root}byteorder' in members and archive.read(f'{root}byteorder') not in (b'little', b''):
            raise CheckpointError('was written on a big-endian machine; save it again on a little-endian machine')
        loaded: dict[str, Tensor] = {}

        def member(info: zipfile.ZipInfo) -> Tensor:
            """The bytes of a member, with its checksum compared."""
            budget.spend(info.file_size)
            content = torch.empty(info.file_size, dtype=torch.uint8)
            view, done = _memory(content), 0
            with archive.open(info) as part:
                # Its type IO does not declare readinto.
                while count := part.readinto(view[done : done + 2**22]):  # type: ignore[attr-defined]
                    done += count
                if done != info.file_size or part.read(1):
                    raise pickle.UnpicklingError(f'its part {info.filename} is cut off')
            return content

        def storage(identity: Any) -> Storage:
            kind, key, location, size, _ = _storage_id(identity)
            if key not in loaded:
                loaded[key] = place(member(members[f'{root}data/{key}']), location)
            if size * (kind.dtype.itemsize if kind.dtype else 1) != loaded[key].numel():
                raise pickle.UnpicklingError(f'storage {key} is not as long as the pickle says')
            return Storage(loaded[key].untyped_storage(), kind.dtype, size)

        program = _memory(member(members[f'{root}data.pkl'])).tobytes()
        return Machine(budget, names, place, storage).run(io.BytesIO(program))


def _read_older(file: BinaryIO, size: int, budget: Budget, names: Names, place: Callable[..., Tensor]) -> Any:
    """Pickles of a magic number, a version, the system, the content and the storages' keys; then the storages."""
    bounded = BoundedFile(file, size)
    for _ in range(3):
        Machine(budget, {}, place).run(bounded)
    start = bounded.tell()
    asked: dict[str, tuple[StorageType, int, str]] = {}
    loaded: dict[str, Tensor] = {}

    def storage(identity: Any) -> Storage:
        kind, key, location, size, view = _storage_id(identity)
        asked.setdefault(key, (kind, size, location))
        whole = Storage(loaded[key].untyped_storage() if key in loaded else None, kind.dtype, size)
        if kind != asked[key][0] or size != asked[key][1]:
            raise pickle.UnpicklingError(f'storage {key} has two lengths')
        if view is None:
            return whole
        _, offset, length = view
        _whole_numbers([offset, length])
        if offset + length > size:
            raise pickle.UnpicklingError('a view beyond the end of its storage')
        return replace(whole, size=length, start=offset)

    # The content comes before the storages: run it once to learn what they are, then again with them.
    Machine(Budget(size), names, place, storage).run(bounded)
    for key in _instance(Machine(budget, {}, place).run(bounded), list):
        kind, count, location = asked[key]
        if int.from_bytes(bounded.read(8), 'little') != count:
            raise pickle.UnpicklingError(f'storage {key} is not as long as the pickle says')
        amount = count * (kind.dtype.itemsize if kind.dtype else 1)
        budget.spend(amount)
        loaded[key] = place(bounded.fill(amount), location)
    if asked.keys() - loaded.keys():
        raise pickle.UnpicklingError('it ends too early')
    bounded.seek(start)
    return Machine(budget, names, place, storage).run(bounded)


def placement(map_location: Any) -> Callable[[Tensor, str], Tensor]:
    """Where storages go, for a ``map_location`` as ``torch.load`` takes it."""

    def place(content: Tensor, location: str) -> Tensor:
        if callable(map_location):
            moved = map_location(content.untyped_storage(), location)
            target = content.device if moved is None else moved.device
        elif isinstance(map_location, Mapping):
            target = map_location.get(location, location)
        else:
            target = location if map_location is None else map_location
        return content.to(target)

    return place
