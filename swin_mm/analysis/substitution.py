"""Replacing submodules by type."""

from collections.abc import Callable
from typing import Any

from torch import nn


def replace_modules(model: nn.Module, kind: type[nn.Module], make: Callable[[Any], nn.Module]) -> int:
    """Replace every submodule of exactly this type, in place.

    Args:
        model: the model to change; it is not replaced itself.
        kind: the type to look for; subclasses are left alone.
        make: gets the old module and returns the new one.

    Returns:
        The number of modules replaced.
    """
    found = [
        (parent, name) for parent in model.modules() for name, child in parent.named_children() if type(child) is kind
    ]
    for parent, name in found:
        setattr(parent, name, make(getattr(parent, name)))
    return len(found)
