"""Draw and save what a detector or a segmentor predicts on images and videos.

  python tools/predict.py CONFIG CHECKPOINT photos clip.mp4 'more/**/*.png' --out seen
  python tools/predict.py model.onnx photos --out seen

writes pictures with contours and a legend to seen/vis/, classes and colours to seen/classes.json, and predictions to
seen/pred/: for detection JSON (labels, scores, boxes as x1, y1, x2, y2 in pixels, masks as COCO's run lengths), for
semantic segmentation a PNG of class ids (its palette shows them in colours), for panoptic segmentation a PNG and JSON
as COCO has them. Labels are class ids, the numbers in classes.json from 0 up, whatever numbers the annotations use. A
video becomes a video in vis/ and a folder with a file per frame in pred/. What cannot be decoded is named and skipped,
and the exit code is 1.

Images are read by the LoadImageFromFile step of the test pipeline: color_type='unchanged' there keeps 16 bits and more
than three channels. --tile predicts on large images part by part and merges the results. A file that tools/export.py
wrote (.onnx, or .xml of OpenVINO) needs no config: classes, colours and preprocessing are in it.
"""

import os
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from pathlib import Path

import torch
from mmengine.device import get_device
from rich.progress import Progress

from swin_mm import cli
from swin_mm.analysis.prediction import Predictor, count_pictures, find_inputs, name_outputs, predict_files
from swin_mm.analysis.runtime import config_of, is_exported
from swin_mm.engine.inference import DTYPES
from swin_mm.utils.errors import InputError


def parse_args() -> Namespace:
    """Read the command line."""
    parser = cli.parser(__doc__, runner=False, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('checkpoint', help='checkpoint file; left out if the config is an exported file')
    parser.add_argument('inputs', nargs='*', help='images, videos, folders of these, quoted globs (** for any folders)')
    parser.add_argument('--out', type=Path, required=True, metavar='DIR', help='folder to write to')
    parser.add_argument('--batch-size', type=int, default=1, help='images at a time (default: 1)')
    parser.add_argument('--device', default=get_device(), help='default: %(default)s')
    parser.add_argument('--dtype', choices=DTYPES, default='fp32', help='bf16 and fp16: autocast (default: fp32)')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation, as tools/test.py does it')
    parser.add_argument('--score-thr', type=float, default=0.3, help='leave out objects below this (default: 0.3)')
    parser.add_argument('--tile', type=int, metavar='N', help='predict on larger images by tiles of N x N pixels')
    parser.add_argument(
        '--overlap', type=float, default=0.2, metavar='SHARE', help='of a tile with the next (default: 0.2)'
    )
    cli.add_runtime(parser)
    args = parser.parse_intermixed_args()  # inputs may stand behind options
    if is_exported(args.config):
        args.checkpoint, args.inputs = None, [args.checkpoint, *args.inputs]
    if not args.inputs:
        parser.error('the following arguments are required: inputs')
    return args


def main(args: Namespace) -> None:
    """Predict."""
    if args.checkpoint is None:
        if args.tta or args.cfg_options:
            raise InputError(f'--tta and --cfg-options: {args.config} is an exported file, which they cannot change')
        cfg = config_of(args.config, args.runtime, args.dtype)
        args.device, args.dtype = 'cpu', 'fp32'
    elif args.runtime:
        raise InputError(f'--runtime {args.runtime}: {args.config} is not an exported file')
    else:
        cfg = cli.read_config(args)
    if args.batch_size < 1:
        raise InputError(f'--batch-size {args.batch_size}: expected at least 1')
    try:
        torch.empty(0, device=args.device)
    except Exception as error:
        raise InputError(f'--device {args.device} cannot be used here: {str(error).splitlines()[0]}') from error
    names = name_outputs(find_inputs(args.inputs))
    predictor = Predictor(
        cfg, args.checkpoint, args.device, args.dtype, args.tta, args.score_thr, args.tile, args.overlap
    )
    skipped = []
    with Progress() as progress:
        task = progress.add_task('images and frames', total=sum(map(count_pictures, names)))

        def skip(path: str, reason: str) -> None:
            skipped.append(path)
            line = os.fsencode(f'skipped {path}: {reason}').decode(errors='replace')
            progress.console.print(line, style='red', markup=False, highlight=False, soft_wrap=True)
            progress.advance(task, count_pictures(path))

        predict_files(predictor, names, args.out, args.batch_size, lambda n: progress.advance(task, n), skip)
    if skipped:
        sys.exit(f'{len(skipped)} of {len(names)} inputs skipped, named above')


if __name__ == '__main__':
    sys.exit(cli.run(main, parse_args()))
