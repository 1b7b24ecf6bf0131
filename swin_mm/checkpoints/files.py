"""Reading checkpoint files without executing anything in them."""

import os
import pickle
import re
from pathlib import Path
from typing import Any

import numpy as np
import torch


class CheckpointError(ValueError):
    """A checkpoint cannot be read or does not fit; the message says what is wrong and what to do."""


def _numpy_globals() -> list[Any]:
    core = np._core if hasattr(np, '_core') else np.core
    functions = (core.multiarray._reconstruct, core.multiarray.scalar)
    # numpy 2 renamed its core; files carry the name of the version that wrote them.
    named = [(f, f'{module}.multiarray.{f.__name__}') for f in functions for module in ('numpy._core', 'numpy.core')]
    return [np.ndarray, np.dtype, *{type(np.dtype(code)) for code in '?bhilqBHILQefd'}, *named]


# Globals that files may name, in the terms of torch.serialization.safe_globals: plain data that training checkpoints
# hold beside tensors. Other modules add what they know of.
ALLOWED: list[Any] = _numpy_globals()


def read_checkpoint(path: str | os.PathLike[str], map_location: Any = 'cpu') -> Any:
    """Read a ``.pth`` file from disk or from an http(s) address (cached by ``torch.hub``).

    Only tensors and the plain data of :data:`ALLOWED` are unpickled.

    Raises:
        CheckpointError: no such file, not a checkpoint, damaged, or it wants to run code.
    """
    path = os.fspath(path)
    try:
        with torch.serialization.safe_globals(ALLOWED):
            if path.startswith(('http://', 'https://')):
                return torch.hub.load_state_dict_from_url(path, map_location=map_location, weights_only=True)
            return torch.load(Path(path).expanduser(), map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f'checkpoint {path} does not exist; check the path') from None
    except IsADirectoryError:
        raise CheckpointError(f'checkpoint {path} is a folder; name the file in it') from None
    except pickle.UnpicklingError as error:
        code = re.search(r'GLOBAL (\S+)', str(error))
        if code is None:
            raise CheckpointError(f'checkpoint {path} is damaged or not a PyTorch file') from error
        raise CheckpointError(
            f'checkpoint {path} wants to run code ({code[1]}) when it is opened, so it was not opened; if you trust '
            'its origin, open it with torch.load(..., weights_only=False) and save its state_dict alone'
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise CheckpointError(f'checkpoint {path} cannot be read: {reason}') from error
