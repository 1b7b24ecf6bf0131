"""How the tools' figures look, and how they are saved."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from matplotlib import rc_context
from matplotlib.figure import Figure

from swin_mm.utils.files import atomic_write

STYLE = {
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
}


@contextmanager
def figure(path: Path, width: float, height: float) -> Iterator[Figure]:
    """A figure of so many inches to draw on, which is then saved, in the format of the path's suffix.

    Raises:
        InputError: it cannot be written.
    """
    with rc_context(STYLE):
        drawn = Figure((width, height), layout='constrained')
        yield drawn
        with atomic_write(path) as part:
            drawn.savefig(part)
