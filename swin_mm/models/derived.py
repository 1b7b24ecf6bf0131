"""What follows from weights alone is computed once and kept until the weights change.

Kept outside the modules, so that copies, checkpoints and pickles know nothing of it.
"""

from collections.abc import Callable, Hashable, Iterable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.utils.weak import WeakTensorKeyDictionary

from swin_mm.ops.windows import tracing

Result = TypeVar('Result')

_kept = WeakTensorKeyDictionary()  # parameter -> {name: (state of the weights, result)}


def evaluating(module: nn.Module) -> bool:
    """Whether the weights can be taken for constant: evaluation without gradients, outside a trace."""
    return not (module.training or torch.is_grad_enabled() or tracing())


def derived(name: Hashable, weights: tuple[Tensor, ...], compute: Callable[[], Result]) -> Result:
    """``compute()``, or what it gave before if the weights are the same.

    Args:
        name: what is computed; with the first of the weights it is the key.
        weights: what the result depends on. A change is noticed by its address and version; writing through ``.data``
            changes neither, which is why :func:`forget` is called wherever a model changes its mode.
        compute: its result must not be written to.
    """
    # Subclasses stand for something else, and what was made for inference has no version.
    if any(type(weight) not in (Tensor, nn.Parameter) or weight.is_inference() for weight in weights):
        return compute()
    state = tuple((weight.data_ptr(), weight._version) for weight in weights)
    results = _kept.setdefault(weights[0], {})
    if name not in results or results[name][0] != state:
        results[name] = state, compute()
    return results[name][1]


def forget(weights: Iterable[Tensor]) -> None:
    """Drop what was derived from these weights."""
    for weight in weights:
        _kept.pop(weight, None)
