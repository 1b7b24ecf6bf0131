"""Compose the demo's scenes: handwritten digits on photographs, with instance and semantic masks of the same scenes."""

import json
import shutil
import sys
import tempfile
from argparse import ArgumentDefaultsHelpFormatter, ArgumentParser, Namespace
from pathlib import Path

import cv2
import numpy as np
from pycocotools import mask as rle
from rich.progress import track
from sklearn.datasets import load_digits, load_sample_images

from swin_mm import cli
from swin_mm.utils.errors import InputError

CLASSES = tuple('0123456789')  # of instances; the semantic ones are the two photographs and DIGIT
DIGIT = 3
# split: (its folder, the ADE20K layout's name for it, part of each photograph's width, part of each digit's writers)
SPLITS = {
    'train': ('train', 'training', (0.0, 0.6), (0.0, 0.75)),
    'val': ('val', 'validation', (0.6, 1.0), (0.75, 1.0)),
}


def parse_args() -> Namespace:
    """Read the command line."""
    parser = ArgumentParser(
        description=__doc__,
        formatter_class=ArgumentDefaultsHelpFormatter,
        epilog='Writes OUT/{train,val}/*.jpg with OUT/annotations/instances_{train,val}.json (COCO), and the same '
        'images as OUT/images/{training,validation} with masks in OUT/annotations/{training,validation} (ADE20K '
        'layout: 0 unlabelled, 1 temple, 2 flower, 3 digit). No digit and no part of a photograph is in both splits.',
    )
    parser.add_argument('out', type=Path, help='folder to make')
    parser.add_argument('--train', type=int, default=640, help='number of training scenes')
    parser.add_argument('--val', type=int, default=80, help='number of validation scenes')
    parser.add_argument('--size', type=int, default=256, help='side of a scene in pixels')
    parser.add_argument('--seed', type=int, default=0, help='another seed gives other scenes')
    parser.add_argument('--force', action='store_true', help='replace the folder if it exists')
    parser.add_argument('--debug', action='store_true', help='show where an error arose')
    return parser.parse_args()


def main(args: Namespace) -> None:
    """Write the data set, whole or not at all."""
    if args.out.exists() and not args.force:
        raise InputError(f'{args.out} exists; choose another folder, or replace it with --force')
    if args.size < 96 or args.train < 1 or args.val < 1:
        raise InputError('a data set needs scenes of at least 96 pixels (--size) and one in each of --train and --val')
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=args.out.parent, prefix=f'.{args.out.name}.') as temporary:
        folder = Path(temporary, 'data')
        for index, split in enumerate(SPLITS):
            write_split(folder, split, getattr(args, split), args.size, np.random.default_rng([args.seed, index]))
        if args.out.exists():
            shutil.rmtree(args.out)
        folder.rename(args.out)
    print(f'{args.train} + {args.val} scenes in {args.out}')


def write_split(folder: Path, split: str, scenes: int, size: int, random: np.random.Generator) -> None:
    """Write one split in both layouts."""
    name, ade_name, width, writers = SPLITS[split]
    photos = [crop_width(photo, width) for photo in load_sample_images().images]
    digits = load_digits()
    first, last = (int(len(digits.images) * part) for part in writers)
    samples = list(zip(digits.images[first:last], digits.target[first:last], strict=True))
    places = [folder / name, folder / 'images' / ade_name, folder / 'annotations' / ade_name]
    for place in places:
        place.mkdir(parents=True)
    images, annotations = [], []
    for number in track(range(1, scenes + 1), f'{split} scenes', disable=not sys.stdout.isatty()):
        photo = int(random.integers(len(photos)))
        image, objects = compose(photos[photo], samples, size, random)
        cv2.imwrite(str(places[0] / f'{number:05}.jpg'), image)
        shutil.copyfile(places[0] / f'{number:05}.jpg', places[1] / f'{number:05}.jpg')
        semantic = np.full((size, size), photo + 1, np.uint8)
        for digit, mask in objects:
            semantic[mask] = DIGIT
            code = rle.encode(np.asfortranarray(mask, np.uint8))
            annotations.append(
                {
                    'id': len(annotations) + 1,
                    'image_id': number,
                    'category_id': int(digit) + 1,
                    'bbox': rle.toBbox(code).tolist(),
                    'area': int(rle.area(code)),
                    'iscrowd': 0,
                    'segmentation': {'size': code['size'], 'counts': code['counts'].decode()},
                }
            )
        cv2.imwrite(str(places[2] / f'{number:05}.png'), semantic)
        images.append({'id': number, 'file_name': f'{number:05}.jpg', 'height': size, 'width': size})
    categories = [{'id': i + 1, 'name': name} for i, name in enumerate(CLASSES)]
    content = {'images': images, 'annotations': annotations, 'categories': categories}
    (folder / 'annotations' / f'instances_{split}.json').write_text(json.dumps(content))


def crop_width(photo: np.ndarray, part: tuple[float, float]) -> np.ndarray:
    """The columns of a photograph from one fraction of its width to another."""
    left, right = (int(photo.shape[1] * p) for p in part)
    return photo[:, left:right, ::-1]  # RGB -> BGR


def compose(
    photo: np.ndarray, samples: list[tuple[np.ndarray, int]], size: int, random: np.random.Generator
) -> tuple[np.ndarray, list[tuple[int, np.ndarray]]]:
    """A part of a photograph with one to four digits that may hide parts of each other.

    Returns:
        The image (size, size, 3), and for each digit its value and the mask (size, size) of what is seen of it.
    """
    side = random.integers(96, min(photo.shape[:2]) + 1)
    top, left = (random.integers(length - side + 1) for length in photo.shape[:2])
    image = cv2.resize(photo[top : top + side, left : left + side], (size, size), interpolation=cv2.INTER_AREA)
    image = image * random.uniform(0.3, 0.7)
    objects: list[tuple[int, np.ndarray]] = []
    for _ in range(random.integers(1, 5)):
        strokes, digit = samples[random.integers(len(samples))]
        side = int(random.uniform(0.3, 0.5) * size)
        ink = cv2.resize(strokes / 16, (side, side), interpolation=cv2.INTER_CUBIC)
        top, left = random.integers(size - side + 1, size=2)
        mask = np.zeros((size, size), bool)
        mask[top : top + side, left : left + side] = ink > 0.35
        # Nothing may be hidden so far that a person could not name it.
        if any((seen & mask).sum() > 0.2 * seen.sum() for _, seen in objects):
            continue
        colour = random.uniform(170, 255, size=3) + random.normal(0, 8, size=(size, size, 1))
        image = np.where(mask[..., None], colour, image)
        objects = [(other, seen & ~mask) for other, seen in objects] + [(int(digit), mask)]
    return np.clip(image, 0, 255).astype(np.uint8), objects


if __name__ == '__main__':
    arguments = parse_args()
    sys.exit(cli.run(main, arguments))
