"""Train a detector or a segmentor: python tools/train.py CONFIG."""

import importlib.util
import sys
from argparse import Namespace

from mmengine.config import Config
from mmengine.device import get_device

from swin_mm import cli
from swin_mm.engine import preemption
from swin_mm.engine.runner import build_runner, use_safe_reader
from swin_mm.models.swin import ARCHS
from swin_mm.openmmlab.config import require_data, require_pretrained
from swin_mm.openmmlab.loading import read_checkpoint
from swin_mm.openmmlab.plug import plug
from swin_mm.utils.errors import InputError

VIS_BACKENDS = {'tensorboard': 'TensorboardVisBackend', 'wandb': 'WandbVisBackend'}


def parse_args() -> Namespace:
    """Read the command line."""
    parser = cli.parser('Train a detector or a segmentor')
    parser.add_argument('--amp', action='store_true', help='mixed precision (GPU only)')
    parser.add_argument('--auto-scale-lr', action='store_true', help='scale the learning rate to the batch size')
    parser.add_argument(
        '--vis',
        choices=sorted(VIS_BACKENDS),
        action='append',
        default=[],
        help='log to TensorBoard (in the work_dir) or Weights & Biases too',
    )
    parser.add_argument(
        '--resume',
        nargs='?',
        const='auto',
        metavar='CHECKPOINT',
        help='go on from a checkpoint, or without a value from the last one in the work_dir',
    )
    parser.add_argument(
        '--plug', choices=sorted(ARCHS), metavar='ARCH', help='train with a Swin of this size (t, s, b, l) as backbone'
    )
    return parser.parse_args()


def main(args: Namespace) -> None:
    """Train."""
    cfg = cli.read_config(args, lambda cfg: plug(cfg, args.plug) if args.plug else cfg)
    if args.amp:
        cfg.optim_wrapper.type = 'AmpOptimWrapper'
        cfg.optim_wrapper.setdefault('loss_scale', 'dynamic')
    if 'Amp' in str(cfg.optim_wrapper.get('type')) and get_device() == 'cpu':
        raise InputError(
            'mixed precision (--amp, AmpOptimWrapper) needs a GPU and torch sees none; leave out --amp or set '
            '--cfg-options optim_wrapper.type=OptimWrapper'
        )
    if args.auto_scale_lr:
        if 'base_batch_size' not in cfg.get('auto_scale_lr', {}):
            raise InputError(
                '--auto-scale-lr needs the batch size that the learning rate was chosen for: '
                'auto_scale_lr = dict(base_batch_size=16) in the config'
            )
        cfg.auto_scale_lr.enable = True
        # mmengine compares this with the batches of one iteration.
        cfg.auto_scale_lr.base_batch_size /= cfg.optim_wrapper.get('accumulative_counts', 1)
    for package in args.vis:
        log_to(cfg, package)
    require_data(cfg, 'train', *(['val'] if cfg.get('val_cfg') else []))
    use_safe_reader()
    set_start(cfg, args.resume)

    preemption.install()
    preemption.InterruptHook().train(build_runner(cfg))


def log_to(cfg: Config, package: str) -> None:
    """Add mmengine's writer for a package to the visualizer."""
    if importlib.util.find_spec(package) is None:
        raise InputError(f'--vis {package} needs the package {package}; install it with: pip install {package}')
    visualizer = cfg.setdefault('visualizer', dict(type='Visualizer', vis_backends=[dict(type='LocalVisBackend')]))
    visualizer.vis_backends = [*(visualizer.get('vis_backends') or []), dict(type=VIS_BACKENDS[package])]


def set_start(cfg: Config, resume: str | None) -> None:
    """Say in the config what training starts from, and read that now: an error after minutes of building is late."""
    if resume is None and cfg.get('resume') and not cfg.get('load_from'):
        resume = 'auto'
    if resume == 'auto':
        resume = preemption.last_checkpoint(cfg.work_dir)
        if resume is None:
            print(f'nothing to resume in {cfg.work_dir}: training starts anew')
    if resume is not None:
        cfg.resume, cfg.load_from = True, resume
    if not cfg.get('load_from'):
        require_pretrained(cfg)
        return

    checkpoint = read_checkpoint(cfg.load_from)
    if cfg.get('resume'):
        if lacking := {'meta', 'message_hub', 'state_dict', 'optimizer'} - checkpoint.keys():
            raise InputError(
                f'{cfg.load_from} is no checkpoint of a training run (it has no {", ".join(sorted(lacking))}); to '
                'start from its weights use --cfg-options load_from=CHECKPOINT instead of --resume'
            )
        # The samplers take their seed when they are built, before mmengine restores that of the interrupted run.
        cfg.randomness = {'seed': checkpoint['meta'].get('seed')} | cfg.get('randomness', {})


if __name__ == '__main__':
    sys.exit(cli.run(main, parse_args()))
