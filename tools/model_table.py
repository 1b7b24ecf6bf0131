"""Parameters and multiply-adds of whole models: python tools/model_table.py CONFIG [CONFIG ...]."""

import copy
import sys
from argparse import ArgumentParser, Namespace
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

import swin_mm  # noqa: F401 (registers the backbones)

BOXES, MASKS = 1000, 100  # what the second stage of a detector is counted with


def parse_args() -> Namespace:
    """Read the command line."""
    parser = ArgumentParser(description='Print a table of parameters and multiply-adds')
    parser.add_argument('configs', nargs='+', help='config files')
    parser.add_argument('--size', help='width x height of the image, such as 512x512 (default: the usual one)')
    return parser.parse_args()


def main(args: Namespace) -> None:
    """Print the table in Markdown."""
    print('| config | parameters | GMAC | image |\n| --- | --- | --- | --- |')
    for path in args.configs:
        config = Config.fromfile(path)
        width, height = map(int, args.size.split('x')) if args.size else usual_size(config)
        model = build(config)
        parameters = sum(p.numel() for p in model.parameters())
        print(f'| {Path(path).stem} | {parameters:,} | {count(config, width, height):.2f} | {width} × {height} |')


def usual_size(config: Config) -> tuple[int, int]:
    """Width and height that multiply-adds are usually given for: 1280 × 800, or what a segmentor is tested with."""
    if config.default_scope == 'mmdet':
        return 1280, 800
    return next(step['scale'] for step in config.test_pipeline if step['type'] == 'Resize')


def build(config: Config, device: str = 'meta') -> nn.Module:
    """The model of a config. On the device meta it has shapes but no numbers, and is there at once."""
    init_default_scope(config.default_scope)
    with torch.device(device):
        return MODELS.build(copy.deepcopy(config.model)).eval()  # some models change their config


def count(config: Config, width: int, height: int) -> float:
    """10^9 multiply-adds for one image.

    Convolutions, linear layers and matrix products count, those of attention on padded tokens too; norms, activations,
    interpolation, and choosing and cutting out boxes do not.
    """
    model = build(config)
    try:
        return _count(lambda: run(model, torch.empty(1, 3, height, width, device='meta')))
    except (NotImplementedError, RuntimeError):  # it looks at numbers on the way, but not in the backbone
        maps = []
        backbone = _count(lambda: maps.extend(model.backbone(torch.empty(1, 3, height, width, device='meta'))))
        model = build(config, 'cpu')
        model.backbone.forward = lambda image: tuple(torch.zeros(m.shape) for m in maps)
        return backbone + _count(lambda: run(model, torch.zeros(1, 3, height, width)))


def _count(work: Callable[[], None]) -> float:
    # The counter knows PyTorch's operators only, and not its fused attention for inference.
    torch.backends.mha.set_fastpath_enabled(False)
    with (
        mock.patch('mmcv.ops.DeformConv2d.forward', _plain_convolution),
        torch.no_grad(),
        FlopCounterMode(display=False) as counter,
    ):
        work()
    return counter.get_total_flops() / 2e9


def _plain_convolution(self: nn.Module, x: Tensor, offset: Tensor) -> Tensor:
    return F.conv2d(x, self.weight, None, self.stride, self.padding, self.dilation, self.groups)


def run(model: nn.Module, image: Tensor) -> None:
    """Do with an image what the model does, apart from choosing and cutting out boxes."""
    shape = tuple(image.shape[2:])
    meta = dict(batch_input_shape=shape, img_shape=shape, ori_shape=shape, pad_shape=shape, scale_factor=(1.0, 1.0))
    if hasattr(model, 'encode_decode'):
        model.encode_decode(image, [meta])
    elif not hasattr(model, 'roi_head'):
        from mmdet.structures import DetDataSample

        model(image, [DetDataSample(metainfo=meta)], mode='tensor')
    else:
        run_two_stages(model, image)


def run_two_stages(model: nn.Module, image: Tensor) -> None:
    """A detector with a second stage: its parts one by one, the second on a fixed number of boxes."""
    maps, roi_head = model.extract_feat(image), model.roi_head
    if type(model).__name__ == 'SparseRCNN':
        boxes = model.rpn_head.num_proposals
        proposals = (image.new_empty(1, boxes, 256),)
    else:
        boxes, proposals = BOXES, ()
        model.rpn_head(maps)
    if getattr(roi_head, 'semantic_head', None) is not None:
        roi_head.semantic_head(maps)
    for head in _as_list(roi_head.bbox_head):
        head(image.new_empty(boxes, 256, 7, 7), *proposals)
    previous = ()  # HTC hands features on from mask head to mask head
    for head in _as_list(getattr(roi_head, 'mask_head', None)):
        result = head(image.new_empty(MASKS, 256, 14, 14), *previous)
        previous = tuple(result[1:]) if isinstance(result, list | tuple) else ()


def _as_list(heads: nn.Module | None) -> list[nn.Module]:
    return [] if heads is None else list(heads) if isinstance(heads, nn.ModuleList) else [heads]


if __name__ == '__main__':
    sys.exit(main(parse_args()))
