"""Validation of constructor arguments and inputs.

Each ``require_*`` function takes an argument's name and value and returns the value as a plain Python object, or raises
an error of the form ``drop_rate=nan: expected a number from 0 to 1 (1 excluded)``: ``TypeError`` where the type is
wrong, ``ValueError`` where the value is.
"""

import functools
import inspect
import math
import numbers
from collections.abc import Callable, Collection, Sequence
from difflib import get_close_matches
from typing import Any, NoReturn, TypeVar

from torch import Tensor

from swin_mm.ops.windows import Size, tracing

T = TypeVar('T')

# Far beyond any model that fits into memory. Larger values are typing errors that would exhaust memory or never return.
MAX_CHANNELS = 2**16
MAX_DEPTH = 1000
MAX_SIDE = 1024  # of windows, patches and strides


def reject(name: str, value: Any, expected: str, error: type[Exception] = ValueError) -> NoReturn:
    """Raise the error for an argument that is not what was expected."""
    raise error(f'{name}={shorten(value)}: expected {expected}')


def shorten(value: Any, length: int = 200) -> str:
    """``repr(value)`` on one line and cut to ``length`` characters."""
    text = ' '.join(repr(value).split())
    return text if len(text) <= length else text[: length - 3] + '...'


def require_int(name: str, value: Any, minimum: int | None = None, maximum: int | None = None) -> int:
    """Return an integer of Python or NumPy as an int. Booleans are rejected."""
    number = _item(value)
    expected = f'an integer{_range(minimum, maximum)}'
    if isinstance(number, bool) or not isinstance(number, numbers.Integral):
        reject(name, value, expected, TypeError)
    number = int(number)
    if (minimum is not None and number < minimum) or (maximum is not None and number > maximum):
        reject(name, value, expected)
    return number


def require_number(name: str, value: Any, minimum: float | None = None, maximum: float | None = None) -> float:
    """Return a finite number of Python or NumPy as an int or float. Booleans are rejected."""
    number = _item(value)
    expected = f'a finite number{_range(minimum, maximum)}'
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        reject(name, value, expected, TypeError)
    real = _float(number)
    below, above = minimum is not None and real < minimum, maximum is not None and real > maximum
    if not math.isfinite(real) or below or above:
        reject(name, value, expected)
    return int(number) if isinstance(number, numbers.Integral) else real


def require_rate(name: str, value: Any) -> float:
    """Return a dropout rate, from 0 to 1; 1 is excluded, because it would drop everything."""
    number = _item(value)
    expected = 'a number from 0 to 1 (1 excluded)'
    if isinstance(number, bool) or not isinstance(number, numbers.Real):
        reject(name, value, expected, TypeError)
    rate = _float(number)
    if not 0 <= rate < 1:
        reject(name, value, expected)
    return rate


def require_bool(name: str, value: Any, also: str = '') -> bool:
    """Return True, False, 1, 0 or None (False) as a bool. Strings are rejected, since ``bool('False')`` is True.

    Args:
        name: name of the argument.
        value: value of the argument.
        also: other allowed values, for the message.
    """
    flag = _item(value)
    if flag is None:
        return False
    if not isinstance(flag, numbers.Real):
        reject(name, value, f'True or False{also}', TypeError)
    if flag not in (0, 1):
        reject(name, value, f'True or False{also}')
    return bool(flag)


def require_choice(name: str, value: Any, choices: Collection[str]) -> str:
    """Return a string that is one of ``choices``."""
    expected = f'one of {", ".join(map(repr, choices))}'
    if not isinstance(value, str):
        reject(name, value, expected, TypeError)
    if value not in choices:
        reject(name, value, expected)
    return value


def require_sequence(name: str, value: Any, expected: str) -> tuple:
    """Return a tuple, list, range, one-dimensional array or tensor as a tuple."""
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return tuple(value)
    if getattr(value, 'ndim', 0) and hasattr(value, 'tolist'):
        return tuple(value.tolist())
    reject(name, value, expected, TypeError)


