"""Train a small Swin Mask R-CNN and a small Swin UPerNet on cell nuclei from random weights, test and draw both."""

import json
import math
import shutil
import signal
import subprocess
import sys
import time
from argparse import ArgumentParser, Namespace
from collections import defaultdict
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from mmengine.structures import BaseDataElement
from PIL import Image
from pycocotools import mask as rle
from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn
from rich.table import Table

from swin_mm import cli
from swin_mm.analysis import comparison
from swin_mm.analysis.prediction import Predictor, View
from swin_mm.openmmlab.config import load_config
from swin_mm.utils.errors import InputError, Stopped
from swin_mm.utils.files import atomic_write

ROOT = Path(__file__).parents[1]
DATA = Path('data/nuclei')  # where the configs look for it
NEEDED_BYTES = 500_000_000


@dataclass(frozen=True)
class Task:
    """A model of the demo.

    Args:
        name: Its name in the table.
        config: File under configs/nuclei.
        metrics: For each metric of the evaluator, its name in the table, the factor that makes it a fraction, and the
            value that it must reach.
    """

    name: str
    config: str
    metrics: dict[str, tuple[str, float, float]]


TASKS = (
    Task(
        'Mask R-CNN',
        'mask-rcnn_swin-nano_fpn_nuclei.py',
        {'coco/bbox_mAP': ('box mAP', 1, 0.40), 'coco/segm_mAP': ('mask mAP', 1, 0.40)},
    ),
    Task('UPerNet', 'upernet_swin-nano_nuclei.py', {'mIoU': ('mIoU', 0.01, 0.80)}),
)


def parse_args() -> Namespace:
    """Read the command line."""
    parser = ArgumentParser(description=__doc__)
    parser.add_argument(
        '--out', type=Path, help='new folder for checkpoints, logs and pictures (default: demo/DATE_TIME)'
    )
    parser.add_argument('--debug', action='store_true', help='show where an error arose')
    return parser.parse_args()


def main(args: Namespace) -> None:
    """Run the demo in a new folder."""
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))  # ends the running tool, too
    out = make_folder(args.out or Path('demo', time.strftime('%Y%m%d_%H%M%S')))
    try:
        run_demo(out)
    except OSError as error:  # a full disk, for instance
        raise InputError(f'{error.filename or out} cannot be read or written: {error.strerror or error}') from error


def run_demo(out: Path) -> None:
    """Train, test and draw both models, and check the metrics."""
    console = Console()
    table = Table('model', 'metric', 'on val', 'required', 'training', 'test', title='Swin from random weights, on CPU')
    failed = []
    columns = (TextColumn('{task.description}'), BarColumn(), TextColumn('{task.fields[loss]}'), TimeElapsedColumn())
    with Progress(*columns, console=console) as progress:
        for task in TASKS:
            work_dir = out / Path(task.config).stem
            test_dir = work_dir / 'test'
            config = ROOT / 'configs/nuclei' / task.config
            training = run_tool(progress, task, 'train', work_dir, config)
            checkpoint = (work_dir / 'last_checkpoint').read_text()
            testing = run_tool(progress, task, 'test', test_dir, config, checkpoint)
            metrics = json.loads(next(test_dir.glob('*/*.json')).read_text())
            for key, (name, factor, required) in task.metrics.items():
                value = metrics[key] * factor
                failed += [name] if value < required else []
                shown = f'[{"red" if value < required else "green"}]{value:.3f}'
                table.add_row(task.name, name, shown, f'{required:.2f}', clock(training), clock(testing))
    with (out / 'pictures.log').open('w') as log, redirect_stdout(log), redirect_stderr(log):
        pictures = draw(out)
    console.print(table)
    console.print(f'pictures: {pictures}\ncheckpoints and logs: {out}', markup=False, highlight=False, soft_wrap=True)
    if failed:
        sys.exit(f'training finished, but {", ".join(failed)} did not reach the required value')


def make_folder(out: Path) -> Path:
    """Create the folder for everything that the demo writes.

    Raises:
        InputError: it exists, cannot be created or has too little space, or the images are not here.
    """
    if not DATA.is_dir():
        raise InputError(f'{DATA} is not here; run the demo in the root folder of the repository')
    try:
        out.mkdir(parents=True)
        free = shutil.disk_usage(out).free
    except FileExistsError:
        raise InputError(f'{out} exists and nothing is overwritten; give another folder with --out') from None
    except OSError as error:
        raise InputError(f'{out} cannot be created: {error.strerror}; give another folder with --out') from error
    if free < NEEDED_BYTES:
        out.rmdir()
        raise InputError(
            f'{out} would have {free / 1e6:.0f} MB and the demo needs {NEEDED_BYTES / 1e6:.0f} MB; free some space or '
            'give another folder with --out'
        )
    return out


