"""Draw and save what a detector or a segmentor sees in images and videos.

  python tools/predict.py CONFIG CHECKPOINT photos clip.mp4 'more/**/*.png' --out seen

writes overlays with a legend to seen/vis/, classes and colours to seen/classes.json, and predictions to seen/pred/:
for detection JSON (labels, scores, boxes as x1, y1, x2, y2 in pixels, masks as COCO's run lengths), for semantic
segmentation a PNG of class numbers (its palette shows them in colours), for panoptic segmentation a PNG and JSON as
COCO has them. A video becomes a video in vis/ and a folder with a file per frame in pred/. What cannot be decoded is
named and skipped, and the exit code is 1.
"""

import glob
import json
import os
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Iterable, Iterator
from itertools import groupby
from pathlib import Path

import cv2
import numpy as np
import torch
from mmcv import VideoReader
from mmengine.device import get_device
from PIL import Image, ImageOps
from rich.progress import Progress

from swin_mm import cli
from swin_mm.analysis.prediction import DTYPES, Predictor, View
from swin_mm.utils.errors import InputError
from swin_mm.utils.files import atomic_write

IMAGES = ('.bmp', '.jpeg', '.jpg', '.pgm', '.png', '.ppm', '.tif', '.tiff', '.webp')
VIDEOS = ('.avi', '.m4v', '.mkv', '.mov', '.mp4', '.mpeg', '.mpg', '.webm', '.wmv')


def parse_args() -> Namespace:
    """Read the command line."""
    parser = cli.parser(__doc__, runner=False, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('inputs', nargs='+', help='images, videos, folders of these, quoted globs (** for any folders)')
    parser.add_argument('--out', type=Path, required=True, metavar='DIR', help='folder to write to')
    parser.add_argument('--batch-size', type=int, default=1, help='images at a time (default: 1)')
    parser.add_argument('--device', default=get_device(), help='default: %(default)s')
    parser.add_argument('--dtype', choices=DTYPES, default='fp32', help='bf16 and fp16: autocast (default: fp32)')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation, as tools/test.py does it')
    parser.add_argument('--score-thr', type=float, default=0.3, help='leave out objects below this (default: 0.3)')
    return parser.parse_args()


def main(args: Namespace) -> None:
    """Predict."""
    cfg = cli.read_config(args)
    if args.batch_size < 1:
        raise InputError(f'--batch-size {args.batch_size}: at least 1 is needed')
    try:
        torch.empty(0, device=args.device)
    except Exception as error:
        raise InputError(f'--device {args.device} is of no use here: {str(error).splitlines()[0]}') from error
    names = name_outputs(find(args.inputs))
    predictor = Predictor(cfg, args.checkpoint, args.device, args.dtype, args.tta, args.score_thr)
    with atomic_write(args.out / 'classes.json') as file:
        rows = zip(predictor.classes, predictor.palette, strict=True)
        file.write_text(json.dumps([{'id': i, 'name': name, 'color': rgb} for i, (name, rgb) in enumerate(rows)]))

    skipped = []
    with Progress() as progress:
        task = progress.add_task('images and frames', total=sum(map(count, names)))

        def skip(path: str, why: object) -> None:
            skipped.append(path)
            progress.console.print(f'skipped {path}: {why}', style='red', markup=False, highlight=False, soft_wrap=True)
            progress.advance(task, count(path))

        def read(paths: Iterable[str]) -> Iterator[View]:
            for path in paths:
                try:
                    with Image.open(path) as image:
                        picture = np.array(ImageOps.exif_transpose(image).convert('RGB'))
                    yield predictor.view(names[path], picture, path)
                except Exception as error:  # decoders raise many kinds
                    skip(path, error)

        def predict(views: Iterable[View]) -> Iterator[tuple[str, np.ndarray]]:
            for view, sample in predictor.predict(views, args.batch_size):
                predictor.save(view, sample, args.out / 'pred')
                yield view.name, predictor.draw(view, sample)
                progress.advance(task)

        for video, paths in groupby(names, is_video):
            if not video:
                for name, drawn in predict(read(paths)):
                    with atomic_write(args.out / f'vis/{name}.jpg') as file:
                        Image.fromarray(drawn).save(file, quality=95, subsampling=0)
                continue
            for path in paths:
                frames = VideoReader(path)
                views = (predictor.view(f'{names[path]}/{i:06}', f[..., ::-1]) for i, f in enumerate(frames))
                try:
                    write_video(args.out / f'vis/{names[path]}.mp4', frames.fps, (drawn for _, drawn in predict(views)))
                except EOFError as error:
                    skip(path, error)
    if skipped:
        sys.exit(f'{len(skipped)} of {len(names)} inputs skipped, named above')


def find(inputs: Iterable[str]) -> list[str]:
    """Every image and video that the command line means, in its order."""
    paths = []
    for entry in inputs:
        if os.path.isfile(entry):
            paths.append(entry)
            continue
        inside = glob.glob(os.path.join(glob.escape(entry), '*') if os.path.isdir(entry) else entry, recursive=True)
        found = sorted(path for path in inside if path.lower().endswith((*IMAGES, *VIDEOS)))
        if not found:
            raise InputError(f'{entry}: no image or video is there (looked for {" ".join((*IMAGES, *VIDEOS))})')
        paths += found
    return list(dict.fromkeys(paths))


def name_outputs(paths: list[str]) -> dict[str, str]:
    """A name for each path, below the folder that all share; without suffix unless two would be called the same."""
    top = os.path.commonpath([os.path.dirname(os.path.abspath(path)) for path in paths])
    names = {path: os.path.relpath(os.path.abspath(path), top) for path in paths}
    stems = Counter(os.path.splitext(name)[0] for name in names.values())
    return {path: stem if stems[stem := os.path.splitext(name)[0]] == 1 else name for path, name in names.items()}


def is_video(path: str) -> bool:
    """By its suffix."""
    return path.lower().endswith(VIDEOS)


def count(path: str) -> int:
    """How many pictures there are in a file."""
    return max(len(VideoReader(path)), 1) if is_video(path) else 1


def write_video(path: Path, fps: float, pictures: Iterable[np.ndarray]) -> None:
    """Write RGB pictures of one even size as an MP4 file.

    Raises:
        EOFError: there are none.
    """
    with atomic_write(path) as file:
        writer = None
        for picture in pictures:
            writer = writer or cv2.VideoWriter(
                str(file), cv2.VideoWriter_fourcc(*'mp4v'), fps or 25, picture.shape[1::-1]
            )
            writer.write(picture[..., ::-1])
        if writer is None:
            raise EOFError('no frame can be read')
        writer.release()


if __name__ == '__main__':
    sys.exit(cli.run(main, parse_args()))
