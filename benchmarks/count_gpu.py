"""Kernel launches and bytes moved on a GPU, counted without one: every step runs on meta tensors, which have no data.

A launch is an operator that reaches PyTorch's dispatcher below autograd, except views and allocations; operators that
are known to start several kernels count as many. Bytes are those of an operator's inputs and outputs. Both are lower
bounds: some operators take further kernels or passes, and a matrix product may read its inputs more than once. Autocast
does not act on meta tensors; :class:`EmulatedAutocast` casts where CUDA's would.
"""

import importlib.util
import json
from collections import Counter
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.candidates import CANDIDATES, INFER, OPTIMIZED, TRAIN, Case, optimized
from benchmarks.report import print_table
from swin_mm.ops import fused_norm
from swin_mm.ops.attention import triton as kernel
from swin_mm.utils.files import atomic_write

PROGRAMS = 132 * kernel.PROGRAMS_PER_SM['backward']  # of attention's backward that an H100 runs at a time
META = torch.device('meta')
# Operators that start no kernel though their schema does not say that they return a view.
FREE = {
    *('_unsafe_view', '_reshape_alias', 'detach', 'lift_fresh', 'empty', 'empty_like', 'empty_strided'),
    *('new_empty', 'new_empty_strided', 'view_as_real', 'record_stream', 'set_', 'promote_types'),
}
GATHER = {'index', 'index_select', 'gather', 'embedding'}  # read as much of their first input as they write
# Operators of PyTorch that start several kernels: zeros and a copy; the input's gradient and those of the parameters;
# sorting the indices.
SEVERAL = {
    **{'slice_backward': 2, 'select_backward': 2, 'native_layer_norm_backward': 2, 'convolution_backward': 2},
    'index_put': 6,
}
DENSE = {'native_layer_norm', 'native_layer_norm_backward', 'add_norm'}  # copy inputs that are not contiguous
OVERWRITE = {'copy_', 'fill_', 'zero_', 'bernoulli_', 'normal_', 'uniform_'}  # do not read what they write to


