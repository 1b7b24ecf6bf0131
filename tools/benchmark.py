"""How fast our Swin is beside those of mmdet, transformers and timm, and beside what the machine can do at best.

    python tools/benchmark.py --preset cpu       the figures for a CPU and their bars, in 8 minutes on 2 cores
    python tools/benchmark.py --preset gpu       the same for a GPU; PyTorch, Triton and NumPy are enough
    python tools/benchmark.py --preset growth    time and memory against pixels and against images per batch
    python tools/benchmark.py --preset models    whole Mask R-CNN and UPerNet, and the backbone's share
    python tools/benchmark.py --sizes 512,800x1333 --dtypes fp32,bf16 --kernels auto,sdpa --against mmdet --compile

All run in one process and take turns, so that whatever else the machine does meets them alike; ratios are taken round
by round, and a median stands with its quartiles. In bf16 and fp16, training and all of mmdet run under autocast; other
inference has its weights in that type. A training step is forward and backward, for whole models the optimizer's
step too. Sizes, types and so on, where given, replace the preset's beside its bars.

x floor: time over what the multiply-adds of our forward (training: 3 times these) take at the rate of a product of
4096 x 4096 matrices, which takes turns with the rest. MB: weights, gradients and all that lives during a call, at its
peak, without the images; on a CPU what PyTorch allocates, without scratch space of the libraries under it.
"""

import gc
import importlib.util
import itertools
import json
import math
import os
import platform
import re
import sys
import time
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from pathlib import Path

os.environ.setdefault('KINETO_LOG_LEVEL', '6')  # else the profiler that counts memory announces itself

import benchmark_report as report
import numpy as np
import torch
from benchmark_candidates import CONFIGS, DTYPES, INFER, OURS, RIVALS, TRAIN, TWINS, Bench, Case, Size, Step
from benchmark_report import Bar
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from swin_mm.models.swin import ARCHS, SwinPyramid
from swin_mm.ops.attention import KERNELS

TOLERANCES = {'fp32': 1e-3, 'fp16': 0.02, 'bf16': 0.05}  # of the largest value; seen on a CPU: 1e-6, bf16 0.018
TINY = {'embed_dims': 16, 'depths': (1, 1, 2, 1), 'num_heads': (1, 1, 2, 2)}
SAMPLE = 0.02  # seconds that a candidate's turn takes at least
PACKAGES = ('swin_mm', 'torch', 'triton', 'mmdet', 'mmseg', 'transformers', 'timm')
LIMIT = 450  # seconds after which a preset with bars begins nothing new

SMALL, SQUARE, WIDE, LONG = (224, 224), (512, 512), (800, 1333), (1333, 800)
CPU_BARS = [Bar(Case(INFER, 'fp32', size), *bar) for size in (SQUARE, WIDE) for bar in (('ratio', 1.5), ('floor', 1.7))]
CPU_BARS += [Bar(Case(INFER, 'bf16', size), 'ratio', 1.8) for size in (SQUARE, WIDE)]
CPU_BARS += [Bar(Case(TRAIN, *case), 'ratio', 1.25) for case in (('fp32', SQUARE), ('bf16', SQUARE), ('fp32', WIDE))]
ONE, EIGHT = (Case(INFER, 'bf16', (800, 1280), batch) for batch in (1, 8))
GPU_BARS = [Bar(ONE, 'ratio', 5.0, 'ours/graphs'), Bar(ONE, 'ms', 1.0, 'ours/graphs')]
GPU_BARS += [Bar(EIGHT, 'ratio', 3.0), Bar(EIGHT, 'ms', 6.0)]
GPU_BARS += [Bar(case, 'ratio', 1.3, 'ours+compile', 'mmdet+compile') for case in (ONE, EIGHT)]
GPU_BARS += [Bar(Case(TRAIN, 'bf16', SQUARE, 16), *bar) for bar in (('ratio', 1.8), ('memory', 0.65))]
SIDES = [(side, side) for side in (224, 384, 512, 768, 1024, 1536, 2048)]
USUAL = (None,)  # fp32 on a CPU, bf16 on a GPU
# Bars, then grids of cases beside theirs: task, what, types, sizes, batches.
PRESETS: dict[str | None, tuple[list[Bar], list[tuple]]] = {
    'cpu': (CPU_BARS, []),
    'gpu': (
        GPU_BARS,
        [('backbone', (INFER, TRAIN), ('bf16', 'fp16', 'fp32'), (SMALL, SQUARE, WIDE, LONG), (1, 8, 16))],
    ),
    'growth': (
        [],
        [('backbone', (INFER,), USUAL, SIDES, (1,)), ('backbone', (INFER,), USUAL, (SMALL,), (2, 4, 8, 16))],
    ),
    'models': (
        [],
        # Batch norm on the one value per channel that UPerNet pools to needs two images.
        [('detection', (INFER, TRAIN), USUAL, (WIDE,), (1,)), ('segmentation', (INFER, TRAIN), USUAL, (SQUARE,), (2,))],
    ),
    None: ([], [('backbone', (INFER,), USUAL, (SMALL, SQUARE), (1,))]),
}


