"""What is measured: cases, candidates, and bars, the required values."""

import importlib.util
import itertools
from collections.abc import Sequence
from dataclasses import dataclass, replace

from benchmarks.candidates import CONFIGS, INFER, OPTIMIZED, OURS, RIVALS, TRAIN, Case, Size
from benchmarks.report import Bar
from swin_mm.ops.attention import KERNELS

SMALL, SQUARE, WIDE, LONG = (224, 224), (512, 512), (800, 1333), (1333, 800)
CPU_BARS = [
    Bar(Case(INFER, 'fp32', size), *bar)
    for size in (SQUARE, WIDE)
    for bar in (('ratio', 1.5, OPTIMIZED), ('ratio', 1.2), ('floor', 1.7, OPTIMIZED))
]
CPU_BARS += [Bar(Case(INFER, 'bf16', size), 'ratio', 1.8, OPTIMIZED) for size in (SQUARE, WIDE)]
CPU_BARS += [Bar(Case(TRAIN, *case), 'ratio', 1.25) for case in (('fp32', SQUARE), ('bf16', SQUARE), ('fp32', WIDE))]
ONE, EIGHT = (Case(INFER, 'bf16', (800, 1280), batch) for batch in (1, 8))
GPU_BARS = [Bar(ONE, 'ratio', 5.0, 'ours+compile'), Bar(ONE, 'ms', 1.0, 'ours+compile')]
GPU_BARS += [Bar(EIGHT, 'ratio', 3.0), Bar(EIGHT, 'ms', 6.0)]
GPU_BARS += [Bar(case, 'ratio', 1.3, 'ours+compile', 'mmdet+compile') for case in (ONE, EIGHT)]
GPU_BARS += [Bar(Case(TRAIN, 'bf16', SQUARE, 16), *bar) for bar in (('ratio', 1.8), ('memory', 0.65))]
SIDES = [(side, side) for side in (224, 384, 512, 768, 1024, 1536, 2048)]


@dataclass(frozen=True)
class Grid:
    """Cases to measure besides those of the bars: every combination.

    Args:
        task: 'backbone', 'detection' or 'segmentation'.
        modes: inference, training.
        dtypes: keys of ``DTYPES``; None for fp32 on a CPU and bf16 on a GPU.
        sizes: (height, width).
        batches: images per batch.
    """

    task: str
    modes: Sequence[str]
    dtypes: Sequence[str | None]
    sizes: Sequence[Size]
    batches: Sequence[int]


PRESETS: dict[str | None, tuple[list[Bar], list[Grid]]] = {
    'cpu': (CPU_BARS, []),
    'gpu': (
        GPU_BARS,
        [Grid('backbone', (INFER, TRAIN), ('bf16', 'fp16', 'fp32'), (SMALL, SQUARE, WIDE, LONG), (1, 8, 16))],
    ),
    'growth': (
        [],
        [
            Grid('backbone', (INFER,), (None,), SIDES, (1,)),
            Grid('backbone', (INFER,), (None,), (SMALL,), (2, 4, 8, 16)),
        ],
    ),
    'models': (
        [],
        [
            Grid('detection', (INFER, TRAIN), (None,), (WIDE,), (1,)),
            # Batch norm on the one value per channel that UPerNet pools to needs two images.
            Grid('segmentation', (INFER, TRAIN), (None,), (SQUARE,), (2,)),
        ],
    ),
    None: ([], [Grid('backbone', (INFER,), (None,), (SMALL, SQUARE), (1,))]),
}


def choose(
    preset: str | None,
    device: str,
    tasks: Sequence[str] | None = None,
    modes: Sequence[str] | None = None,
    dtypes: Sequence[str] | None = None,
    sizes: Sequence[Size] | None = None,
    batches: Sequence[int] | None = None,
    kernels: Sequence[str] = ('auto',),
    against: Sequence[str] | None = None,
    compiled: bool = False,
    quick: bool = False,
) -> tuple[dict[Case, list[str]], list[Bar]]:
    """Choose the cases, the names of the candidates of each, and the bars.

    Args:
        preset: key of ``PRESETS``.
        device: 'cpu' or 'cuda'.
        tasks: of whole models, instead of both.
        modes: inference, training; replaces the preset's, as do ``dtypes``, ``sizes`` and ``batches``.
        dtypes: see :class:`Grid`.
        sizes: see :class:`Grid`.
        batches: see :class:`Grid`.
        kernels: attention kernels of ours to measure.
        against: rivals to measure; None for the first that is installed.
        compiled: also measure each candidate compiled.
        quick: make the images tiny.
    """
    rivals = [name for name in against or RIVALS if importlib.util.find_spec(name)]
    for name in set(against or ['mmdet']) - set(rivals):
        print(f'note: {name} is not installed')
    rivals = rivals if against else rivals[:1]
    names = rivals + ['ours' if kernel == 'auto' else f'ours/{kernel}' for kernel in kernels]
    names += [f'{name}+compile' for name in names if compiled and name != OPTIMIZED]

    def shrink_if_quick(case: Case) -> Case:
        small = (max(case.size[0] // 8, 64), max(case.size[1] // 8, 64))
        return replace(case, size=small, batch=min(case.batch, 2)) if quick else case

    def with_optimized(case: Case, candidates: list[str]) -> list[str]:
        return [*candidates, OPTIMIZED] if case.what == INFER else [n for n in candidates if n != OPTIMIZED]

    bars, grids = PRESETS[preset]
    rival = rivals[0] if rivals else 'mmdet'
    bars = [replace(bar, case=shrink_if_quick(bar.case), rival=bar.rival.replace('mmdet', rival)) for bar in bars]
    elsewhere = {'cpu': 'triton', 'cuda': 'cpu'}[device]
    every = [f'ours/{kernel}' for kernel in KERNELS if preset == 'gpu' and kernel != elsewhere]
    cases: dict[Case, list[str]] = {}
    for bar in bars:
        wanted = [name for name in (bar.rival, bar.ours) if name.partition('+')[0] in [*rivals, *OURS]]
        candidates = [*cases.get(bar.case, with_optimized(bar.case, names)), *every, *wanted]
        cases[bar.case] = list(dict.fromkeys(candidates))
    for grid in grids:
        axes = (modes or grid.modes, dtypes or grid.dtypes, sizes or grid.sizes, batches or grid.batches)
        for what, dtype, size, batch in itertools.product(*axes):
            case = shrink_if_quick(Case(what, dtype or {'cpu': 'fp32', 'cuda': 'bf16'}[device], size, batch, grid.task))
            if grid.task == 'backbone':
                cases.setdefault(case, list(dict.fromkeys(with_optimized(case, names))))
            elif grid.task in (tasks or CONFIGS):
                cases[case] = [*with_optimized(case, ['stock', 'ours']), 'stock+backbone', 'ours+backbone']
    return {case: n for case, n in cases.items() if device == 'cuda' or case.dtype != 'fp16'}, bars