class LaunchCounter(TorchDispatchMode):
    """Counts launches and bytes of each operator that runs under it."""

    def __init__(self) -> None:
        """Start from zero."""
        super().__init__()
        self.launches: Counter[str] = Counter()
        self.bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run an operator and count it."""
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.partition('::')[2]
        if name not in FREE and not _is_view(func):
            own = OWN.get(func._schema.name)
            launches, extra = own(args, out) if own else (SEVERAL.get(name, 1), 0)
            copies = [t for t in _tensors(args[:2]) if name in DENSE and not t.is_contiguous()]
            self.launches[name] += launches + len(copies)
            self.bytes[name] += _bytes(name, args, kwargs or {}, out) + extra + 2 * sum(map(size_in_memory, copies))
        return out

    def total(self) -> tuple[int, int]:
        """All launches and bytes so far."""
        return self.launches.total(), self.bytes.total()


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    return bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)


def size_in_memory(tensor: Tensor) -> int:
    """Bytes that a tensor covers; expanded axes count once."""
    sides = (1 if stride == 0 else side for side, stride in zip(tensor.shape, tensor.stride(), strict=True))
    return tensor.element_size() * torch.Size(sides).numel()


def _tensors(value: Any) -> list[Tensor]:
    """All tensors in nested sequences and dicts."""
    if isinstance(value, Tensor):
        return [value]
    parts = value.values() if isinstance(value, dict) else value if isinstance(value, list | tuple) else ()
    return [tensor for part in parts for tensor in _tensors(part)]


def _bytes(name: str, args: tuple, kwargs: dict, out: Any) -> int:
    read = [size_in_memory(t) for t in _tensors((args, kwargs))]
    written = sum(size_in_memory(t) for t in _tensors(out))
    if name in OVERWRITE:
        read = read[1:]
    if name in GATHER:
        read[0] = min(read[0], written)
    return sum(read) + written


def _attention_backward(args: tuple, out: Any) -> tuple[int, int]:
    """The kernels of :mod:`swin_mm.ops.attention.triton`, and the sums of partial gradients."""
    _, qkv, _, bias, *_, window, _ = args
    heads, N, _ = bias.shape
    windows = qkv.shape[0] * -(-qkv.shape[1] // window[0]) * -(-qkv.shape[2] // window[1])
    blocks = -(-N // kernel.TILE)
    programs = max(1, min(windows, PROGRAMS // (heads * blocks**2)))
    # One kernel, or three; and the sums of partial gradients of bias and padding.
    return (1 if blocks == 1 else 3) + 2, 2 * programs * heads * N * N * 4


def _attention_forward(args: tuple, out: Any) -> tuple[int, int]:
    """The cast of padding, if there is one, and the kernel."""
    return 1 + (args[0].dtype != args[1].dtype), 0


def _norm_backward(args: tuple, out: Any) -> tuple[int, int]:
    """A kernel of :mod:`swin_mm.ops.fused_norm`, and the sum of partial gradients."""
    return 2, 2 * fused_norm.PROGRAMS * size_in_memory(out[-1])


# Launches, and bytes besides inputs and outputs, of operators of this package that start several kernels.
OWN: dict[str, Callable[[tuple, Any], tuple[int, int]]] = {
    'swin_mm::window_attention': _attention_forward,
    'swin_mm::window_attention_backward': _attention_backward,
    'swin_mm::add_norm_backward': _norm_backward,
    'swin_mm::norm_add_backward': _norm_backward,
    'swin_mm::merge_norm_backward': _norm_backward,
}


# Operators that a compiler calls as they are; it writes kernels for all others.
EXTERNAL = {
    *('mm', 'addmm', 'bmm', 'convolution', 'convolution_backward', 'window_attention', 'window_attention_backward'),
    *('_scaled_dot_product_efficient_attention', '_scaled_dot_product_efficient_attention_backward'),
}


@dataclass
class Operator:
    """What :class:`FusionEstimate` knows of an operator.

    Args:
        reads: the storages of its inputs.
        writes: the storages of its outputs.
        depth: external operators on the longest way to it.
        launches: kernels that it starts, if it is external; 0 otherwise.
        joins: whether it can be part of the kernel that writes its inputs.
    """

    reads: set[int]
    writes: set[int]
    depth: int
    launches: int
    joins: bool


class FusionEstimate(TorchDispatchMode):
    """Estimates the launches and bytes of a compiled step from the operators of an eager one.

    An operator is fused with those that write its inputs, except across external ones; a sum over rows needs a kernel
    of its own. A kernel reads what others wrote, and writes what others read. Compilers fuse less than that.
    """

    def __init__(self) -> None:
        """Start from nothing."""
        super().__init__()
        self.operators: list[Operator] = []
        self.depth: dict[int, int] = {}
        self.size: dict[int, int] = {}
        self.kept: list[Tensor] = []  # so that no address is used twice

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Run an operator and note it."""
        out = func(*args, **(kwargs or {}))
        name = func._schema.name.partition('::')[2]
        if name in FREE or _is_view(func):
            return out
        own = OWN.get(func._schema.name)
        launches = own(args, out)[0] if own else SEVERAL.get(name, 1)
        inputs, outputs = self._storages((args, kwargs or {})), self._storages(out)
        depth = max((self.depth.get(storage, 0) for storage in inputs), default=0)
        if name in EXTERNAL:
            self.operators.append(Operator(set(inputs), set(outputs), depth, launches, False))
        elif name == 'native_layer_norm_backward':
            self.operators.append(Operator(set(inputs), set(outputs[:1]), depth, 0, True))
            self.operators.append(Operator(set(inputs), set(outputs[1:]), depth, 0, False))
        else:
            over_rows = name == 'sum' and len(args) > 1 and args[0].ndim - 1 not in [d % args[0].ndim for d in args[1]]
            self.operators.append(Operator(set(inputs), set(outputs), depth, 0, not over_rows))
        self.depth |= dict.fromkeys(outputs, depth + (name in EXTERNAL))
        return out

    def _storages(self, value: Any) -> list[int]:
        tensors = _tensors(value)
        self.kept += tensors
        keys = [tensor.untyped_storage()._cdata for tensor in tensors]
        for key, tensor in zip(keys, tensors, strict=True):
            self.size[key] = max(self.size.get(key, 0), size_in_memory(tensor))
        return keys

    def total(self) -> tuple[int, int]:
        """All launches and bytes so far."""
        kernels = [*range(len(self.operators))]

        def find(i: int) -> int:
            while kernels[i] != i:
                i = kernels[i]
            return i

        writers: dict[int, int] = {}
        for i, operator in enumerate(self.operators):
            for storage in operator.reads & writers.keys() if operator.joins else ():
                writer = self.operators[writers[storage]]
                if not writer.launches and writer.depth == operator.depth:
                    kernels[find(i)] = find(writers[storage])
            writers |= dict.fromkeys(operator.writes, i)
        readers: dict[int, set[int]] = {}
        for i, operator in enumerate(self.operators):
            for storage in operator.reads:
                readers.setdefault(storage, set()).add(find(i))
        moved = 0
        for fused in {find(i) for i in range(len(kernels))}:
            parts = [operator for i, operator in enumerate(self.operators) if find(i) == fused]
            written = set().union(*(part.writes for part in parts))
            read = set().union(*(part.reads for part in parts)) - written
            kept = {storage for storage in written if readers.get(storage, set()) != {fused}}
            moved += sum(self.size[storage] for storage in read | kept)
        launches = sum(operator.launches for operator in self.operators)
        return launches + len({find(i) for i, o in enumerate(self.operators) if not o.launches}), moved


