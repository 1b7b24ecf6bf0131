"""A tiny data set, tiny models, and a way to run the tools as a user does."""

import json
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).parents[2]
CLASSES = ('square', 'bar')

# The project's own configs, with everything in them made small.
SMALL_BACKBONE = """
    backbone=dict(embed_dims=16, depths=[1, 1, 1, 1], num_heads=[1, 1, 2, 2], drop_path_rate=0., init_cfg=None),"""
DETECTION = """
_base_ = r'{root}/configs/mask_rcnn/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'
model = dict({backbone}
    neck=dict(in_channels=[16, 32, 64, 128], out_channels=16),
    rpn_head=dict(in_channels=16, feat_channels=16),
    roi_head=dict(
        bbox_roi_extractor=dict(out_channels=16),
        bbox_head=dict(in_channels=16, fc_out_channels=16, num_classes=2),
        mask_roi_extractor=dict(out_channels=16),
        mask_head=dict(in_channels=16, conv_out_channels=16, num_convs=1, num_classes=2)),
    train_cfg=dict(rcnn=dict(sampler=dict(num=16))),
    test_cfg=dict(rpn=dict(max_per_img=20)))
data_root = r'{data}/coco'
dataset = dict(data_root=data_root, metainfo=dict(classes={classes}))
train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline
train_pipeline[2].scale = test_pipeline[1].scale = (96, 64)
train_dataloader = dict(num_workers=1, dataset=dict(pipeline=train_pipeline, **dataset))
val_dataloader = dict(num_workers=1, dataset=dict(pipeline=test_pipeline, **dataset))
test_dataloader = val_dataloader
val_evaluator = dict(ann_file=data_root + '/annotations/instances_val2017.json')
test_evaluator = val_evaluator
train_cfg = dict(max_epochs=1)
default_hooks = dict(logger=dict(interval=1))
"""
SEGMENTATION = """
_base_ = r'{root}/configs/upernet/upernet_swin-t-p4-w7_8xb2-160k_ade20k-512x512.py'
model = dict({backbone}
    decode_head=dict(in_channels=[16, 32, 64, 128], channels=16, num_classes=2),
    auxiliary_head=dict(in_channels=64, channels=16, num_classes=2))
data_root = r'{data}/ade'
metainfo = dict(classes={classes}, palette=[[255, 0, 0], [0, 255, 0]])
dataset = dict(type='BaseSegDataset', reduce_zero_label=True, data_root=data_root, metainfo=metainfo)
train_pipeline, test_pipeline = _base_.train_pipeline, _base_.test_pipeline
train_pipeline[2].scale = test_pipeline[1].scale = (96, 64)
train_pipeline[3].crop_size = (64, 64)
train_dataloader = dict(batch_size=2, num_workers=1, dataset=dict(pipeline=train_pipeline, **dataset))
val_dataloader = dict(num_workers=1, dataset=dict(pipeline=test_pipeline, **dataset))
test_dataloader = val_dataloader
train_cfg = dict(max_iters=3, val_interval=3)
default_hooks = dict(logger=dict(interval=1), checkpoint=dict(interval=3))
"""


@dataclass
class Tiny:
    """One of the two tasks on tiny data."""

    task: str
    config: Path
    metric: str


def command(tool: str, *arguments: object) -> list[str]:
    """The command line of a tool."""
    return [sys.executable, str(ROOT / 'tools' / f'{tool}.py'), *map(str, arguments)]


def run_tool(tool: str, *arguments: object, cwd: Path, timeout: int = 300) -> str:
    """Run ``python tools/TOOL.py ARGUMENTS`` as a user does, and return the output."""
    done = subprocess.run(
        command(tool, *arguments), cwd=cwd, text=True, capture_output=True, timeout=timeout, check=False
    )
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-4000:]
    return done.stdout + done.stderr


def make_data(folder: Path) -> None:
    """Bright rectangles on noise: six training and two validation scenes, as COCO and as ADE20K lay them out."""
    random = np.random.default_rng(0)
    for split, ade_split, count in (('train2017', 'training', 6), ('val2017', 'validation', 2)):
        images, annotations = [], []
        for index in range(1, count + 1):
            picture = random.integers(0, 60, (64, 96, 3), dtype=np.uint8)
            labels = np.zeros((64, 96), np.uint8)
            for label, (width, height) in enumerate(((20, 20), (40, 12)), start=1):
                x, y = (int(random.integers(0, 96 - width)), int(random.integers(0, 64 - height)))
                picture[y : y + height, x : x + width] = 255 if label == 1 else 160
                labels[y : y + height, x : x + width] = label
                box = [x, y, width, height]
                outline = [[x, y, x + width, y, x + width, y + height, x, y + height]]
                annotations.append(
                    {
                        'id': len(annotations) + 1,
                        'image_id': index,
                        'category_id': label,
                        'bbox': box,
                        'area': width * height,
                        'segmentation': outline,
                        'iscrowd': 0,
                    }
                )
            images.append({'id': index, 'file_name': f'{index}.jpg', 'width': 96, 'height': 64})
            for path, array in (
                (f'coco/{split}/{index}.jpg', picture),
                (f'ade/images/{ade_split}/{index}.jpg', picture),
                (f'ade/annotations/{ade_split}/{index}.png', labels),
            ):
                (folder / path).parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(array).save(folder / path)
        categories = [{'id': label, 'name': name} for label, name in enumerate(CLASSES, start=1)]
        path = folder / f'coco/annotations/instances_{split}.json'
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({'images': images, 'annotations': annotations, 'categories': categories}))


def make_tiny(task: str, data: Path, folder: Path) -> Tiny:
    """Write the tiny config of a task."""
    pytest.importorskip('mmdet' if task == 'detection' else 'mmseg')
    text = DETECTION if task == 'detection' else SEGMENTATION
    config = folder / 'tiny.py'
    config.write_text(text.format(root=ROOT, data=data, backbone=SMALL_BACKBONE, classes=CLASSES))
    return Tiny(task, config, 'coco/bbox_mAP' if task == 'detection' else 'mIoU')


class Bomb:
    """An object whose unpickling would leave a file."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> tuple:
        return (open, (str(self.mark), 'w'))


def last_checkpoint(work_dir: Path) -> Path:
    """The checkpoint that training has left (there is only one)."""
    (path,) = work_dir.glob('*_[0-9]*.pth')
    return path
