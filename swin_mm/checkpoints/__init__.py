"""Published checkpoints: reading files safely, and converting between every key naming and ours."""

from swin_mm.checkpoints.contents import Contents, Variant, convert, parse, transformers_config, unwrap
from swin_mm.checkpoints.files import read_checkpoint, write_checkpoint
from swin_mm.checkpoints.loading import Report, adapt
from swin_mm.utils.errors import CheckpointError

__all__ = [
    'CheckpointError',
    'Contents',
    'Report',
    'Variant',
    'adapt',
    'convert',
    'parse',
    'read_checkpoint',
    'transformers_config',
    'unwrap',
    'write_checkpoint',
]
