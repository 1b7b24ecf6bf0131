"""What a check reports: faults, which should be fixed before training, and notes, which are for information."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

# Faults.
ANNOTATIONS = 'annotation files'
IDS = 'ids'
MISSING = 'missing files'
UNREADABLE = 'files that cannot be decoded'
UNUSED = 'files that are not used'
SIZES = 'sizes that differ'
LABELS = 'labels out of range'
CHANNELS = 'label maps with several channels'
NO_LABELS = 'label maps with nothing to learn'
BOXES = 'empty or invalid boxes'
MASKS = 'empty or invalid masks'
CLASSES = 'classes of data, config and heads'
SHARED = 'training images in other parts'
PIPELINE = 'training pipeline'
# Notes.
SUBSET = 'categories that are left out'
ABSENT = 'classes without examples in train'
VOID = 'unlabelled pixels'
EVALUATION = 'evaluation'
PADDING = 'padding'
SCHEDULE = 'schedule'
NOTES = (SUBSET, ABSENT, VOID, EVALUATION, PADDING, SCHEDULE)

LONGEST_MESSAGE = 600


@dataclass(frozen=True, order=True)
class Finding:
    """One thing that the check reports.

    Args:
        kind: One of the constants above; it is the heading in the report.
        message: Where and what, on one line of printable text.
    """

    kind: str
    message: str

    def __post_init__(self) -> None:
        object.__setattr__(self, 'message', printable(self.message))

    @property
    def is_fault(self) -> bool:
        """Whether it should be fixed before training; False for information."""
        return self.kind not in NOTES


def printable(text: object, longest: int = LONGEST_MESSAGE) -> str:
    r"""Text on one line that any terminal and file can take.

    Names in data may hold line breaks, terminal control sequences or, from a file system, bytes that are not UTF-8:
    these are shown as escapes such as ``\x1b`` and ``\udcff``.
    """
    text = str(text)
    if len(text) > longest:
        text = f'{text[: longest - 3]}...'
    return ''.join(c if c.isprintable() else c.encode('unicode_escape').decode('ascii') for c in text)


def short(value: Any, longest: int = 60) -> str:
    """The ``repr`` of a value from the data, shortened."""
    return printable(repr(value), longest)


def listed(items: Iterable[Any], most: int = 10) -> str:
    """Items separated by commas, of which the first ``most`` are shown."""
    items = list(items)
    shown = ', '.join(short(item) for item in items[:most])
    return f'{shown} and {len(items) - most:,} more' if len(items) > most else shown


def plural(count: int, noun: str) -> str:
    """A count with its noun: 1 image, 2 images."""
    return f'{count:,} {noun}{"" if count == 1 else "s"}'
