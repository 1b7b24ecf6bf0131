"""Tiled testing of large images in mmengine's test loop, with the metrics of mmdet and mmseg."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from mmengine.config import Config
from mmengine.dataset import Compose, pseudo_collate
from mmengine.registry import FUNCTIONS
from mmengine.runner import TestLoop, autocast
from mmengine.structures import BaseDataElement
from PIL import Image

from swin_mm.engine.images import loads_annotations, pipeline_reader, without_annotations
from swin_mm.engine.tiles import encode_mask, is_larger, predict_tiles, require_tile
from swin_mm.openmmlab.config import as_list, iter_dicts, test_dataset, type_name
from swin_mm.utils.errors import InputError

HERE = 'swin_mm.engine.tiled_test'
COUNTED = 100  # objects of an image, in COCO's mAP over all thresholds


def apply_tiles(cfg: Config, tile: int, overlap: float) -> None:
    """Configure a test to predict on larger images by tiles, and to compare the merged predictions.

    Images no larger than a tile are tested as without this.

    Args:
        cfg: the config, changed in place; after :func:`swin_mm.engine.tta.apply_tta`.
        tile: side of the tiles, in pixels.
        overlap: least share of a tile that it has in common with the next.

    Raises:
        InputError: the tiles, or something in the config, do not suit.
    """
    require_tile(tile, overlap)
    loop = cfg.get('test_cfg') or {}
    if type_name(loop) not in ('TestLoop', 'None'):
        raise InputError(f'--tile: test_cfg.type is {type_name(loop)}, expected TestLoop')
    evaluators = [dict(evaluator) for evaluator in as_list(cfg.test_evaluator)]
    for evaluator in evaluators:
        if 'Panoptic' in type_name(evaluator):
            raise InputError('--tile: panoptic segments cannot be merged across tiles; test on whole images')
        if type_name(evaluator) == 'CityScapesMetric':
            raise InputError('--tile: CityScapesMetric takes masks of whole images only; use CocoMetric')
        if type_name(evaluator) == 'IoUMetric':
            evaluator['type'] = 'swin_mm.engine.segments.LargeImageIoU'
    dataset = test_dataset(cfg)
    steps = dataset.pipeline
    if not type_name(steps[0]).endswith('LoadImageFromFile'):
        raise InputError(f'--tile: the test pipeline starts with {type_name(steps[0])}, expected LoadImageFromFile')
    cfg.test_evaluator = evaluators
    cfg.test_cfg = dict(
        type=f'{HERE}.TiledTestLoop',
        **{key: value for key, value in loop.items() if key == 'fp16'},
        tile=tile,
        overlap=overlap,
        pipeline=without_annotations(steps[1:]),
    )
    dataset.pipeline = [dict(type=f'{HERE}.LoadUntiled', pipeline=steps, tile=tile)]
    loader = cfg.test_dataloader
    loader.collate_fn = dict(type=f'{HERE}.collate', collate=loader.get('collate_fn', dict(type='pseudo_collate')))


class LoadUntiled:
    """Runs a test pipeline, but on images larger than a tile reads no more than the image and its ground truth.

    The ground truth is not resized, and masks of instances are left out: metrics read them from the annotation file.

    Args:
        pipeline: the test pipeline; loading the image is its first step.
        tile: side of the tiles, in pixels.
    """

    def __init__(self, pipeline: list[dict], tile: int) -> None:
        self.tile = tile
        self.read = pipeline_reader(pipeline, windows_above=tile)
        self.whole = Compose(pipeline)
        annotations = [dict(node) for node in iter_dicts(pipeline) if loads_annotations(node)]
        for step in annotations:
            if 'with_mask' in step:
                step['with_mask'] = False
        pack = next(node for node in iter_dicts(pipeline) if type_name(node).startswith('Pack'))
        self.ground_truth = Compose([*annotations, pack])

    def __call__(self, results: dict[str, Any]) -> dict[str, Any] | None:
        """What the test pipeline gives, or for large images ``image`` and the ground truth in ``data_samples``."""
        if self._is_small(results['img_path']):
            return self.whole(results)
        image = self.read(results['img_path'])
        if not is_larger(image, self.tile):
            return self.whole(results)
        results['img_shape'] = results['ori_shape'] = image.shape[:2]
        results['scale_factor'] = (1.0, 1.0)
        return {'image': image, **self.ground_truth(results)}

    def _is_small(self, path: str) -> bool:
        """Whether an image is no larger than a tile, if the header alone can tell."""
        try:
            with warnings.catch_warnings():
                warnings.simplefilter('ignore')  # warns of large images
                with Image.open(path) as image:
                    return max(image.size) <= self.tile
        except (OSError, Image.DecompressionBombError):
            return False


def collate(samples: Sequence[dict], collate: dict[str, Any]) -> dict[str, Any]:
    """Separate samples of large images, with their places in the batch, from those that form an ordinary batch.

    Args:
        samples: of a dataset with :class:`LoadUntiled`.
        collate: the collate function for an ordinary batch, ``dict(type=...)`` with its arguments.
    """
    options = dict(collate)
    kind = options.pop('type')
    function = FUNCTIONS.get(kind) if isinstance(kind, str) else kind
    whole = [sample for sample in samples if 'image' not in sample]
    tiled = [(i, s['image'], s['data_samples']) for i, s in enumerate(samples) if 'image' in s]
    return {'whole': function(whole, **options) if whole else None, 'tiled': tiled}


class TiledTestLoop(TestLoop):
    """A test loop that predicts on large images by tiles.

    Args:
        tile: side of the tiles, in pixels.
        overlap: least share of a tile that it has in common with the next.
        pipeline: the test pipeline for a tile, without the step that reads it.
        kwargs: of mmengine's TestLoop.
    """

    def __init__(self, *args: Any, tile: int, overlap: float, pipeline: list[dict], **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.tile, self.overlap = tile, overlap
        self.pipeline = Compose(pipeline)
        self.warned = False

    @torch.no_grad()
    def run_iter(self, idx: int, data_batch: dict[str, Any]) -> None:
        """Predict on a batch of :func:`collate` and pass the results on to the metrics."""
        whole, tiled = data_batch['whole'], data_batch['tiled']
        if not tiled:
            super().run_iter(idx, whole)
            return
        self.runner.call_hook('before_test_iter', batch_idx=idx, data_batch=data_batch)
        with autocast(enabled=self.fp16):
            outputs = list(self.runner.model.test_step(whole)) if whole else []
            for place, image, sample in tiled:
                outputs.insert(place, self._predict(image, sample))
        self.evaluator.process(data_samples=outputs, data_batch=data_batch)
        self.runner.call_hook('after_test_iter', batch_idx=idx, data_batch=data_batch, outputs=outputs)

    def _predict(self, image: Any, sample: BaseDataElement) -> BaseDataElement:
        def predict(images: list) -> Sequence[BaseDataElement]:
            size = images[0].shape[:2]
            known = dict(img_id=0, img_path=sample.get('img_path'), img_shape=size, ori_shape=size)
            return self.runner.model.test_step(pseudo_collate([self.pipeline({'img': x, **known}) for x in images]))

        classes = len(self.dataloader.dataset.metainfo['classes'])
        found = predict_tiles(image, predict, self.tile, self.overlap, self.dataloader.batch_size or 1, classes)
        for key, value in found.items():
            if 'masks' in value:  # as mmdet's metrics take them
                value.masks = [encode_mask(mask, image.shape[:2]) for mask in value.masks]
            setattr(sample, key, value)
            if key == 'pred_instances':
                self._warn_of_many(len(value), sample.get('img_path'))
        return sample

    def _warn_of_many(self, count: int, path: str) -> None:
        """Say once that COCO's mAP leaves out objects."""
        if count > COUNTED and not self.warned:
            self.warned = True
            self.runner.logger.warning(
                f"{path} has {count} predicted objects. COCO's mAP counts the best {COUNTED} of an image whatever "
                'proposal_nums is; mAP_50, mAP_75 and those by size count as many as the last of proposal_nums'
            )
