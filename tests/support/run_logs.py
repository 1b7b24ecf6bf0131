"""Scalar logs as mmengine's training runs write them."""

from pathlib import Path

from mmengine.visualization import LocalVisBackend


def write(folder, *entries):
    """Log scalars as mmengine does: (iteration, values) in training, (step, values) in validation."""
    backend = LocalVisBackend(str(folder / 'vis_data'))
    for step, values in entries:
        backend.add_scalars(dict(values), step=step, file_path='20260101.json')
    return folder


def train(iteration, **values):
    return iteration, {'lr': 0.1, 'base_lr': 0.1, 'time': 0.5, **values, 'epoch': 1, 'iter': iteration}


def interrupted_run(folder: Path) -> Path:
    """Write a work_dir of a run that was interrupted after iteration 6 and resumed after 4."""
    work = folder / 'work'
    write(
        work / '1',
        train(2, loss=3.0, memory=10),
        train(4, loss=2.0),
        (1, {'mIoU': 0.5, 'time': 9.0}),
        train(6, loss=9.0),
    )
    write(work / '2', train(6, loss=1.5, memory=30), train(8, loss=float('nan')), (2, {'mIoU': 0.75, 'val_loss': 2}))
    write(work / '2', train(10, loss=1.75), (3, {'mIoU': 0.625, 'val_loss': 3}))
    return work