def run_tool(progress: Progress, task: Task, name: str, work_dir: Path, config: Path, *arguments: str) -> float:
    """Run one of the tools as a user would: its progress on the terminal, what it prints in a log file.

    Returns:
        Seconds.

    Raises:
        Stopped: on Ctrl-C.
    """
    command = [f'tools/{name}.py', str(config), *arguments, '--work-dir', str(work_dir)]
    log = work_dir.with_suffix('.log')
    progress.console.print(
        f'$ python {" ".join(command)} > {log}', style='dim', markup=False, highlight=False, soft_wrap=True
    )
    total = count_iterations(config) if name == 'train' else None
    bar = progress.add_task(f'{task.name}, {name}', total=total, loss='')
    start = time.perf_counter()
    with log.open('w') as file:
        process = subprocess.Popen([sys.executable, ROOT / command[0], *command[1:]], stdout=file, stderr=file)
    try:
        while process.poll() is None:
            time.sleep(0.5)
            if record := last_training_record(work_dir):
                show(progress, bar, record)
    except KeyboardInterrupt:  # the tool got the signal, too, and saves a checkpoint
        process.wait()
        raise Stopped(f'the demo was stopped; {log} says how to resume this training', signal.SIGINT) from None
    finally:
        process.terminate()
        process.wait()
    if process.returncode:
        full = shutil.disk_usage(log.parent).free < 1_000_000  # then the log may lack its end
        reason = 'the disk is full' if full else log.read_text(errors='replace').strip().rpartition('\n')[2]
        sys.exit(f'tools/{name}.py failed with exit code {process.returncode}: {reason} (the whole log: {log})')
    progress.update(bar, total=1, completed=1)
    return time.perf_counter() - start


def count_iterations(config: Path) -> int:
    """The number of iterations of a training."""
    cfg = load_config(config)
    batches = math.ceil(len(list((DATA / 'train').iterdir())) / cfg.train_dataloader.batch_size)
    return cfg.train_cfg.get('max_iters') or cfg.train_cfg.max_epochs * batches


def last_training_record(work_dir: Path) -> dict:
    """The last record that mmengine has logged."""
    for file in work_dir.glob('*/vis_data/scalars.json'):
        records = map(json.loads, file.read_text().splitlines())
        return max((record for record in records if 'loss' in record), key=lambda record: record['step'], default={})
    return {}


def show(progress: Progress, bar: TaskID, record: dict) -> None:
    """Move a progress bar, or print a line where there is no terminal."""
    task = progress.tasks[bar]
    if record['step'] > task.completed and not progress.console.is_terminal:
        progress.console.print(f'{task.description}: {record["step"]} of {task.total}, loss {record["loss"]:.2f}')
    progress.update(bar, completed=record['step'], loss=f'loss {record["loss"]:.2f}')


def clock(seconds: float) -> str:
    """Seconds as minutes:seconds."""
    return f'{int(seconds) // 60}:{int(seconds) % 60:02}'


def draw(out: Path) -> Path:
    """Draw what both models predict on a few validation images, beside the annotation, and join three of them.

    Returns:
        The file with the three.
    """
    images = sorted((DATA / 'val').glob('*.jpg'))[::8]
    mask_rcnn, upernet = (predict(out / Path(task.config).stem, task.config, images) for task in TASKS)
    truth = load_annotated_masks()
    rows = []
    for image in images:
        picture = comparison.brighten(np.asarray(Image.open(image).convert('RGB')))
        objects = mask_rcnn[image.stem].pred_instances.masks.numpy()
        pixels = upernet[image.stem].pred_sem_seg.data[0].numpy() == 1
        rows.append(
            (
                comparison.draw_annotation(picture, truth[image.name]),
                comparison.draw_objects(picture, truth[image.name], objects),
                comparison.draw_pixels(picture, truth[image.name].any(axis=0), pixels),
            )
        )
    titles = ('annotation', *(task.name for task in TASKS))
    files = [out / 'pictures' / f'{image.stem}.jpg' for image in images] + [out / 'pictures.jpg']
    for file, shown in zip(files, [*([row] for row in rows), rows[::3]], strict=True):
        with atomic_write(file) as part:
            sheet = comparison.contact_sheet(titles, shown)
            sheet.thumbnail((1080, 1400))
            sheet.save(part, quality=75, subsampling=0)
    return files[-1]


def predict(work_dir: Path, config: str, images: list[Path]) -> dict[str, BaseDataElement]:
    """Predict images with a model of the demo; objects of low score are left out."""
    cfg = load_config(ROOT / 'configs/nuclei' / config)
    predictor = Predictor(cfg, (work_dir / 'last_checkpoint').read_text(), 'cpu', score_thr=0.5)
    views = (View(image.stem, predictor.read(str(image))) for image in images)
    return {view.name: sample for view, sample in predictor.predict(views)}


def load_annotated_masks() -> dict[str, np.ndarray]:
    """The masks, bool (n, H, W), of each validation image."""
    content = json.loads((DATA / 'annotations/val.json').read_text())
    names = {image['id']: image['file_name'] for image in content['images']}
    masks = defaultdict(list)
    for annotation in content['annotations']:
        masks[names[annotation['image_id']]].append(rle.decode(annotation['segmentation']).astype(bool))
    return {name: np.stack(each) for name, each in masks.items()}


if __name__ == '__main__':
    sys.exit(cli.run(main, parse_args()))