def deviation(actual: Sequence[Tensor], expected: Sequence[Tensor]) -> float:
    """The largest difference in any tensor, of the largest value in it."""
    return max(((a - e).abs().max() / e.abs().max()).item() for a, e in zip(actual, expected, strict=True))


def seconds_per_call(work: Step, calls: int, device: str) -> float:
    """Time of so many calls in a row."""
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


def take_turns(works: dict[str, Step], args: Namespace) -> dict[str, list[float]]:
    """Seconds per call of each in each round, 5 to 30 rounds, as time permits."""
    calls = {name: math.ceil(SAMPLE / seconds_per_call(work, 1, args.device)) for name, work in works.items()}
    seconds: dict[str, list[float]] = {name: [] for name in works}
    end = time.perf_counter() + {'cpu': 25, 'cuda': 1}[args.device]
    for i in range(2 if args.quick else 30):
        if i >= 5 and time.perf_counter() > end:
            break
        for name in list(works)[:: -1 if i % 2 else 1]:  # forth and back, so that nobody has always the same before it
            seconds[name].append(seconds_per_call(works[name], calls[name], args.device))
    return seconds


def count_flops(case: Case, arch: dict) -> int:
    """Floating-point operations of our backbone, two for a multiply-add; backward counts twice what forward does."""
    with torch.device('meta'):
        model = SwinPyramid(**arch, attention='sdpa')
    # In training all is done by plain operators, which the counter knows.
    with sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        model(torch.empty(case.batch, 3, *case.size, device='meta'))
    return counter.get_total_flops() * (3 if case.what == TRAIN else 1)


def run_case(case: Case, names: list[str], args: Namespace) -> dict:
    """Time a case; the result as it goes into the file."""
    torch.compiler.reset()
    bench, cube = Bench(case, args.device, args.arch, args.quick), 256 if args.quick else 4096
    a, b, out = (torch.randn(cube, cube, device=args.device).to(bench.dtype) for _ in range(3))
    works: dict[str, Step] = {'matmul': lambda: [torch.mm(a, b, out=out)]}
    works['matmul']()
    rows: dict[str, dict] = {name: {} for name in names}
    result = {'name': str(case), 'case': asdict(case), 'flops': 0, 'cube': cube, 'rows': rows}
    if case.task == 'backbone':
        result['flops'] = count_flops(case, args.arch)
    expected: dict[bool, tuple[str, list[Tensor]]] = {}
    for name, row in rows.items():
        print(f'    {name}', file=sys.stderr, flush=True)
        try:
            works[name], outputs, row['memory'] = bench.start(name)
        except Exception as error:  # one may refuse a size or run out of memory; the rest shall go on
            row['note'] = f'failed: {type(error).__name__}: {" ".join(str(error).split())[:200]}'
            continue
        if name.replace('+', '/').partition('/')[0] in TWINS:
            first, theirs = expected.setdefault(name.endswith('+backbone'), (name, outputs))
            row['deviation'] = deviation(outputs, theirs)
            if not row['deviation'] <= TOLERANCES[case.dtype]:
                row['note'] = f'wrong: differs from {first} by {row["deviation"]:.2g} of the largest value'
    result['seconds'] = take_turns(works, args)
    report.summarise(result)
    return result