def require_depths(name: str, value: Any) -> tuple[int, ...]:
    """Return the number of blocks of each stage; there must be at least one stage."""
    expected = f'a sequence of integers{_range(0, MAX_DEPTH)}, one per stage'
    items = require_sequence(name, value, expected)
    if not items:
        reject(name, value, expected)
    return tuple(_each(name, value, expected, items, lambda item: require_int(name, item, 0, MAX_DEPTH)))


def require_per_stage(
    name: str, value: Any, depths: Sequence[int], require: Callable[[str, Any], T], item: str
) -> tuple[T, ...]:
    """Return one item per stage. Extra items are ignored, as in mmdet.

    Args:
        name: name of the argument.
        value: value of the argument.
        depths: blocks per stage.
        require: checks one item.
        item: description of a valid item, for the message.
    """
    expected = f'{item} for each of {len(depths)} stages (depths={shorten(tuple(depths))})'
    items = require_sequence(name, value, expected)
    if len(items) < len(depths):
        reject(name, value, expected)
    return tuple(_each(name, value, expected, items[: len(depths)], lambda item: require(name, item)))


def require_pair(name: str, value: Any, minimum: int = 1, maximum: int = MAX_SIDE) -> Size:
    """Return an integer, or a sequence of one or two integers, as (height, width)."""
    expected = f'an integer{_range(minimum, maximum)}, or (height, width)'
    if isinstance(_item(value), numbers.Integral):
        items: tuple = (value,)
    else:
        items = require_sequence(name, value, expected)
    if len(items) not in (1, 2):
        reject(name, value, expected)
    sides = _each(name, value, expected, items, lambda item: require_int(name, item, minimum, maximum))
    return sides[0], sides[-1]


def require_strides(name: str, value: Any, depths: Sequence[int]) -> tuple[Size, tuple[int, ...]]:
    """Return the patch stride (height, width), and the stride of the patch merging before each further stage."""
    expected = f'an integer{_range(1, MAX_SIDE)}'
    pairs = require_per_stage(name, value, depths, require_pair, expected)
    if any(height != width for height, width in pairs[1:]):
        reject(name, value, 'the same stride for both axes in all stages but the first')
    return pairs[0], tuple(height for height, _ in pairs[1:])


def require_windows(name: str, value: Any, depths: Sequence[int]) -> tuple[Size, ...]:
    """Return the window (height, width) of each stage. Two plain integers are a height and a width."""
    stages = len(depths)
    expected = (
        f'an integer{_range(1, MAX_SIDE)}, (height, width), or one of these for each of {stages} stages '
        f'(depths={shorten(tuple(depths))})'
    )
    if isinstance(_item(value), numbers.Integral):
        items: tuple = (value,) * stages
    else:
        items = require_sequence(name, value, expected)
        if len(items) == 2 and all(isinstance(_item(item), numbers.Integral) for item in items):
            items = (items,) * stages
    if len(items) != stages:
        reject(name, value, expected)
    return tuple(_each(name, value, expected, items, lambda item: require_pair(name, item)))


def require_out_indices(name: str, value: Any, depths: Sequence[int]) -> tuple[int, ...]:
    """Return stage indices in ascending order."""
    expected = f'ascending stages from 0 to {len(depths) - 1}, each once (depths={shorten(tuple(depths))})'
    items = require_sequence(name, value, expected)
    indices = _each(name, value, expected, items, lambda item: require_int(name, item, 0, len(depths) - 1))
    if not indices or indices != sorted(set(indices)):
        reject(name, value, expected)
    return tuple(indices)


def require_pretrained_windows(name: str, value: Any, depths: Sequence[int]) -> tuple[Size, ...]:
    """Return the pre-training window of each stage, 0 for the window in use. A shorter sequence may hold only zeros."""
    if isinstance(value, Sequence) and len(value) < len(depths) and all(item in (0, (0, 0)) for item in value):
        value = (0,) * len(depths)
    expected = f'an integer{_range(0, MAX_SIDE)} or (height, width)'
    return require_per_stage(name, value, depths, lambda n, v: require_pair(n, v, 0), expected)


