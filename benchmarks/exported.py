"""Time exported files of whole models against the stock model in PyTorch, on the processor.

    python -m benchmarks.exported --prepare      export and quantize; minutes
    python -m benchmarks.exported                time what is there; 10 minutes on 2 cores

Mask R-CNN with Swin-T at 800 x 1333 and UPerNet with Swin-T at 512 x 512, one image, from pixels to predictions in
pixels. Stock is mmdet's and mmseg's own model in eager PyTorch. All have the same random weights, so INT8 here is the
time of a network with every layer quantized; tools/quantize.py keeps layers in float where trained weights need it.
Candidates take turns in one process, and ratios are taken round by round; the peak of memory is that of a process of
its own, from before the file is loaded.
"""

import gc
import json
import subprocess
import sys
from argparse import ArgumentParser, Namespace, RawDescriptionHelpFormatter
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from torch import nn

from benchmarks.candidates import CONFIGS, INFER, ROOT, Case, optimized, whole_model
from benchmarks.measure import take_turns
from swin_mm.analysis.export import export
from swin_mm.analysis.quantization import calibrate
from swin_mm.analysis.runtime import ExportedModel, read_metadata
from swin_mm.openmmlab.config import load_config
from swin_mm.utils.files import atomic_write

SIZES = {'segmentation': (512, 512), 'detection': (800, 1333)}
# Name -> suffix of the file, runtime, dtype.
FILES = {
    'onnxruntime fp32': ('.onnx', 'onnxruntime', 'fp32'),
    'onnxruntime int8': ('-int8.onnx', 'onnxruntime', 'fp32'),
    'openvino fp32': ('.onnx', 'openvino', 'fp32'),
    'openvino bf16': ('.onnx', 'openvino', 'bf16'),
    'openvino int8': ('-int8.xml', 'openvino', 'fp32'),
}
BARS = {'fp32': 1.5, 'int8': 2.5}  # for the faster of the two runtimes


def stock_model(task: str, quick: bool) -> nn.Module:
    """The stock model with random weights."""
    torch.manual_seed(0)
    model, _ = whole_model('stock', Case(INFER, 'fp32', image_size(task, quick), 1, task), 'cpu', quick)
    return model.eval()


def example(task: str, quick: bool) -> dict:
    """An image as a model takes it; the tiny model that comes with it does not matter."""
    return whole_model('stock', Case(INFER, 'fp32', image_size(task, quick), 1, task), 'cpu', True)[1]


def image_size(task: str, quick: bool) -> tuple[int, int]:
    """(height, width)."""
    return (128, 160) if quick else SIZES[task]


def prepare(task: str, folder: Path, quick: bool) -> None:
    """Write the stock model's weights, and export and quantize from them."""
    import onnx
    import openvino

    if (
        find_spec('nncf') is None
    ):  # not imported before the export: it patches PyTorch, which torch.export then trips over
        sys.exit('--prepare needs nncf')
    folder.mkdir(parents=True, exist_ok=True)
    model, data = stock_model(task, quick), example(task, quick)
    checkpoint, file = folder / f'{task}.pth', folder / f'{task}.onnx'
    torch.save({'state_dict': model.state_dict(), 'meta': {}}, checkpoint)
    if not file.exists():
        export(load_config(ROOT / 'configs' / CONFIGS[task][quick]), str(checkpoint), 'onnx', file)
    metadata = read_metadata(file)
    images = [ExportedModel(str(file)).data_preprocessor(data)['inputs'].numpy()]
    int8 = calibrate(openvino.Core().read_model(file), images, metadata.input.name, file)
    int8.set_rt_info(metadata.dumps(), 'swin_mm')
    openvino.save_model(int8, folder / f'{task}-int8.xml', compress_to_fp16=False)
    onnx.save(calibrate(onnx.load(file), images, metadata.input.name, file), folder / f'{task}-int8.onnx')


def build(task: str, name: str, folder: Path, quick: bool, data: dict) -> Callable[[], Any]:
    """The step of a candidate: pixels to predictions."""
    if name == 'stock':
        model: Any = stock_model(task, quick)
    elif name == 'ours in PyTorch':
        model, _ = whole_model('ours', Case(INFER, 'fp32', image_size(task, quick), 1, task), 'cpu', quick)
        model.load_state_dict(stock_model(task, quick).state_dict())
        model = optimized(model.eval())
    else:
        suffix, runtime, dtype = FILES[name]
        model = ExportedModel(str(folder / f'{task}{suffix}'), runtime, dtype)

    def step() -> Any:
        with torch.no_grad():
            return model.test_step({'inputs': list(data['inputs']), 'data_samples': list(data['data_samples'])})

    return step


