"""Plots of what a data set is made of."""

from __future__ import annotations

import math
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter, NullLocator

from swin_mm.analysis.dataset_check.findings import printable
from swin_mm.analysis.figures import figure

if TYPE_CHECKING:
    from swin_mm.analysis.dataset_check.report import Part

PAGE = 8.0  # width in inches
ROWS = 50  # classes in a column
COLUMNS = 3
MARKERS = 'osD^v'


def plot_classes(parts: list[Part], path: Path) -> None:
    """Draw the share of each class in each part: dots, as a bar has no length on a logarithmic axis.

    Of more than 150 classes, the most and the least frequent are shown.
    """
    classes = max((part.classes for part in parts), key=len, default=[])
    order = sorted(range(len(classes)), key=lambda index: -parts[0].amounts[index])
    if len(order) > ROWS * COLUMNS:
        half = ROWS * COLUMNS // 2
        order = order[:half] + order[-half:]
    columns = max(1, math.ceil(len(order) / ROWS))
    rows = math.ceil(len(order) / columns) if order else 1
    shares = [part.share(index) * 100 for part in parts for index in order if part.amounts[index]]
    lowest = min([1, *shares])
    left = 10 ** (math.floor(math.log10(lowest)) - 0.3)  # where classes without examples are marked
    with figure(path, PAGE, 1.4 + 0.17 * rows) as drawn:
        panels = drawn.subplots(1, columns, squeeze=False, sharex=True)[0]
        for column, axes in enumerate(panels):
            shown = order[column * rows : (column + 1) * rows]
            _draw_shares(axes, parts, shown, left)
            names = [printable(classes[index], 24) for index in shown]
            axes.set_yticks(range(len(shown)), names, parse_math=False, fontsize=9 if columns < 3 else 7)
            axes.set(xscale='log', xlim=(left / 1.3, 130), ylim=(rows - 0.5, -0.5))
            axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f'{value:g}'))
            axes.xaxis.set_minor_locator(NullLocator())
            axes.grid(axis='both', alpha=0.3)
            axes.tick_params(axis='y', length=0)
        count = f': the most and the least frequent of {len(classes):,}' if len(order) < len(classes) else ''
        drawn.suptitle(f'Balance of classes{count}')
        unit = 'objects' if parts[0].unit == 'objects' else 'labelled pixels'
        drawn.supxlabel(f'% of {unit} (logarithmic; hollow at the left edge: none)', fontsize=9)
        panels[0].legend(loc='lower left', bbox_to_anchor=(0, 1), ncols=len(parts))


def _draw_shares(axes: Axes, parts: list[Part], shown: list[int], left: float) -> None:
    for number, part in enumerate(parts):
        shares = np.array([part.share(index) * 100 for index in shown])
        at = np.arange(len(shown)) + (number - (len(parts) - 1) / 2) * 0.2
        marker, color = MARKERS[number % len(MARKERS)], f'C{number}'
        axes.scatter(shares[shares > 0], at[shares > 0], s=22, c=color, marker=marker, label=part.name, zorder=3)
        absent = shares == 0
        axes.scatter(np.full(absent.sum(), left), at[absent], s=22, c='none', marker=marker, edgecolors=color, zorder=3)


def plot_sizes(parts: list[Part], path: Path) -> None:
    """Draw the sizes of images, as dots whose area is the number of images, and of objects."""
    objects = any(part.objects for part in parts)
    with figure(path, PAGE if objects else PAGE / 2, 4) as drawn:
        panels = drawn.subplots(1, 2 if objects else 1, squeeze=False)[0]
        _draw_image_sizes(panels[0], parts)
        if objects:
            _draw_object_sizes(panels[1], parts)


def _draw_image_sizes(axes: Axes, parts: list[Part]) -> None:
    counts = {part.name: Counter(part.sizes) for part in parts if part.sizes}
    sizes = {size for counter in counts.values() for size in counter}
    most = max((count for counter in counts.values() for count in counter.values()), default=1)
    edge = 1.12 * max((max(size) for size in sizes), default=1)
    few = len(sizes) <= 4
    written: Counter[tuple[int, int]] = Counter()
    for number, (name, counter) in enumerate(counts.items()):
        widths, heights = zip(*counter, strict=True)
        areas = [12 + 700 * count / most if most > 1 else 12 for count in counter.values()]
        axes.scatter(widths, heights, areas, f'C{number}', alpha=0.3, linewidths=0)
        for size, count in counter.items() if few else ():
            axes.scatter(size[0], size[1], s=12 + 700 * count / most, c='none', edgecolors=f'C{number}')
            right = size[0] > edge / 2  # of the middle: the text goes to the left
            offset = (-20 if right else 20, -12 * written[size] - 20)
            text = f'{name}: {count:,} of {size[0]} × {size[1]}'
            axes.annotate(text, size, offset, textcoords='offset points', fontsize=8, ha='right' if right else 'left')
            written[size] += 1
    title = f'Sizes of images (largest dot: {most:,})' if most > 1 else 'Sizes of images'
    axes.set(xlabel='width, pixels', ylabel='height, pixels', title=title, aspect='equal')
    axes.set(xlim=(0, edge), ylim=(0, edge))
    axes.grid(alpha=0.3)
    # The legend shows dots of one size.
    for number in range(len(counts)):
        axes.scatter([], [], 30, f'C{number}', label=list(counts)[number])
    if counts:
        axes.legend(loc='lower right')


def _draw_object_sizes(axes: Axes, parts: list[Part]) -> None:
    for part in parts:
        weights = np.full(len(part.objects), 100 / max(len(part.objects), 1))
        bins = np.geomspace(1, 2048, 34).tolist()
        axes.hist(np.clip(part.objects, 1, 2047), bins, weights=weights, histtype='step', label=part.name)
    axes.set(xscale='log', xlabel='√area of the box, pixels', ylabel='% of objects', title='Sizes of objects')
    ticks = [2, 8, 32, 96, 256, 1024]  # COCO calls objects from 32 to 96 medium
    axes.set_xticks(ticks, [str(tick) for tick in ticks], minor=False)
    axes.xaxis.set_minor_locator(NullLocator())
    axes.grid(alpha=0.3)
    axes.legend()
