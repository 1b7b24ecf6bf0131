"""Testing a checkpoint: metrics, saved predictions, pictures."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mmcv
import numpy as np
from mmengine import fileio
from mmengine.config import Config
from mmengine.evaluator import BaseMetric
from mmengine.hooks import Hook
from mmengine.runner import Runner
from mmengine.structures import BaseDataElement
from PIL import Image

from swin_mm.engine.config_pickles import require_no_pickles
from swin_mm.engine.drawing import classes_and_palette, draw_comparison
from swin_mm.engine.images import WindowedImage, displayable, overview
from swin_mm.engine.runner import build_runner, configure_dataloaders
from swin_mm.engine.tiled_test import apply_tiles
from swin_mm.engine.tiles import resized_sample
from swin_mm.engine.training import run_errors
from swin_mm.engine.tta import apply_tta
from swin_mm.openmmlab.config import as_list, require_data, test_dataset
from swin_mm.openmmlab.loading import read_checkpoint
from swin_mm.utils.errors import InputError
from swin_mm.utils.files import atomic_write

LARGEST_PICTURE = 2048  # pixels a side, of the drawings of tiled images


def test(
    cfg: Config,
    checkpoint: str | None,
    *,
    out: str | None = None,
    show_dir: str | None = None,
    tta: bool = False,
    dtype: str = 'fp32',
    allow_pickle: bool = False,
    tile: int | None = None,
    overlap: float = 0.2,
) -> dict[str, float]:
    """Test a checkpoint on the config's test set.

    Args:
        cfg: the config; it is changed.
        checkpoint: file or address; it must give the whole model. None if the config's model has its weights already.
        out: where to save predictions: a ``.pkl`` file for a detector, a folder of PNGs for a segmentor.
        show_dir: folder for pictures of predictions beside the ground truth.
        tta: test-time augmentation.
        dtype: what the network computes in, see :func:`swin_mm.engine.inference.set_autocast`.
        allow_pickle: open pickles that the config names, which can run code.
        tile: predict on larger images by tiles of this many pixels a side, see
            :func:`swin_mm.engine.tiled_test.apply_tiles`.
        overlap: least share of a tile that it has in common with the next.

    Returns:
        The metrics.

    Raises:
        InputError: something in the config, the data or the folders is wrong.
        CheckpointError: the checkpoint cannot be read or does not fit.
    """
    cfg.load_from, cfg.resume = checkpoint, False
    for key in ('runner_type', 'strategy'):  # FSDP is for training; its checkpoints are ordinary ones
        cfg.pop(key, None)
    if not allow_pickle:
        require_no_pickles(cfg, 'test', 'model')
    require_data(cfg, 'test')
    if checkpoint is not None:
        read_checkpoint(checkpoint)
    if show_dir:
        draw_predictions(cfg, show_dir, tile)
    if tta:
        apply_tta(cfg)
    if tile is not None:
        apply_tiles(cfg, tile, overlap)
    if out:
        save_predictions(cfg, out)
    configure_dataloaders(cfg, 'test')
    hook = dict(type='swin_mm.engine.inference.InferenceHook', dtype=dtype)
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), hook]
    with run_errors(cfg):
        return build_runner(cfg).test()


def draw_predictions(cfg: Config, folder: str, tile: int | None = None) -> None:
    """Configure a test to draw every prediction beside its ground truth.

    Args:
        cfg: the config, changed in place.
        folder: where the pictures go, each under the name of its image; made if missing.
        tile: side of the tiles of larger images.

    Raises:
        InputError: the folder cannot be written to.
    """
    _require_folder('--show-dir', Path(folder))
    hook = dict(
        type='swin_mm.engine.testing.DrawingHook',
        folder=os.path.abspath(folder),
        root=_image_folder(cfg),
        backend_args=test_dataset(cfg).get('backend_args'),
        tile=tile,
    )
    cfg.custom_hooks = [*(cfg.get('custom_hooks') or []), hook]


def save_predictions(cfg: Config, out: str) -> None:
    """Configure a test to save its predictions.

    Args:
        cfg: the config, changed in place.
        out: for a detector a ``.pkl`` file, as mmdet's analysis tools read it; for a segmentor a folder of PNGs with
            the class number of each pixel, from 0, as ``tools/predict.py`` writes them.

    Raises:
        InputError: ``out`` is the wrong kind of output for the model, or cannot be written to.
    """
    path = Path(out)
    if cfg.default_scope == 'mmdet':
        if path.suffix not in ('.pkl', '.pickle') or path.is_dir():
            raise InputError(f'--out {out}: predictions of a detector go to one file, name it *.pkl')
        _require_folder('--out', path.parent)
        saver = dict(type='swin_mm.engine.detections.SaveDetections', out_file_path=os.path.abspath(out))
    else:
        if path.suffix in ('.pkl', '.pickle') or path.is_file():
            raise InputError(f'--out {out}: predictions of a segmentor are one PNG per image, name a folder')
        _require_folder('--out', path)
        saver = dict(type='swin_mm.engine.testing.SaveSegments', folder=os.path.abspath(out), root=_image_folder(cfg))
    cfg.test_evaluator = [*as_list(cfg.test_evaluator), saver]


def _require_folder(option: str, folder: Path) -> None:
    """Fail fast if a folder cannot be created or written to."""
    existing = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise InputError(f'{option}: {existing} is a file, expected a folder')
    if not os.access(existing, os.W_OK) or os.statvfs(existing).f_flag & os.ST_RDONLY:
        raise InputError(f'{option}: {existing} cannot be written to; choose another place')


def _image_folder(cfg: Config) -> str:
    """The folder of the test images."""
    dataset = test_dataset(cfg)
    prefix = dataset.get('data_prefix') or {}
    return os.path.join(dataset.get('data_root') or '', prefix.get('img_path') or prefix.get('img') or '')


def _name(image: str, root: str) -> Path:
    """The name of the output for an image: its path below ``root``, as PNG."""
    path = Path(os.path.relpath(image, root or '.'))
    return (Path(path.name) if '..' in path.parts else path).with_suffix('.png')


class SaveSegments(BaseMetric):
    """Saves a segmentor's predictions as PNGs of class numbers from 0, under the names of their images.

    mmseg's own adds 1 where the data set has ``reduce_zero_label``.

    Args:
        folder: the folder to write to.
        root: the folder of the images; images in subfolders keep their relative path.
        collect_device: see mmengine's BaseMetric.
    """

    def __init__(self, folder: str, root: str, collect_device: str = 'cpu') -> None:
        super().__init__(collect_device=collect_device)
        self.folder = folder
        self.root = root

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Write one file per image."""
        for sample in data_samples:
            labels = sample['pred_sem_seg']['data'].squeeze(0).cpu().numpy()
            wide = labels.max(initial=0) > 255
            with atomic_write(Path(self.folder, _name(sample['img_path'], self.root))) as part:
                Image.fromarray(labels.astype(np.uint16 if wide else np.uint8)).save(part)
            self.results.append(None)  # mmengine warns of a metric without results

    def compute_metrics(self, results: list) -> dict[str, float]:
        """There is no metric."""
        return {}