def require_with_cp(name: str, value: Any, stages: int) -> tuple[tuple[bool, ...], bool]:
    """Return whether the blocks of each stage are checkpointed, and whether only the MLPs are."""
    also = f", one of these for each of {stages} stages, or 'mlp'"
    if isinstance(value, str) and value == 'mlp':
        return (False,) * stages, True
    if not isinstance(value, Sequence) or isinstance(value, str | bytes):
        return (require_bool(name, value, also),) * stages, False
    if len(value) != stages:
        reject(name, value, f'True or False{also}')
    flags = _each(name, value, f'True or False{also}', value, lambda item: require_bool(name, item))
    return tuple(flags), False


def require_callable(name: str, value: Any, expected: str) -> Any:
    """Return a callable."""
    if not callable(value):
        reject(name, value, expected, TypeError)
    return value


@functools.cache
def argument_names(owner: type) -> tuple[str, ...]:
    """Named arguments of the constructors of a class and its bases."""
    kinds = (inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    constructors = [inspect.signature(vars(base)['__init__']) for base in owner.__mro__ if '__init__' in vars(base)]
    names = [p.name for signature in constructors for p in signature.parameters.values() if p.kind in kinds]
    return tuple(sorted(set(names) - {'self'}))


def check_names(owner: type, options: dict[str, Any]) -> None:
    """Reject keyword arguments that a class does not have.

    Raises:
        TypeError: the message has the name, the value, and the closest valid name, or all valid names.
    """
    allowed = argument_names(owner)
    for name, value in options.items():
        if name not in allowed:
            close = get_close_matches(name, allowed, n=1, cutoff=0.75)
            hint = f'did you mean {close[0]}?' if close else f'its arguments are {", ".join(allowed)}'
            raise TypeError(f'{name}={shorten(value)}: {owner.__name__} has no such argument; {hint}')


def check_image(image: Any, channels: int | None) -> None:
    """Check that the input of ``forward`` is a batch of images, before an operator fails on it.

    Args:
        image: the argument of ``forward``.
        channels: expected number of channels; None if unknown.

    Raises:
        TypeError: not a tensor, or not of a floating-point type.
        ValueError: the wrong number of dimensions or channels, or an image without pixels.
    """
    shape = f'(B, {"in_channels" if channels is None else channels}, H, W)'
    if not isinstance(image, Tensor):
        raise TypeError(f'image of type {type(image).__name__}: expected a floating-point tensor of shape {shape}')
    if image.ndim != 4:
        hint = '; add the batch dimension with image[None]' if image.ndim == 3 else ''
        raise ValueError(f'image of shape {tuple(image.shape)}: expected shape {shape}{hint}')
    if not image.is_floating_point():
        raise TypeError(
            f'image of dtype {image.dtype}: expected a floating-point tensor of shape {shape}; convert it with '
            'image.float() and normalise it as for training'
        )
    if tracing():  # sizes may be symbolic
        return
    if channels is not None and image.shape[1] != channels:
        hint = '; channels come first' if image.shape[3] == channels else ''
        raise ValueError(f'image of shape {tuple(image.shape)}: expected shape {shape}{hint}')
    if not image.shape[2] or not image.shape[3]:
        raise ValueError(f'image of shape {tuple(image.shape)}: expected shape {shape} with H and W of at least 1')


def _item(value: Any) -> Any:
    """Convert NumPy scalars, and arrays and tensors without dimensions, to Python numbers; keep anything else."""
    if isinstance(value, type) or getattr(value, 'ndim', None) != 0 or not hasattr(value, 'item'):
        return value
    if isinstance(value, Tensor) and value.device.type == 'meta':
        return value
    return value.item()


def _float(number: numbers.Real) -> float:
    """Convert a number to float; integers that are too large become infinity."""
    try:
        return float(number)
    except OverflowError:
        return math.inf


def _each(name: str, value: Any, expected: str, items: Sequence, require: Callable[[Any], T]) -> list[T]:
    """Check each item of a sequence; the error message shows the whole sequence."""
    try:
        return [require(item) for item in items]
    except (TypeError, ValueError) as error:
        kind = type(error)
    reject(name, value, expected, kind)


def _range(minimum: float | None, maximum: float | None) -> str:
    if maximum is not None and minimum is not None:
        return f' from {minimum} to {maximum}'
    if maximum is not None:
        return f' up to {maximum}'
    return '' if minimum is None else f' of at least {minimum}'