class EmulatedAutocast(TorchFunctionMode):
    """Casts on meta tensors as CUDA's autocast does on a GPU, and casts each weight once."""

    LOWER: ClassVar[set] = {
        *(F.linear, F.conv2d, F.scaled_dot_product_attention, torch.matmul, torch.bmm, torch.mm, torch.addmm),
        *(Tensor.matmul, Tensor.__matmul__, Tensor.bmm, Tensor.mm),
    }
    FP32: ClassVar[set] = {
        F.layer_norm,
        F.softmax,
        torch.softmax,
        Tensor.softmax,
        F.normalize,
        torch.norm,
        Tensor.norm,
        Tensor.exp,
    }

    def __init__(self, dtype: torch.dtype) -> None:
        """Take the dtype of matrix products."""
        super().__init__()
        self.dtype = dtype
        self.weights: dict[Tensor, Tensor] = {}

    def __enter__(self) -> 'EmulatedAutocast':
        """Let library code that asks for CUDA's autocast see it."""
        torch.set_autocast_dtype('cuda', self.dtype)
        torch.set_autocast_enabled('cuda', True)
        return super().__enter__()

    def __exit__(self, *error: Any) -> None:
        """Turn autocast off."""
        torch.set_autocast_enabled('cuda', False)
        self.weights.clear()
        super().__exit__(*error)

    def cast(self, tensor: Any) -> Any:
        """A tensor of floating-point numbers in the lower precision; weights are cast once. Anything else as it is."""
        if not isinstance(tensor, Tensor) or not tensor.is_floating_point() or tensor.dtype == self.dtype:
            return tensor
        if not (tensor.requires_grad and tensor.is_leaf):
            return tensor.to(self.dtype)
        if tensor not in self.weights:
            self.weights[tensor] = tensor.to(self.dtype)
        return self.weights[tensor]

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        """Call a function with the arguments cast."""
        kwargs = kwargs or {}
        if func in self.LOWER:
            return func(*map(self.cast, args), **{name: self.cast(value) for name, value in kwargs.items()})
        if func in self.FP32:
            args = tuple(value.float() if isinstance(value, Tensor) else value for value in args)
        return func(*args, **kwargs)


