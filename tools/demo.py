"""The main job: make data, train a small Swin Mask R-CNN and a small Swin UPerNet from nothing, test and draw both."""

import json
import subprocess
import sys
import time
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
from rich.console import Console
from rich.table import Table

from swin_mm import cli
from swin_mm.utils.errors import InputError

ROOT = Path(__file__).parents[1]


@dataclass(frozen=True)
class Task:
    """A model of the demo.

    Args:
        name: what the table calls it.
        config: file under configs/demo.
        bars: metric as the evaluator names it -> (its name in the table, factor to a fraction, what it must reach).
    """

    name: str
    config: str
    bars: dict[str, tuple[str, float, float]]


TASKS = (
    Task(
        'Mask R-CNN',
        'mask-rcnn_swin-nano_fpn_digits.py',
        {'coco/bbox_mAP': ('box mAP', 1, 0.30), 'coco/segm_mAP': ('mask mAP', 1, 0.30)},
    ),
    Task('UPerNet', 'upernet_swin-nano_digits.py', {'mIoU': ('mIoU', 0.01, 0.60)}),
)


def parse_args() -> Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__, formatter_class=ArgumentDefaultsHelpFormatter)
    parser.add_argument(
        '--out', type=Path, help='folder for checkpoints, logs and pictures (default: a new one in demo/, by the time)'
    )
    parser.add_argument('--debug', action='store_true', help='show where an error arose')
    return parser.parse_args()


def main(args: Namespace) -> None:
    """Run everything and judge it."""
    out = args.out or Path('demo', time.strftime('%Y%m%d_%H%M%S'))
    if out.exists():
        raise InputError(f'{out} exists; give another folder with --out, nothing is overwritten')
    if not Path('demo/data').exists():  # the configs look for it there
        tool('make_demo_data.py', 'demo/data')
    table = Table(
        'model', 'metric', 'on val', 'asked for', 'training', 'test', title='Swin from random weights, on CPU'
    )
    missed = []
    for task in TASKS:
        config, work_dir = ROOT / 'configs/demo' / task.config, out / Path(task.config).stem
        training = tool('train.py', config, '--work-dir', work_dir)
        checkpoint = Path((work_dir / 'last_checkpoint').read_text())
        test_dir, drawn = work_dir / 'test', out / 'pictures' / task.name
        testing = tool('test.py', config, checkpoint, '--work-dir', test_dir, '--show-dir', drawn)
        metrics = json.loads(next(test_dir.glob('*/*.json')).read_text())
        for key, (name, factor, bar) in task.bars.items():
            value = metrics[key] * factor
            missed += [name] if value < bar else []
            colour = 'red' if value < bar else 'green'
            table.add_row(task.name, name, f'[{colour}]{value:.3f}', f'{bar:.2f}', clock(training), clock(testing))
        contact_sheet(sorted(drawn.rglob('*.[jp][pn]g')), out / 'pictures' / f'{Path(task.config).stem}.png')
    console = Console()
    console.print(table)
    console.print(f'pictures (ground truth left, prediction right): {out / "pictures"}')
    console.print(f'checkpoints and logs: {", ".join(str(out / Path(task.config).stem) for task in TASKS)}')
    if missed:
        raise InputError(f'the demo trained, but {", ".join(missed)} stayed below what was asked for')


def tool(name: str, *arguments: object) -> float:
    """Run one of the tools as a user would, and return the seconds it took."""
    command = ['tools/' + name, *map(str, arguments)]
    print(f'\n$ python {" ".join(command)}', flush=True)
    start = time.perf_counter()
    code = subprocess.run([sys.executable, ROOT / command[0], *command[1:]]).returncode
    if code:
        sys.exit(code)
    return time.perf_counter() - start


def clock(seconds: float) -> str:
    """Seconds as minutes:seconds."""
    return f'{int(seconds) // 60}:{int(seconds) % 60:02}'


def contact_sheet(pictures: list[Path], file: Path, columns: int = 2, rows: int = 3) -> None:
    """Join the first pictures into one."""
    tiles = [cv2.imread(str(picture)) for picture in pictures[: columns * rows]]
    tiles = [cv2.copyMakeBorder(tile, 4, 4, 4, 4, cv2.BORDER_CONSTANT, value=(255, 255, 255)) for tile in tiles]
    lines = [np.hstack(tiles[i : i + columns]) for i in range(0, len(tiles) // columns * columns, columns)]
    cv2.imwrite(str(file), np.vstack(lines))


if __name__ == '__main__':
    arguments = parse_args()
    sys.exit(cli.run(main, arguments))