class DrawingHook(Hook):
    """Draws predictions beside the ground truth, each picture under the name of its image.

    mmdet's and mmseg's own hooks put a relative folder under the work_dir, number the pictures, and cover the objects.

    Args:
        folder: the folder to write to.
        root: the folder of the images; images in subfolders keep their relative path.
        backend_args: of mmengine's file reader, for the images.
        score_thr: detections of lower score are left out.
        tile: larger images are drawn with at most ``LARGEST_PICTURE`` pixels a side, and with boxes instead of masks.
    """

    def __init__(
        self,
        folder: str,
        root: str,
        backend_args: dict | None = None,
        score_thr: float = 0.3,
        tile: int | None = None,
    ) -> None:
        self.folder = folder
        self.root = root
        self.backend_args = backend_args
        self.score_thr = score_thr
        self.tile = tile

    def after_test_iter(self, runner: Runner, outputs: Sequence[BaseDataElement], **_: Any) -> None:
        """Draw a batch."""
        classes, palette = classes_and_palette(runner.visualizer.dataset_meta, {})
        for output in outputs:
            picture, sample = self._read(output.img_path), output.cpu()
            if self.tile is not None and max(sample.ori_shape) > self.tile:
                picture = overview(picture, LARGEST_PICTURE)
                scale = max(picture.shape[:2]) / max(sample.ori_shape)
                sample = resized_sample(sample, scale, with_masks=False)
            if 'pred_instances' in sample:
                objects = sample.pred_instances
                sample = sample.clone()  # metrics take the others, too
                sample.pred_instances = objects[objects.scores >= self.score_thr]
            drawn = draw_comparison(picture, sample, classes, palette)
            with atomic_write(Path(self.folder, _name(output.img_path, self.root))) as part:
                Image.fromarray(drawn).save(part)

    def _read(self, path: str) -> np.ndarray:
        """The picture in RGB, made smaller if it can be read by windows."""
        if self.tile is not None and self.backend_args is None:
            windows = WindowedImage.open(path, self.tile)
            if windows is not None:
                return displayable(overview(windows, LARGEST_PICTURE))
        return mmcv.imfrombytes(fileio.get(path, backend_args=self.backend_args), channel_order='rgb')
