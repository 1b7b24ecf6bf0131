"""Test a detector or a segmentor: python tools/test.py CONFIG CHECKPOINT."""

import sys
from argparse import Namespace
from pathlib import Path

from mmengine.config import Config
from mmengine.model import is_model_wrapper

from swin_mm import cli
from swin_mm.analysis.prediction import DTYPES, set_autocast
from swin_mm.checkpoints import read_checkpoint
from swin_mm.engine.runner import build_runner, use_safe_reader
from swin_mm.engine.tta import apply_tta
from swin_mm.openmmlab.config import as_list, require_data
from swin_mm.utils.errors import InputError


def parse_args() -> Namespace:
    """Read the command line."""
    parser = cli.parser('Test a detector or a segmentor')
    parser.add_argument('checkpoint', help='checkpoint file')
    parser.add_argument('--out', help='save predictions: detection to a .pkl file, segmentation as PNGs to a folder')
    parser.add_argument('--show-dir', help='draw predictions beside the ground truth into this folder')
    parser.add_argument('--tta', action='store_true', help='test-time augmentation')
    parser.add_argument('--dtype', choices=DTYPES, default='fp32', help='bf16 and fp16: autocast (default: fp32)')
    return parser.parse_args()


def main(args: Namespace) -> None:
    """Test."""
    cfg = cli.read_config(args)
    cfg.load_from, cfg.resume = args.checkpoint, False
    require_data(cfg, 'test')
    use_safe_reader()
    read_checkpoint(args.checkpoint)
    if args.show_dir:
        draw(cfg, args.show_dir)
    if args.tta:
        apply_tta(cfg)
    if args.out:
        save_predictions(cfg, args.out)
    runner = build_runner(cfg)
    model = runner.model.module if is_model_wrapper(runner.model) else runner.model
    set_autocast(args.dtype, model.module if args.tta else model)
    runner.test()


def draw(cfg: Config, folder: str) -> None:
    """Turn on the drawing that the config has a hook for."""
    hook = cfg.get('default_hooks', {}).get('visualization')
    if hook is None:
        raise InputError(
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
            raise InputError(f'--out {out}: predictions of a detector go to one file, name it *.pkl')
        path.parent.mkdir(parents=True, exist_ok=True)
        cfg.test_evaluator = [*as_list(cfg.test_evaluator), dict(type='DumpDetResults', out_file_path=out)]
    else:
        if path.suffix in ('.pkl', '.pickle') or path.is_file():
            raise InputError(f'--out {out}: predictions of a segmentor are one PNG per image, name a folder')
        as_list(cfg.test_evaluator)[0].output_dir = out


if __name__ == '__main__':
    sys.exit(cli.run(main, parse_args()))
