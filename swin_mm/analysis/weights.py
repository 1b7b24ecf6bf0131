"""Loading a checkpoint into a model that is used as it is, not trained further: nothing may be missing."""

import re
from typing import Any

from torch import nn

from swin_mm.checkpoints import unwrap
from swin_mm.openmmlab.loading import require_complete


def load_all_weights(model: nn.Module, checkpoint: Any, source: str, prefix: str = '') -> None:
    """Load a checkpoint that must give every parameter and buffer of the model.

    Further entries of the checkpoint, such as those of heads used in training only, are ignored.

    Args:
        model: gets the weights.
        checkpoint: content of the checkpoint, in any wrapper.
        source: where the checkpoint is from, for the message.
        prefix: load the entries below this prefix if there are any, else all.

    Raises:
        CheckpointError: it holds no weights, or does not cover the model.
    """
    state = {re.sub(r'^module\.', '', key): value for key, value in unwrap(checkpoint).items()}  # saved from DDP
    state = {key.removeprefix(prefix): value for key, value in state.items() if key.startswith(prefix)} or state
    require_complete(model, state, source)
    model.load_state_dict(state, strict=False)
