"""Compare the speed of our Swin with mmdet's, transformers' and timm's, and with the peak of the machine.

    python tools/benchmark.py --preset cpu       the figures for a CPU and their bars, in 6 minutes on 2 cores
    python tools/benchmark.py --preset gpu       the same for a GPU; PyTorch, Triton and NumPy are enough
    python tools/benchmark.py --preset count     kernel launches and bytes of a GPU, counted without one, in a minute
    python tools/benchmark.py --preset growth    time and memory against pixels and against images per batch
    python tools/benchmark.py --preset models    whole Mask R-CNN and UPerNet, and the backbone's share
    python tools/benchmark.py --sizes 512,800x1333 --dtypes fp32,bf16 --kernels auto,sdpa --against mmdet --compile

All candidates run in one process and take turns, so that whatever else the machine does affects all alike; ratios are
taken round by round, and a median is given with its quartiles. `ours` is the plain backbone; `ours/optimized` is the
result of swin_mm.optimize_for_inference. In bf16 and fp16, training and all of mmdet run under autocast; other
inference has its weights in that type. A training step is forward and backward, for whole models with the optimizer's
step. Sizes, types and so on, where given, replace the preset's, except for its bars.

x floor: time over what the multiply-adds of our forward (training: 3 times these) take at the rate of a product of
4096 x 4096 matrices, which takes turns with the rest. MB: weights, gradients and all that lives during a call, at its
peak, without the images; on a CPU what PyTorch allocates, without scratch space of the libraries under it.
"""

import importlib.util
import os
import sys
from argparse import ArgumentParser, ArgumentTypeError, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault('KINETO_LOG_LEVEL', '6')  # else the profiler that counts memory announces itself

ROOT = Path(__file__).resolve().parents[1]
if not (ROOT / 'benchmarks').is_dir():
    print(
        f'error: {ROOT / "benchmarks"} does not exist: the benchmark is part of the repository, not of the installed '
        'package; clone the repository and run tools/benchmark.py there',
        file=sys.stderr,
    )
    sys.exit(2)
sys.path.insert(0, str(ROOT))

import torch  # noqa: E402

from benchmarks import count_gpu, report  # noqa: E402
from benchmarks.candidates import CONFIGS, DTYPES, INFER, OURS, RIVALS, TRAIN, Size  # noqa: E402
from benchmarks.measure import measure  # noqa: E402
from benchmarks.presets import PRESETS, choose  # noqa: E402
from swin_mm.models.swin import ARCHS  # noqa: E402
from swin_mm.utils.errors import InputError  # noqa: E402

TINY = {'embed_dims': 16, 'depths': (1, 1, 2, 1), 'num_heads': (1, 1, 2, 2)}


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
    parser.add_argument(
        '--preset', choices=[*(name for name in PRESETS if name), 'count'], help='a preset of the options below'
    )
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
        '--against', type=listed(*RIVALS), help='of mmdet,transformers,timm (default: the first installed)'
    )
    parser.add_argument('--compile', action='store_true', help='also each of them compiled, which takes a minute each')
    parser.add_argument('--arch', choices=ARCHS, default='t', help='size of the backbone')
    parser.add_argument('--device', choices=('cpu', 'cuda'), help='default: a GPU where there is one')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/benchmark'), help='folder of the results')
    parser.add_argument('--quick', action='store_true', help='tiny models and images, to see whether everything runs')
    args = parser.parse_args()
    if not args.device:
        args.device = 'cuda' if torch.cuda.is_available() and args.preset != 'cpu' else 'cpu'
    if args.device == 'cuda' and not torch.cuda.is_available():
        parser.error('--device cuda: torch sees no GPU')
    if args.preset == 'gpu' and args.device == 'cpu' and not args.quick:
        parser.error('--preset gpu: torch sees no GPU; --device cpu --quick checks that everything runs')
    if args.device == 'cpu' and 'fp16' in (args.dtypes or ()):
        parser.error('--dtypes fp16: on GPUs only')
    if args.preset == 'count' and importlib.util.find_spec('triton') is None:
        parser.error('--preset count: needs Triton, whose kernels are counted; pip install triton')
    if args.out.exists() and not args.out.is_dir():
        parser.error(f'--out {args.out}: is a file, name a folder')
    args.arch = TINY if args.quick else ARCHS[args.arch]
    return args


def main(args: Namespace) -> int:
    """Measure, write and show; 1 if a candidate failed or deviates, 2 if the results cannot be written."""
    if args.preset == 'count':
        return count(args)
    cases, bars = choose(
        args.preset,
        args.device,
        args.task,
        args.what,
        args.dtypes,
        args.sizes,
        args.batches,
        args.kernels,
        args.against,
        args.compile,
        args.quick,
    )
    try:
        record = measure(cases, bars, args.out, args.device, args.arch, args.quick)
        report.show(record)
        if importlib.util.find_spec('matplotlib'):
            report.plot(record, args.out / 'benchmark.png', growth=args.preset == 'growth')
        else:
            print('note: no plot without matplotlib')
    except InputError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    print(f'written: {args.out}/benchmark.*')
    return int(any('note' in row for result in record['results'] for row in result['rows'].values()))


def count(args: Namespace) -> int:
    """Count launches and bytes; 2 if the results cannot be written."""
    try:
        count_gpu.run(args.out, args.arch, args.quick)
    except InputError as error:
        print(f'error: {error}', file=sys.stderr)
        return 2
    print(f'written: {args.out}/count.json')
    return 0


if __name__ == '__main__':
    sys.exit(main(parse_args()))
