"""Differences between versions of torch, each with the version that ends it.

swin_mm supports torch from :data:`LOWEST_TORCH` on. Code that is the same on all of these versions uses torch directly;
whatever is not stands here, so that raising the lowest version means deleting functions of this file.
"""

import sys
from collections.abc import Callable, Sequence
from typing import Any, get_args, get_origin, get_type_hints

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils import flop_counter

LOWEST_TORCH = (2, 4)
TORCH = tuple(map(int, torch.__version__.split('.')[:2]))  # major and minor version
CHECKPOINTS_ON_META = TORCH >= (2, 5)  # activation checkpointing on the meta device
EXPORTS = TORCH >= (2, 8)  # torch.export and the ONNX exporter on it, for images of one size
EXPORTS_ANY_SIZE = TORCH >= (2, 13)  # and for dynamic height and width; 2.8 does not, 2.9 to 2.12 are untested


TYPES: dict[Any, str] = {
    Tensor: 'Tensor',
    Tensor | None: 'Tensor?',
    list[Tensor]: 'Tensor[]',
    list[int]: 'SymInt[]',
    Sequence[int]: 'SymInt[]',
    int: 'SymInt',
    float: 'float',
    bool: 'bool',
    torch.dtype: 'ScalarType',
    torch.dtype | None: 'ScalarType?',
}


def custom_op(name: str, **options: Any) -> Callable[[Callable], Any]:
    """``torch.library.custom_op`` for an operator that changes none of its arguments.

    torch 2.4 reads the types of :mod:`typing` alone, and no annotations that are strings.

    Args:
        name: ``swin_mm::...``.
        options: further options of ``torch.library.custom_op``.
    """

    def decorate(function: Callable) -> Any:
        return torch.library.custom_op(name, mutates_args=(), schema=operator_schema(function), **options)(function)

    return decorate


def operator_schema(function: Callable) -> str:
    """The schema of an operator from a function's annotations, which are among :data:`TYPES` or a tuple of them."""
    hints = get_type_hints(function)
    result = hints.pop('return')
    results = [TYPES[kind] for kind in get_args(result)] if get_origin(result) is tuple else [TYPES[result]]
    arguments = ', '.join(f'{TYPES[kind]} {name}' for name, kind in hints.items())
    return f'({arguments}) -> ' + (results[0] if len(results) == 1 else f'({", ".join(results)})')


def register_flop_formula(operator: Any) -> Callable[[Callable], Callable]:
    """``torch.utils.flop_counter.register_flop_formula`` for ``torch.ops.swin_mm...``.

    torch 2.4 registers the overloads of an operator and then looks for the operator, whose FLOPs it counts as none.
    """

    def register(formula: Callable) -> Callable:
        flop_counter.register_flop_formula(operator)(formula)
        registry: dict[Any, Any] = flop_counter.flop_registry
        if operator not in registry:
            registry[operator] = registry[operator.default]
        return formula

    return register


def scaled_dot_product_attention(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, dropout: float, scale: float | None
) -> Tensor:
    """``torch.nn.functional.scaled_dot_product_attention``.

    On CPUs, torch 2.4 computes scores of float16 inputs in float16, where large ones become infinite and results NaN.
    """
    if TORCH < (2, 5) and q.dtype == torch.float16 and q.device.type == 'cpu':
        q, k, v, mask = (t.float() for t in (q, k, v, mask))
        with torch.autocast('cpu', enabled=False):
            return F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale).half()
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, scale=scale)


def is_exporting() -> bool:
    """Whether :func:`torch.export.export` traces the caller; false inside ``torch.compile``. A constant in graphs.

    ``torch.compiler.is_exporting`` says so from torch 2.12 on. Until 2.11, ``torch.compile`` replaces its calls by True
    (pytorch#176347).
    """
    return _exporting_outside_of_graphs()


# Compilers call a function with a constant result as plain Python, where the flag is right, instead of tracing it.
# It is not the function above, because they leave the result under the function's name in the globals of the caller.
@torch.compiler.assume_constant_result
def _exporting_outside_of_graphs() -> bool:
    # Until torch 2.6 there is no flag for exports, but in plain Python nothing else sets `is_compiling`.
    flag = getattr(torch.compiler, 'is_exporting', torch.compiler.is_compiling)
    return flag() or (TORCH < (2, 8) and _exports_strictly())


def _exports_strictly() -> bool:
    """Whether Dynamo is tracing for an export. It sets a flag itself from torch 2.8 on; until then it has to be asked.

    Where that fails, exported graphs contain operators of this package and need it to be imported.
    """
    dynamo = sys.modules.get('torch._dynamo.symbolic_convert')  # imported if Dynamo is tracing
    try:
        return bool(dynamo.InstructionTranslator.current_tx().export)  # type: ignore[union-attr]
    except AttributeError:  # nothing is being traced, or the private class has changed
        return False