def parse_args() -> Namespace:
    """Read the command line."""

    def listed(*choices: str) -> Callable[[str], list[str]]:
        def read(text: str) -> list[str]:
            if unknown := [name for name in text.split(',') if name not in choices]:
                raise ArgumentTypeError(f'{", ".join(unknown)} is not known; choose from {", ".join(choices)}')
            return text.split(',')

        return read

    def numbers(text: str) -> list[int]:
        return [int(part) for part in text.split(',')]

    def sizes(text: str) -> list[Size]:
        pairs = [numbers(part.replace('x', ',')) for part in text.split(',')]
        return [(height, width) for height, width in (pair * 2 if len(pair) == 1 else pair for pair in pairs)]

    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('--preset', choices=[name for name in PRESETS if name], help='a choice of all that follows')
    parser.add_argument('--task', type=listed(*CONFIGS), help='with --preset models: of detection,segmentation')
    parser.add_argument('--what', type=listed(INFER, TRAIN), help='of inference,training')
    parser.add_argument('--dtypes', type=listed(*DTYPES), help='of fp32,bf16,fp16, the last on GPUs only')
    parser.add_argument('--sizes', type=sizes, help='images, such as 512,800x1333 (height x width)')
    parser.add_argument('--batches', type=numbers, help='images per batch, such as 1,8')
    variants = [name.partition('/')[2] for name in OURS if '/' in name]
    parser.add_argument(
        '--kernels', type=listed('auto', *variants), default=['auto'], help=f'of auto,{",".join(variants)}'
    )
    parser.add_argument(
        '--against', type=listed(*RIVALS), help='of mmdet,transformers,timm (default: the first there is)'
    )
    parser.add_argument('--compile', action='store_true', help='also each of them compiled, which takes a minute each')
    parser.add_argument('--arch', choices=ARCHS, default='t', help='size of the backbone')
    parser.add_argument('--device', choices=('cpu', 'cuda'), help='default: a GPU where there is one')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmark'), help='folder of the results')
    parser.add_argument('--quick', action='store_true', help='tiny models and images: does everything run?')
    args = parser.parse_args()
    if not args.device:
        args.device = 'cuda' if torch.cuda.is_available() and args.preset != 'cpu' else 'cpu'
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: torch sees no GPU')
    if args.preset == 'gpu' and args.device == 'cpu' and not args.quick:
        parser.error('--preset gpu: torch sees no GPU; --device cpu --quick tries whether all of it runs')
    if args.device == 'cpu' and 'fp16' in (args.dtypes or ()):
        parser.error('--dtypes fp16: on GPUs only')
    if args.out.exists() and not args.out.is_dir():
        parser.error(f'--out {args.out}: is a file, name a folder')
    args.arch = TINY if args.quick else ARCHS[args.arch]
    return args