def peak_memory(task: str, name: str, folder: Path, quick: bool) -> int:
    """Bytes of memory that a candidate takes at most while it is built and runs twice, in this process (Linux)."""
    data = example(task, quick)
    step = build(task, 'stock', folder, True, example(task, True))  # what libraries take does not count
    step()
    del step
    gc.collect()
    Path('/proc/self/clear_refs').write_text('5')  # forget the peak so far
    before = memory('VmRSS')
    step = build(task, name, folder, quick, data)
    step()
    step()
    return memory('VmHWM') - before


def memory(field: str) -> int:
    """Bytes of a field of /proc/self/status."""
    lines = Path('/proc/self/status').read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field)) * 1024


def measure(task: str, folder: Path, quick: bool) -> dict[str, dict[str, Any]]:
    """Time the candidates of a task in turns; a row for each."""
    names = ['stock', 'ours in PyTorch', *FILES]
    rows: dict[str, dict[str, Any]] = {name: {} for name in names}
    steps, data = {}, example(task, quick)
    for name, row in rows.items():
        command = [sys.executable, '-m', 'benchmarks.exported', '--memory', task, name, '--out', str(folder)]
        done = subprocess.run([*command, *['--quick'] * quick], capture_output=True, text=True, cwd=ROOT, check=False)
        row['memory'] = int(done.stdout.split()[-1]) if done.returncode == 0 else None
        try:
            steps[name] = build(task, name, folder, quick, data)
            steps[name]()
        except Exception as error:  # bf16 or a library may be missing
            row['note'] = ' '.join(str(error).split())[:120]
            steps.pop(name, None)
    seconds = take_turns(steps, 'cpu', quick)
    stock = np.array(seconds['stock'])
    for name, times in seconds.items():
        low, median, high = np.percentile(stock / np.array(times), (25, 50, 75)).tolist()
        rows[name] |= {'seconds': float(np.median(times)), 'ratio': median, 'quartiles': (low, high)}
    return rows


def show(task: str, rows: dict[str, dict[str, Any]], console: Console) -> None:
    """Print a table, and the bars."""
    height, width = SIZES[task]
    table = Table('', 's', 'x stock', 'quartiles', 'peak MB', title=f'{task} {height} x {width}')
    for name, row in rows.items():
        memory = '' if row.get('memory') is None else f'{row["memory"] / 1e6:.0f}'
        if 'note' in row:
            table.add_row(name, row['note'], '', '', memory)
        else:
            low, high = row['quartiles']
            table.add_row(name, f'{row["seconds"]:.2f}', f'{row["ratio"]:.2f}', f'{low:.2f}..{high:.2f}', memory)
    console.print(table)
    for dtype, bar in BARS.items():
        best = max((rows[name].get('ratio', 0.0) for name in FILES if name.endswith(dtype)), default=0.0)
        console.print(f'{dtype}: {best:.2f} of {bar:.1f} required: {"passed" if best >= bar else "missed"}')


def parse_args() -> Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('--prepare', action='store_true', help='export and quantize')
    parser.add_argument('--task', choices=SIZES, help='only this one')
    parser.add_argument('--out', type=Path, default=Path('work_dirs/exported'), help='folder of files and results')
    parser.add_argument('--quick', action='store_true', help='tiny models and images, to see whether everything runs')
    parser.add_argument('--memory', nargs=2, metavar=('TASK', 'NAME'), help='print the peak of one candidate, in bytes')
    return parser.parse_args()


def main(args: Namespace) -> None:
    """Prepare or measure."""
    folder = args.out.absolute()
    if args.memory:
        print(peak_memory(*args.memory, folder, args.quick))
        return
    console, results = Console(width=100), {}
    for task in [args.task] if args.task else SIZES:
        if args.prepare:
            prepare(task, folder, args.quick)
            continue
        results[task] = measure(task, folder, args.quick)
        show(task, results[task], console)
    if results:
        with atomic_write(folder / 'exported.json') as file:
            file.write_text(json.dumps({'threads': torch.get_num_threads(), 'results': results}, indent=1))


if __name__ == '__main__':
    main(parse_args())
