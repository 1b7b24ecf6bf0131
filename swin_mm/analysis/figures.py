"""The style of the figures, and how they are saved."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from matplotlib import rc_context
from matplotlib.figure import Figure

from swin_mm.utils.files import atomic_write

FORMATS = ('png', 'svg', 'pdf')
STYLE: Any = {  # Matplotlib's stubs expect a dict of literal keys
    'figure.dpi': 160,
    'font.size': 9,
    'axes.titlesize': 9,
    'figure.titlesize': 12,
    'figure.titleweight': 'bold',
    'axes.spines.top': False,
    'axes.spines.right': False,
    'axes.prop_cycle': "cycler('color', ['0072B2', 'D55E00', '009E73', 'CC79A7', 'E69F00', '56B4E9', '000000'])",
    'legend.frameon': False,
    'svg.fonttype': 'none',
    'text.parse_math': False,  # names from logs and configs may contain dollar signs
}


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """Yield a figure to draw on and save it when the block ends, in the format of the path's suffix.

    Args:
        path: the file to write.
        width: in inches.
        height: in inches.

    Raises:
        InputError: the file cannot be written.
    """
    with rc_context(STYLE):
        drawn = Figure((width, height), layout='constrained')
        yield drawn
        with atomic_write(path) as part:
            drawn.savefig(part)