def choose(args: Namespace) -> tuple[dict[Case, list[str]], list[Bar]]:
    """The names of the candidates of each case, and the bars."""
    rivals = [name for name in args.against or RIVALS if importlib.util.find_spec(name)]
    for name in set(args.against or ['mmdet']) - set(rivals):
        print(f'note: {name} is not installed')
    rivals = rivals if args.against else rivals[:1]
    names = rivals + ['ours' if kernel == 'auto' else f'ours/{kernel}' for kernel in args.kernels]
    names += [f'{name}+compile' for name in names if args.compile]

    def fit(case: Case) -> Case:
        small = (max(case.size[0] // 8, 64), max(case.size[1] // 8, 64))
        return replace(case, size=small, batch=min(case.batch, 2)) if args.quick else case

    bars, grids = PRESETS[args.preset]
    rival = rivals[0] if rivals else 'mmdet'
    bars = [replace(bar, case=fit(bar.case), rival=bar.rival.replace('mmdet', rival)) for bar in bars]
    elsewhere = {'cpu': 'triton', 'cuda': 'cpu'}[args.device]
    every = [f'ours/{kernel}' for kernel in KERNELS if args.preset == 'gpu' and kernel != elsewhere]
    cases: dict[Case, list[str]] = {}
    for bar in bars:
        wanted = [name for name in (bar.rival, bar.ours) if name.partition('+')[0] in [*rivals, *OURS]]
        cases[bar.case] = list(dict.fromkeys([*cases.get(bar.case, names), *every, *wanted]))
    for task, *axes in grids:
        given = (args.what, args.dtypes, args.sizes, args.batches)
        for what, dtype, size, batch in itertools.product(*(g or axis for g, axis in zip(given, axes, strict=True))):
            case = fit(Case(what, dtype or {'cpu': 'fp32', 'cuda': 'bf16'}[args.device], size, batch, task))
            if task == 'backbone':
                cases.setdefault(case, names)
            elif task in (args.task or CONFIGS):
                cases[case] = ['stock', 'ours', 'stock+backbone', 'ours+backbone']
    return {case: n for case, n in cases.items() if args.device == 'cuda' or case.dtype != 'fp16'}, bars


def describe_machine(args: Namespace) -> dict:
    """What the figures depend on besides the code; the rate of copying is measured."""
    size = (1 << 20) if args.quick else (1 << 28)
    source, target = (torch.ones(size, dtype=torch.uint8, device=args.device) for _ in range(2))
    copy = take_turns({'copy': lambda: [target.copy_(source)]}, args)['copy']
    cpu = re.search(r'model name\s*: (.*)', Path('/proc/cpuinfo').read_text()) if sys.platform == 'linux' else None
    return {
        'device': torch.cuda.get_device_name() if args.device == 'cuda' else cpu[1] if cpu else platform.machine(),
        'threads': torch.get_num_threads(),
        'system': platform.platform(),
        'python': platform.python_version(),
        'copy_bytes_per_s': 2 * size / float(np.median(copy)),
    }


def main(args: Namespace) -> int:
    """Measure, write and show; 1 if a candidate failed or deviates."""
    begin = time.perf_counter()
    cases, bars = choose(args)
    args.out.mkdir(parents=True, exist_ok=True)
    results: list[dict] = []
    record = {'command': sys.argv, 'machine': describe_machine(args), 'results': results}
    for i, (case, names) in enumerate(cases.items()):
        if bars and time.perf_counter() - begin > LIMIT:
            print(f'note: time is up, {len(cases) - i} cases were not measured')
            break
        print(f'{i + 1} of {len(cases)}: {case}', file=sys.stderr, flush=True)
        results.append(run_case(case, names, args))
        gc.collect()
        record['versions'] = {name: sys.modules[name].__version__ for name in PACKAGES if name in sys.modules}
        record['bars'] = [bar.judge(results) for bar in bars]
        part = args.out / 'benchmark.json.part'
        part.write_text(json.dumps(record, indent=1))
        os.replace(part, args.out / 'benchmark.json')
    report.show_results(results)
    report.show_machine(record)
    if bars:
        report.show_bars(record['bars'])
    if importlib.util.find_spec('matplotlib'):
        (report.plot_growth if args.preset == 'growth' else report.plot_ratios)(results, args.out / 'benchmark.png')
    else:
        print('note: no plot without matplotlib')
    print(f'written: {args.out}/benchmark.*')
    return int(any('note' in row for result in results for row in result['rows'].values()))


if __name__ == '__main__':
    sys.exit(main(parse_args()))
