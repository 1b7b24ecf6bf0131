"""Reading checkpoint files without executing anything in them."""

import os
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import torch


class CheckpointError(ValueError):
    """A checkpoint cannot be read or does not fit; the message says what is wrong and what to do."""


# Plain data that training checkpoints hold beside tensors.
_NUMPY = [
    np.ndarray,
    np.dtype,
    type(np.dtype(np.float64)),
    type(np.dtype(np.float32)),
    type(np.dtype(np.int64)),
    type(np.dtype(np.uint32)),
    (np._core.multiarray._reconstruct if hasattr(np, '_core') else np.core.multiarray._reconstruct),
    (np._core.multiarray.scalar if hasattr(np, '_core') else np.core.multiarray.scalar),
]


def read_checkpoint(path: str | os.PathLike[str], map_location: Any = 'cpu') -> Any:
    """Read a ``.pth`` file from disk or from an http(s) address (cached by ``torch.hub``).

    Only tensors and plain data are unpickled; classes that hold plain data can be allowed with
    ``torch.serialization.add_safe_globals``.

    Raises:
        CheckpointError: no such file, not a checkpoint, damaged, or it wants to run code.
    """
    path = os.fspath(path)
    try:
        with torch.serialization.safe_globals(_NUMPY):
            if path.startswith(('http://', 'https://')):
                return torch.hub.load_state_dict_from_url(path, map_location=map_location, weights_only=True)
            return torch.load(Path(path).expanduser(), map_location=map_location, weights_only=True)
    except FileNotFoundError:
        raise CheckpointError(f'checkpoint {path} does not exist; check the path') from None
    except IsADirectoryError:
        raise CheckpointError(f'checkpoint {path} is a folder; name the file in it') from None
    except pickle.UnpicklingError as error:
        reason = next((line.strip() for line in str(error).splitlines() if 'GLOBAL' in line), None)
        if reason is None:
            raise CheckpointError(f'checkpoint {path} is damaged or not a PyTorch file ({_first_line(error)})') from error
        raise CheckpointError(
            f'checkpoint {path} wants to run code when it is opened, and was not opened: {reason} '
            'If you trust its origin, open it yourself with torch.load(..., weights_only=False) and save its state_dict.'
        ) from error
    except (OSError, RuntimeError, EOFError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(f'checkpoint {path} cannot be read: {_first_line(error)}') from error


def _first_line(error: BaseException) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]
