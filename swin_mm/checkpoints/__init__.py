"""Published checkpoints: reading files safely, and turning every key naming into ours."""

from swin_mm.checkpoints.files import CheckpointError, read_checkpoint
from swin_mm.checkpoints.loading import Report, adapt

__all__ = ['CheckpointError', 'Report', 'adapt', 'read_checkpoint']