def build(name: str, case: Case, arch: dict, autocast: bool) -> nn.Module:
    """A candidate of the benchmark on meta tensors, with the Triton kernel, which ``auto`` selects on GPUs only."""
    model = CANDIDATES[name](arch, case.size).to(META)
    if not autocast:
        model.to(torch.bfloat16)
    model.train(case.what == TRAIN)
    if name == OPTIMIZED:
        model = optimized(model)
    for module in getattr(model, 'backbone', model).modules():
        if hasattr(module, 'attention_fn'):
            module.attention_fn = kernel.attention
    return model


C = TypeVar('C', LaunchCounter, FusionEstimate)


def count(model: nn.Module, case: Case, autocast: bool, counter: type[C] = LaunchCounter) -> C:
    """Count one step, the second one: what is cached by size is there.

    Args:
        model: on meta tensors.
        case: inference, or training: forward, and backward from gradients of the maps.
        autocast: bfloat16 under autocast; otherwise weights and images are in bfloat16.
        counter: what counts.
    """
    training = case.what == TRAIN
    image = torch.empty(case.batch, 3, *case.size, device=META, dtype=torch.float32 if autocast else torch.bfloat16)
    for _ in range(2):
        model.zero_grad(set_to_none=True)
        with torch.set_grad_enabled(training), counter() as counted:
            with EmulatedAutocast(torch.bfloat16) if autocast else nullcontext():
                maps = [*model(image)]
            if training:
                torch.autograd.backward(maps, [torch.empty_like(m) for m in maps])
    return counted


ONE, EIGHT = (Case(INFER, 'bf16', (800, 1280), batch) for batch in (1, 8))
STEP = Case(TRAIN, 'bf16', (512, 512), 16)
FUSED = 'ours/fused_norm'
# Case, whether under autocast, and the launches and gigabytes that are asked for, of which form of ours.
BARS: list[tuple[Case, bool, str, float | None, float]] = [
    (ONE, False, OPTIMIZED, 90, 1.9),
    (ONE, True, OPTIMIZED, 160, 2.4),
    (EIGHT, True, OPTIMIZED, None, 17),
    (STEP, True, FUSED, 650, 31),
]


def run(out: Path, arch: dict, quick: bool = False) -> None:
    """Count all candidates, write ``out/count.json`` and print the table.

    Args:
        out: folder of the results.
        arch: arguments that size a backbone.
        quick: count at 64 x 64 only.

    Raises:
        InputError: the results cannot be written.
    """
    rivals = [name for name in ('mmdet', 'timm') if importlib.util.find_spec(name)]
    results, rows = [], []
    for case, autocast, form, launches, gigabytes in BARS:
        sized = Case(case.what, case.dtype, (64, 64), case.batch) if quick else case
        for name in [*(rivals if autocast else ()), 'ours', form]:
            model = build(name, sized, arch, autocast)
            counter = count(model, sized, autocast)
            result = {'case': str(case), 'autocast': autocast, 'candidate': name, 'operators': dict(counter.launches)}
            result['launches'], result['bytes'] = counter.total()
            estimate = ['', '']
            if name != form:  # the forms are fused already
                result['compiled'] = count(model, sized, autocast, FusionEstimate).total()
                estimate = [str(result['compiled'][0]), f'{result["compiled"][1] / 1e9:.2f}']
            results.append(result)
            asked = [f'≤ {launches}' if launches else '', f'≤ {gigabytes}'] if name == form else ['', '']
            kind = 'AMP' if autocast else 'bf16 weights'
            figures = [str(result['launches']), asked[0], f'{result["bytes"] / 1e9:.2f}', asked[1]]
            rows.append([str(case), kind, name, *figures, *estimate])
    with atomic_write(out / 'count.json') as file:
        file.write_text(json.dumps(results, indent=1))
    titles = ('case', '', 'candidate', 'launches', 'asked', 'GB', 'asked', 'compiled (estimated)', 'GB')
    print_table('counted', titles, rows)
