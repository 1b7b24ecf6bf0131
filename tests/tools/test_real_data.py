"""The published configs on real images in the layouts of COCO and ADE20K: two iterations and a whole test run."""

import json
import os
from pathlib import Path

import pytest
from support.processes import run_forked

ROOT = Path(__file__).parents[2]
DETECTION = ROOT / 'configs/mask_rcnn/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py'
SEGMENTATION = ROOT / 'configs/upernet/upernet_swin-t-p4-w7_8xb2-160k_ade20k-512x512.py'
RANDOM_WEIGHTS = ['model.backbone.init_cfg=None', 'train_dataloader.num_workers=0']
RANDOM_WEIGHTS += ['train_dataloader.persistent_workers=False', 'randomness.seed=0']
RANDOM_WEIGHTS += ['default_hooks.checkpoint.save_optimizer=False']  # hundreds of megabytes

pytestmark = pytest.mark.skipif('SWIN_MM_DATA' not in os.environ, reason='SWIN_MM_DATA is not set')
# At the configs' own image sizes and with all validation images, this takes minutes on a CPU.
SIZES = pytest.mark.parametrize('small', [True, pytest.param(False, marks=pytest.mark.slow)], ids=['small', 'full'])


def link(folder: Path, target: str, name: str) -> None:
    """Link a data set to where the configs look for it."""
    place = folder / 'data' / name
    place.parent.mkdir(parents=True, exist_ok=True)
    place.symlink_to(Path(os.environ['SWIN_MM_DATA'], target))


def metrics(folder: Path) -> dict:
    return json.loads(next(folder.glob('test/*/*.json')).read_text())


@SIZES
def test_mask_rcnn_on_coco(tmp_path, small):
    link(tmp_path, 'coco_cc', 'coco')
    options = [*RANDOM_WEIGHTS, 'train_dataloader.dataset.indices=4', 'train_cfg.max_epochs=1']
    if small:
        options += [
            f'{part}_dataloader.dataset.pipeline.{at}.scale=(320,192)' for part, at in (('train', 2), ('val', 1))
        ]
        options += ['test_dataloader.dataset.pipeline.1.scale=(320,192)', 'test_dataloader.dataset.indices=6']
    # Loops validate after the last iteration whatever their interval; the test below runs on all images.
    options += ['val_dataloader.dataset.indices=2', 'default_hooks.logger.interval=1']
    log = run_forked('train', DETECTION, '--work-dir', 'run', '--cfg-options', *options, cwd=tmp_path, timeout=1800)
    assert 'Epoch(train) [1][2/2]' in log
    arguments = ['run/epoch_1.pth', '--work-dir', 'test', '--out', 'predictions.pkl', '--cfg-options', *options]
    run_forked('test', DETECTION, *arguments, cwd=tmp_path, timeout=1800)
    assert {'coco/bbox_mAP', 'coco/segm_mAP'} <= metrics(tmp_path).keys()
    assert (tmp_path / 'predictions.pkl').stat().st_size > 0


@SIZES
def test_upernet_on_ade20k_layout(tmp_path, small):
    link(tmp_path, 'coco_sem_cc', 'ade/ADEChallengeData2016')
    options = [
        *RANDOM_WEIGHTS,
        'train_cfg.max_iters=2',
        'val_dataloader.dataset.indices=2',
        'default_hooks.checkpoint.interval=2',
    ]
    if small:
        options += ['train_dataloader.dataset.pipeline.2.scale=(512,128)', 'model.data_preprocessor.size=(128,128)']
        options += ['train_dataloader.dataset.pipeline.3.crop_size=(128,128)']
        options += [f'{part}_dataloader.dataset.pipeline.1.scale=(512,128)' for part in ('val', 'test')]
        options += ['test_dataloader.dataset.indices=4']
    run_forked('train', SEGMENTATION, '--work-dir', 'run', '--cfg-options', *options, cwd=tmp_path, timeout=1800)
    arguments = ['run/iter_2.pth', '--work-dir', 'test', '--out', 'masks', '--cfg-options', *options]
    run_forked('test', SEGMENTATION, *arguments, cwd=tmp_path, timeout=1800)
    assert 0 <= metrics(tmp_path)['mIoU'] <= 100
    assert len(list((tmp_path / 'masks').glob('*.png'))) == (4 if small else 27)

    # The same model on images of ADE20K itself.
    other = tmp_path / 'ade'
    link(other, 'ade20k_samples', 'ade/ADEChallengeData2016')
    arguments = [tmp_path / 'run/iter_2.pth', *(a for a in arguments[1:] if 'indices' not in a)]
    run_forked('test', SEGMENTATION, *arguments, '--show-dir', 'pictures', cwd=other, timeout=1800)
    assert 0 <= metrics(other)['mIoU'] <= 100
    assert len(list((other / 'pictures').rglob('*.png'))) == 3
