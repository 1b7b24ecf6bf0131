"""The result of a check, as tables, text and files."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from typing import Literal

import numpy as np
from rich.console import Console
from rich.table import Table
from rich.text import Text

from swin_mm.analysis.dataset_check.findings import Finding, plural, printable
from swin_mm.analysis.dataset_check.plots import plot_classes, plot_sizes
from swin_mm.utils.files import atomic_write

LINES = 5  # per kind of finding on the screen


@dataclass
class Part:
    """Statistics and findings of train, val or test; splits that read the same data are one part.

    Args:
        name: 'train', or several names.
        classes: Names from the config.
        images: Digests of the image files by path; None if a file cannot be read.
        sizes: (width, height) of the images.
        amounts: Objects or pixels by number of the class.
        objects: Square roots of the areas of boxes, in pixels; empty for label maps.
        values: (256,) pixels by value in the label maps.
        unit: What the amounts count.
        unlabelled: Pixels that are ignored.
        ignores_zero: Whether the value 0 is ignored.
        findings: What was found.
    """

    name: str
    classes: list[str] = field(default_factory=list)
    images: dict[str, bytes | None] = field(default_factory=dict)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    amounts: Counter[int] = field(default_factory=Counter)
    objects: list[float] = field(default_factory=list)
    values: np.ndarray = field(default_factory=lambda: np.zeros(256, np.int64))
    unit: Literal['objects', 'pixels'] = 'objects'
    unlabelled: int = 0
    ignores_zero: bool = False
    findings: list[Finding] = field(default_factory=list)

    def share(self, label: int) -> float:
        """Share of a class in all objects or labelled pixels."""
        return self.amounts[label] / (self.amounts.total() or 1)


@dataclass
class Report:
    """The result of a check."""

    parts: list[Part]

    @property
    def findings(self) -> list[Finding]:
        """All findings, faults first, each once."""
        unique = {finding for part in self.parts for finding in part.findings}
        return sorted(unique, key=lambda finding: (not finding.is_fault, finding))

    @property
    def faults(self) -> list[Finding]:
        """What should be fixed before training."""
        return [finding for finding in self.findings if finding.is_fault]

    def show(self, console: Console) -> None:
        """Print tables and the first findings of each kind.

        Names from the data are printed as they are: nothing in them is taken for markup.
        """
        console.print(self.images_table(), self.classes_table())
        for kind, group in groupby(self.findings, key=lambda finding: finding.kind):
            findings = list(group)
            is_fault = findings[0].is_fault
            heading = f'{kind}: {len(findings):,}' if is_fault else f'note: {kind}'
            console.print(Text(heading, style='bold red' if is_fault else 'bold'))
            for finding in findings[:LINES]:
                console.print(Text(f'  {finding.message}'), soft_wrap=True)
            if len(findings) > LINES:
                console.print(f'  and {len(findings) - LINES:,} more', highlight=False)

    def save(self, folder: Path) -> None:
        """Write all findings to problems.txt, and plots, into a folder.

        Raises:
            InputError: they cannot be written.
        """
        lines = [f'{"" if one.is_fault else "note: "}{one.kind}: {one.message}\n' for one in self.findings]
        with atomic_write(folder / 'problems.txt') as file:
            file.write_text(''.join(lines), encoding='utf-8')
        plot_classes(self.parts, folder / 'classes.png')
        plot_sizes(self.parts, folder / 'sizes.png')

    def summary(self) -> str:
        """How many faults there are, in words."""
        return f'{plural(len(self.faults), "problem")} found' if self.faults else 'no problems found'

    def images_table(self) -> Table:
        """A row for each part."""
        table = Table('part', 'images', 'width: min / median / max', 'height', 'objects', 'object size, pixels')
        if any(part.unit == 'pixels' for part in self.parts):
            table = Table('part', 'images', 'width: min / median / max', 'height', 'unlabelled pixels')
        for part in self.parts:
            widths, heights = zip(*part.sizes, strict=True) if part.sizes else ((), ())
            cells = [part.name, f'{len(part.images):,}', _spread(widths), _spread(heights)]
            if len(table.columns) == 5:
                total = part.values.sum()
                cells += [f'{part.unlabelled / total:.1%}' if total else '-']
            else:
                cells += [f'{part.amounts.total():,}', _spread(part.objects)]
            table.add_row(*cells)
        return table

    def classes_table(self) -> Table:
        """A row for each class, the most frequent of the first part first."""
        table = Table('class', *(f'{part.name}: {part.unit}' for part in self.parts))
        classes = max((part.classes for part in self.parts), key=len, default=[])
        for index in sorted(range(len(classes)), key=lambda index: -self.parts[0].amounts[index]):
            cells = [
                Text(f'{part.amounts[index]:,} ({part.share(index):.1%})')
                if part.amounts[index]
                else Text('none', style='yellow')
                for part in self.parts
            ]
            table.add_row(Text(printable(classes[index], 60)), *cells)
        return table


def _spread(values: Sequence[float]) -> str:
    """Minimum, median and maximum; one number if all are equal."""
    numbers = [f'{value:.0f}' for value in np.percentile(values, (0, 50, 100))] if len(values) else ['-']
    return ' / '.join(numbers) if len(set(numbers)) > 1 else numbers[0]
