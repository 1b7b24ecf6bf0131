"""Train a detector or a segmentor: python tools/train.py CONFIG."""

import sys
from argparse import Namespace

from swin_mm import cli
from swin_mm.engine import training
from swin_mm.models.swin import ARCHS
from swin_mm.openmmlab.plug import plug

EXAMPLES = """
examples:
  train Mask R-CNN on COCO, with the data where the config says:
    python tools/train.py configs/mask_rcnn/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py
  the same on one GPU with 4 images per step, in mixed precision:
    python tools/train.py CONFIG --amp-dtype bf16 --auto-scale-lr --cfg-options train_dataloader.batch_size=4
  continue after Ctrl-C, a full disk or a lost machine:
    python tools/train.py CONFIG --resume
  8 GPUs: tools/dist_train.sh CONFIG 8

Ctrl-C, SIGTERM and SIGHUP save a checkpoint first; the same again stops at once.
"""


def parse_args() -> Namespace:
    """Read the command line."""
    parser = cli.parser('Train a detector or a segmentor', epilog=EXAMPLES)
    parser.add_argument('--amp', action='store_true', help='mixed precision, GPU only')
    parser.add_argument(
        '--amp-dtype',
        choices=sorted(training.AMP_DTYPES),
        help='mixed precision in this type (implies --amp): bf16 needs no loss scaling, fp16 runs on older GPUs too',
    )
    parser.add_argument(
        '--auto-scale-lr', action='store_true', help='scale the learning rate to the batch size of all GPUs together'
    )
    parser.add_argument(
        '--vis',
        choices=sorted(training.VIS_BACKENDS),
        action='append',
        default=[],
        help='log to TensorBoard or MLflow (in the work_dir) or Weights & Biases too; may be repeated',
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='continue from a checkpoint, without a value from the last one in the work_dir',
    )
    parser.add_argument(
        '--plug', choices=sorted(ARCHS), metavar='ARCH', help='train with a Swin of this size (t, s, b, l) as backbone'
    )
    return parser.parse_args()


def main(args: Namespace) -> None:
    """Train."""
    cfg = cli.read_config(args, lambda cfg: plug(cfg, args.plug) if args.plug else cfg)
    if args.amp or args.amp_dtype:
        training.use_amp(cfg, args.amp_dtype)
    if args.auto_scale_lr:
        training.scale_learning_rate(cfg)
    for package in args.vis:
        training.log_to(cfg, package)
    training.train(cfg, resume=args.resume, allow_pickle=args.allow_pickle)


if __name__ == '__main__':
    sys.exit(cli.run(main, parse_args()))
