"""Test a detector or a segmentor: python tools/test.py CONFIG CHECKPOINT."""

import sys
from argparse import Namespace
from pathlib import Path

from mmengine.config import Config

from swin_mm import cli
from swin_mm.checkpoints import read_checkpoint

DET_TTA = {'type': 'DetTTAModel', 'tta_cfg': {'nms': {'type': 'nms', 'iou_threshold': 0.5}, 'max_per_img': 100}}


def parse_args() -> Namespace:
    """Read the command line."""
    parser = cli.parser('Test a detector or a segmentor')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out', help='save predictions: detection to a .pkl file, segmentation as PNGs to a folder')
    parser.add_argument('--show-dir', help='draw predictions beside the ground truth into this folder')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    return parser.parse_args()


def main(args: Namespace) -> None:
    """Test."""
    cfg = cli.read_config(args)
    cfg.load_from, cfg.resume = args.checkpoint, False
    cli.check_data(cfg, 'test')
    cli.use_safe_reader()
    read_checkpoint(args.checkpoint)
    if args.show_dir:
        draw(cfg, args.show_dir)
    if args.tta:
        augment(cfg)
    if args.out:
        save_predictions(cfg, args.out)
    cli.build_runner(cfg).test()


def draw(cfg: Config, folder: str) -> None:
    """Turn on the drawing that the config has a hook for."""
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise cli.InputError(
            "--show-dir needs default_hooks.visualization in the config, such as dict(type='DetVisualizationHook')"
        )
    hook.draw = True
    # Both libraries put a relative folder under the work_dir; here it is what the user's shell means by it.
    folder = str(Path(folder).absolute())
    if cfg.default_scope == 'mmdet':
        hook.test_out_dir = folder
    else:
        cfg.visualizer.save_dir = folder


def save_predictions(cfg: Config, out: str) -> None:
    """Have the evaluator save what it is given, in the format of the task."""
    path = Path(out)
    if cfg.default_scope == 'mmdet':
        if path.suffix not in ('.pkl', '.pickle') or path.is_dir():
            raise cli.InputError(f'--out {out}: predictions of a detector go to one file, name it *.pkl')
        path.parent.mkdir(parents=True, exist_ok=True)
        cfg.test_evaluator = [*as_list(cfg.test_evaluator), dict(type='DumpDetResults', out_file_path=out)]
    else:
        if path.suffix in ('.pkl', '.pickle') or path.is_file():
            raise cli.InputError(f'--out {out}: predictions of a segmentor are one PNG per image, name a folder')
        as_list(cfg.test_evaluator)[0].output_dir = out


def augment(cfg: Config) -> None:
    """Wrap the model in its library's test-time augmentation: a flip, unless the config says otherwise."""
    if cfg.default_scope == 'mmdet':
        leave_out_masks(cfg)
        model, pack = DET_TTA, 'PackDetInputs'
    else:
        model, pack = {'type': 'SegTTAModel'}, 'PackSegInputs'
    dataset = cfg.test_dataloader.dataset
    while 'dataset' in dataset:
        dataset = dataset.dataset
    # Unflipped first: the merged prediction keeps the ground truth of the first view.
    flips = [dict(type='RandomFlip', prob=0.0), dict(type='RandomFlip', prob=1.0)]
    default = [*dataset.pipeline[:-1], dict(type='TestTimeAug', transforms=[flips, [dict(type=pack)]])]
    dataset.pipeline = cfg.get('tta_pipeline') or default
    cfg.model = dict(cfg.get('tta_model') or model, module=cfg.model)


def leave_out_masks(cfg: Config) -> None:
    """Test boxes alone: mmdet's test-time augmentation refuses predictions with masks."""
    if 'panoptic_head' in cfg.model:
        raise cli.InputError(f'--tta: mmdet merges boxes alone, and {cfg.model.type} predicts masks; leave --tta out')
    heads = cfg.model.get('roi_head') or {}
    if heads.get('mask_head') is None:
        return
    print('note: test-time augmentation of mmdet merges boxes only, masks are left out')
    heads.mask_head = heads.mask_roi_extractor = None
    for evaluator in as_list(cfg.test_evaluator):
        if 'segm' in evaluator.get('metric', ()):
            evaluator.metric = ['bbox']


def as_list(evaluators: dict | list) -> list:
    """A config may name one evaluator or several."""
    return evaluators if isinstance(evaluators, list) else [evaluators]


if __name__ == '__main__':
    sys.exit(cli.run(main, parse_args()))
