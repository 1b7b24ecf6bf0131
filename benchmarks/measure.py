"""Timing: the candidates of a case take turns in one process, so that other load affects all alike."""

import gc
import json
import math
import platform
import re
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from benchmarks import report
from benchmarks.candidates import TRAIN, TWINS, Bench, Case, Step
from benchmarks.report import Bar
from swin_mm.models.swin import SwinPyramid
from swin_mm.utils.files import atomic_write

TOLERANCES = {'fp32': 1e-3, 'fp16': 0.02, 'bf16': 0.05}  # of the largest value; seen on a CPU: 1e-6, bf16 0.018
SAMPLE = 0.02  # seconds that a candidate's turn takes at least
PACKAGES = ('swin_mm', 'torch', 'triton', 'mmdet', 'mmseg', 'transformers', 'timm')
LIMIT = 450  # seconds after which a preset with bars starts no further case


def deviation(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference in any tensor, relative to the largest value in it."""
    return max(((a - e).abs().max() / e.abs().max()).item() for a, e in zip(actual, expected, strict=True))


def seconds_per_call(work: Step, calls: int, device: str) -> float:
    """Mean time of ``calls`` calls in a row."""
    if device == 'cuda':
        start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        start.record()
        for _ in range(calls):
            work()
        end.record()
        end.synchronize()
        return start.elapsed_time(end) / 1000 / calls
    begin = time.perf_counter()
    for _ in range(calls):
        work()
    return (time.perf_counter() - begin) / calls


def take_turns(works: dict[str, Step], device: str, quick: bool) -> dict[str, list[float]]:
    """Seconds per call of each in each round, 5 to 30 rounds as time permits; 2 if quick."""
    calls = {name: math.ceil(SAMPLE / seconds_per_call(work, 1, device)) for name, work in works.items()}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    end = time.perf_counter() + {'cpu': 25, 'cuda': 1}[device]
    for i in range(2 if quick else 30):
        if i >= 5 and time.perf_counter() > end:
            break
        for name in list(works)[:: -1 if i % 2 else 1]:  # back and forth, so that each has different neighbours
            seconds[name].append(seconds_per_call(works[name], calls[name], device))
    return seconds


def count_flops(case: Case, arch: dict) -> int:
    """Floating-point operations of our backbone, two for a multiply-add; backward counts twice as much as forward."""
    with torch.device('meta'):
        model = SwinPyramid(**arch, attention='sdpa')
    # In training mode only plain operators are used, which the counter knows.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.empty(case.batch, 3, *case.size, device='meta'))
    return counter.get_total_flops() * (3 if case.what == TRAIN else 1)


def run_case(case: Case, names: list[str], device: str, arch: dict, quick: bool = False) -> dict:
    """Time the candidates of a case and return the result as it goes into the file."""
    torch.compiler.reset()
    bench, cube = Bench(case, device, arch, quick), 256 if quick else 4096
    a, b, out = (torch.randn(cube, cube, device=device).to(bench.dtype) for _ in range(3))
    works: dict[str, Step] = {'matmul': lambda: [torch.mm(a, b, out=out)]}
    works['matmul']()
    rows: dict[str, dict] = {name: {} for name in names}
    result = {'name': str(case), 'case': asdict(case), 'flops': 0, 'cube': cube, 'rows': rows}
    if case.task == 'backbone':
        result['flops'] = count_flops(case, arch)
    expected: dict[bool, tuple[str, list[Tensor]]] = {}
    for name, row in rows.items():
        print(f'    {name}', file=sys.stderr, flush=True)
        try:
            works[name], outputs, row['memory'] = bench.start(name)
        except Exception as error:  # one may not support a size or run out of memory; continue with the others
            row['note'] = f'failed: {type(error).__name__}: {" ".join(str(error).split())[:200]}'
            continue
        if name.replace('+', '/').partition('/')[0] in TWINS:
            first, theirs = expected.setdefault(name.endswith('+backbone'), (name, outputs))
            row['deviation'] = deviation(outputs, theirs)
            if not row['deviation'] <= TOLERANCES[case.dtype]:
                row['note'] = f'wrong: differs from {first} by {row["deviation"]:.2g} of the largest value'
    result['seconds'] = take_turns(works, device, quick)
    report.summarise(result)
    return result


def describe_machine(device: str, quick: bool) -> dict:
    """A description of the machine, with its measured copy bandwidth."""
    size = (1 << 20) if quick else (1 << 28)
    source, target = (torch.ones(size, dtype=torch.uint8, device=device) for _ in range(2))
    copy = take_turns({'copy': lambda: [target.copy_(source)]}, device, quick)['copy']
    cpu = re.search(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text()) if sys.platform == 'linux' else None
    return {
        'device': torch.cuda.get_device_name() if device == 'cuda' else cpu[1] if cpu else platform.machine(),
        'threads': torch.get_num_threads(),
        'system': platform.platform(),
        'python': platform.python_version(),
        'copy_bytes_per_s': 2 * size / float(np.median(copy)),
    }


def measure(
    cases: dict[Case, list[str]], bars: list[Bar], out: Path, device: str, arch: dict, quick: bool = False
) -> dict:
    """Measure all cases; after each, the record so far is written to ``out/benchmark.json``.

    Args:
        cases: names of the candidates of each case.
        bars: required values.
        out: folder of the results.
        device: 'cpu' or 'cuda'.
        arch: arguments that size a backbone.
        quick: tiny models and few rounds.

    Returns:
        The record.

    Raises:
        InputError: the record cannot be written.
    """
    begin = time.perf_counter()
    results: list[dict] = []
    record = {'command': sys.argv, 'machine': describe_machine(device, quick), 'results': results}
    for i, (case, names) in enumerate(cases.items()):
        if bars and time.perf_counter() - begin > LIMIT:
            print(f'note: time is up, {len(cases) - i} cases were not measured')
            break
        print(f'{i + 1} of {len(cases)}: {case}', file=sys.stderr, flush=True)
        results.append(run_case(case, names, device, arch, quick))
        gc.collect()
        record['versions'] = {name: sys.modules[name].__version__ for name in PACKAGES if name in sys.modules}
        record['bars'] = [bar.judge(results) for bar in bars]
        with atomic_write(out / 'benchmark.json') as file:
            file.write_text(json.dumps(record, indent=1))
    return record
