"""Export of a backbone or a whole model to a file that runs without this project, compared with PyTorch."""

from swin_mm.analysis.export.comparison import TOLERANCES, Difference
from swin_mm.analysis.export.formats import OPSET, OPSETS, SUFFIXES
from swin_mm.analysis.export.metadata import KEY, Metadata
from swin_mm.analysis.export.run import ExportDiffersError, check_arguments, export
from swin_mm.analysis.export.whole import PARTS

__all__ = [
    'KEY',
    'OPSET',
    'OPSETS',
    'PARTS',
    'SUFFIXES',
    'TOLERANCES',
    'Difference',
    'ExportDiffersError',
    'Metadata',
    'check_arguments',
    'export',
]
