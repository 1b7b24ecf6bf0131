"""Loading a checkpoint into a model that is to be used as it is: nothing may be missing."""

from typing import Any

from torch import nn

from swin_mm.checkpoints import unwrap
from swin_mm.utils.errors import CheckpointError, InputError, one_line


def load_all_weights(model: nn.Module, checkpoint: Any, source: str, config: str, prefix: str = '') -> None:
    """Load a checkpoint and make sure that it gives every parameter and buffer of the model.

    Further entries of the checkpoint, such as those of heads used in training only, are ignored.

    Args:
        model: gets the weights.
        checkpoint: content of the checkpoint, in any wrapper.
        source: where the checkpoint is from, for the message.
        config: name of the model's config, for the message.
        prefix: load the entries below this prefix if there are any, else all.

    Raises:
        InputError: the checkpoint belongs to another model.
        CheckpointError: it holds no weights.
    """
    state = unwrap(checkpoint)
    if all(key.startswith('module.') for key in state):  # saved from DistributedDataParallel
        state = {key.removeprefix('module.'): value for key, value in state.items()}
    if prefix:
        state = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)} or state
    try:
        missing = model.load_state_dict(state, strict=False).missing_keys
    except (CheckpointError, RuntimeError) as error:
        raise InputError(f'{source} is not a checkpoint of {config}: {one_line(error)}') from error
    if missing:
        raise InputError(
            f'{source} is not a checkpoint of {config}: {len(missing)} weights are missing, the first is {missing[0]}'
        )
