"""Size of a model: parameters and multiply-adds of its parts, shapes of its stages, memory for training.

  python tools/model_info.py configs/mask_rcnn/mask-rcnn_swin-t-p4-w7_fpn_1x_coco.py --size 1333x800 --batch 2
  python tools/model_info.py configs/mask_rcnn/*.py --markdown

needs neither weights nor data nor a GPU: the model has shapes but no numbers. What is counted:

GMAC: 10^9 multiply-adds to predict on one image, of convolutions, linear layers and matrix products, those of attention
on padded tokens too; norms, activations, interpolation, and choosing and cutting out boxes are not, nor are projections
of padding, which this backbone leaves out and published counts have. The second stage of a detector runs on 1000 boxes
and 100 masks. A head for training alone has none.

MiB kept: tensors of the backbone, other than weights, that autograd holds for the backward pass of a training step of
one batch in float32. The reference kernel keeps the scores of attention, the Triton kernel for GPUs does not. Weights,
gradients, the optimizer's state, neck and heads, and what lives for the length of an operator come on top.
"""

import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from unittest import mock

import torch
import torch.nn.functional as F
from mmengine.config import Config
from rich import box
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from swin_mm import cli
from swin_mm.models.swin import SwinPyramid
from swin_mm.models.window_attention import WindowAttention
from swin_mm.openmmlab.config import build_model
from swin_mm.ops.attention import reference, triton
from swin_mm.ops.windows import padded_size
from swin_mm.utils.errors import InputError

BOXES, MASKS = 1000, 100  # what the second stage of a detector is counted with
KERNELS = {'reference': reference.attention, 'Triton': triton.attention}
ELSEWHERE = 'elsewhere'


def parse_args() -> Namespace:
    """Read the command line."""
    parser = cli.parser(__doc__, runner=False, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('more', nargs='*', help='more config files')
    parser.add_argument(
        '--size', metavar='WxH', help='of the image (default: 1280x800; of a segmentor, that of its test)'
    )
    parser.add_argument('--batch', type=int, default=1, metavar='N', help='images in a training step (default: 1)')
    parser.add_argument('--markdown', action='store_true', help='one row per config of a table in Markdown')
    return parser.parse_args()


def main(args: Namespace) -> None:
    """Print the tables."""
    if args.batch < 1:
        raise InputError(f'--batch {args.batch}: at least 1 is needed')
    size, console = cli.parse_size('--size', args.size, 'x', least=1), Console()
    if args.markdown:
        print('| config | parameters | GMAC | image |\n| --- | --- | --- | --- |')
    for path in (args.config, *args.more):
        config = cli.read_config(Namespace(**vars(args) | {'config': path}))
        width, height = size or usual_size(config)
        with console.status(f'counting {path}'):
            model, multiplications = build(config), macs(config, width, height)
        if args.markdown:
            parameters = sum(p.numel() for p in model.parameters())
            gmac = sum(multiplications.values()) / 1e9
            print(f'| {Path(path).stem} | {parameters:,} | {gmac:.2f} | {width} × {height} |')
            continue
        swin = isinstance(model.backbone, SwinPyramid)
        bytes_kept = {name: kept(config, width, height, args.batch, k) for name, k in KERNELS.items()} if swin else {}
        batch = f'; kept with a batch of {args.batch}' if swin else ''
        console.print(f'\n{Path(path).stem}, image of {width} × {height}{batch}', markup=False, highlight=False)
        console.print(table_of_parts(model, multiplications, bytes_kept))
        if swin:
            console.print('Stages, sizes as height×width')
            console.print(table_of_stages(model.backbone, width, height))


def table_of_parts(model: nn.Module, multiplications: Counter[str], bytes_kept: dict[str, Counter[str]]) -> Table:
    """Parameters, multiply-adds and memory, by part."""
    table = Table(box=box.SIMPLE_HEAD, collapse_padding=True)
    table.add_column('part', no_wrap=True)
    for title in ('parameters', 'GMAC', *(f'MiB kept,\n{kernel}' for kernel in bytes_kept)):
        table.add_column(title, justify='right')
    parameters = Counter(
        {
            name: sum(p.numel() for p in {p for m in modules for p in m.parameters()})
            for name, modules in parts(model).items()
        }
    )
    parameters[ELSEWHERE] = sum(p.numel() for p in model.parameters()) - sum(parameters.values())

    def add(name: str, numbers: list[int]) -> None:
        count, work, *memory = numbers
        cells = [f'{count:,}', f'{work / 1e9:.2f}', *(f'{size / 2**20:,.1f}' for size in memory)]
        table.add_row(name, *(cell if number else '' for cell, number in zip(cells, numbers, strict=True)))

    columns = [parameters, multiplications, *bytes_kept.values()]
    for name in parameters:
        if any(numbers := [column[name] for column in columns]):
            add(name, numbers)
    table.add_section()
    add('total', [sum(column.values()) for column in columns])
    return table


def table_of_stages(backbone: SwinPyramid, width: int, height: int) -> Table:
    """Maps, windows and heads of a backbone's stages."""
    titles = ('stage', 'blocks', 'channels', 'heads', 'map', 'window', 'shift', 'padded', 'windows')
    table = Table(*titles, box=box.SIMPLE_HEAD, collapse_padding=True)
    for i, (stage, size) in enumerate(zip(backbone.layers, map_sizes(backbone, width, height), strict=True)):
        block = stage.blocks[-1]
        window, shift = block.effective_window(size)
        whole = padded_size(size, window)
        cells = [i, len(stage.blocks), backbone.num_features[i], block.attn.num_heads, size, window, shift, whole]
        cells.append(whole[0] // window[0] * (whole[1] // window[1]))
        table.add_row(*(f'{cell[0]}×{cell[1]}' if isinstance(cell, tuple) else str(cell) for cell in cells))
    return table


def map_sizes(backbone: SwinPyramid, width: int, height: int) -> list[tuple[int, int]]:
    """Height and width of each stage's map."""
    sizes = []
    with ExitStack() as stack, torch.no_grad():
        for stage in backbone.layers:
            hook = stage.register_forward_pre_hook(lambda _, inputs: sizes.append(tuple(inputs[0].shape[1:3])))
            stack.callback(hook.remove)
        backbone(torch.empty(1, 3, height, width, device='meta'))
    return sizes


def usual_size(config: Config) -> tuple[int, int]:
    """Width and height that multiply-adds are usually given for: 1280 × 800, or what a segmentor is tested with."""
    if config.get('default_scope') == 'mmdet':
        return 1280, 800
    for step in config.get('test_pipeline', ()):
        if step['type'] == 'Resize' and 'scale' in step:
            return step['scale']
    raise InputError(f'{config.filename} has no test_pipeline that resizes; give the size of the image, --size WxH')


def build(config: Config, device: str = 'meta') -> nn.Module:
    """The model of a config. On the device meta it has shapes but no numbers, and is there at once.

    Raises:
        InputError: it cannot be built, or is neither detector nor segmentor.
    """
    if config.get('default_scope') not in ('mmdet', 'mmseg') or 'backbone' not in config.get('model', {}):
        raise InputError(
            f'{config.filename} is not a detector or a segmentor: default_scope should be mmdet or mmseg, and '
            'there should be a model.backbone'
        )
    with torch.device(device):
        return build_model(config, config.model).eval()


def parts(model: nn.Module) -> dict[str, list[nn.Module]]:
    """Modules by part, those of a Swin and of a second stage apart."""
    found = {}
    for name, child in model.named_children():
        if isinstance(child, SwinPyramid):
            found[f'{name}.patch_embed'] = [child.patch_embed]
            for i, stage in enumerate(child.layers):
                # The merging is called by the pyramid, not by the stage that it is a child of.
                found[f'{name}.layers.{i}'] = [stage] if stage.downsample is None else [stage, stage.downsample]
            found[f'{name}.norm*'] = [getattr(child, f'norm{i}') for i in child.out_indices]
        elif name == 'roi_head':
            found |= {f'{name}.{part}': _as_list(module) for part, module in child.named_children()}
        else:
            found[name] = [child]
    return found


@contextmanager
def metered(model: nn.Module, meter: Callable[[], int]) -> Iterator[Counter[str]]:
    """Attribute what ``meter`` grows by to the part whose forward is running, or to ``ELSEWHERE``."""
    grown: Counter[str] = Counter()

    def watched(forward: Callable, name: str) -> Callable:
        def call(*args, **kwargs):
            before = meter()
            result = forward(*args, **kwargs)
            grown[name] += meter() - before
            return result

        return call

    start = meter()
    with ExitStack() as stack:
        for name, modules in parts(model).items():
            for module in modules:  # mmseg calls forward without hooks
                stack.enter_context(mock.patch.object(module, 'forward', watched(module.forward, name)))
        yield grown
    grown[ELSEWHERE] = meter() - start - sum(grown.values())


def macs(config: Config, width: int, height: int) -> Counter[str]:
    """Multiply-adds of each part to predict on one image; the module's docstring says what counts."""
    model = build(config)
    try:
        return _macs(model, lambda: run(model, torch.empty(1, 3, height, width, device='meta')))
    except (NotImplementedError, RuntimeError):  # it looks at numbers on the way, but not in the backbone
        maps = []
        backbone = _macs(model, lambda: maps.extend(model.backbone(torch.empty(1, 3, height, width, device='meta'))))
        rest = build(config, 'cpu')
        rest.backbone.forward = lambda image: tuple(torch.zeros(m.shape) for m in maps)
        return backbone + _macs(rest, lambda: run(rest, torch.zeros(1, 3, height, width)))


def _macs(model: nn.Module, work: Callable[[], None]) -> Counter[str]:
    _use(reference.attention, model)
    # The counter knows PyTorch's operators only, and not its fused attention for inference.
    torch.backends.mha.set_fastpath_enabled(False)
    with (
        mock.patch('mmcv.ops.DeformConv2d.forward', _plain_convolution),
        torch.no_grad(),
        FlopCounterMode(display=False) as counter,
        metered(model, lambda: counter.get_total_flops() // 2) as grown,
    ):
        work()
    return grown


def _plain_convolution(self: nn.Module, x: Tensor, offset: Tensor) -> Tensor:
    return F.conv2d(x, self.weight, None, self.stride, self.padding, self.dilation, self.groups)


def _use(kernel: Callable[..., Tensor], model: nn.Module) -> None:
    for module in model.modules():
        if isinstance(module, WindowAttention):
            module.attention_fn = kernel


def kept(config: Config, width: int, height: int, batch: int, kernel: Callable[..., Tensor]) -> Counter[str]:
    """Bytes that each part of the backbone keeps for the backward pass of a training step; not its weights.

    Args:
        config: a detector's or a segmentor's.
        width: of the images.
        height: of the images.
        batch: images in the step.
        kernel: computes attention, see :mod:`swin_mm.ops.attention`.
    """
    model = build(config)
    _use(kernel, model)
    return saved_bytes(model, torch.empty(batch, 3, height, width, device='meta'))


def saved_bytes(model: nn.Module, image: Tensor) -> Counter[str]:
    """Bytes that autograd saves for each part of the model's backbone, each storage once, parameters left out."""
    storages = {t.untyped_storage()._cdata: t.untyped_storage() for t in model.parameters()}
    total = 0

    def pack(tensor: Tensor) -> Tensor:
        nonlocal total
        storage = tensor.untyped_storage()
        if storage._cdata not in storages:
            storages[storage._cdata] = storage  # held, so that no other takes its address
            total += storage.nbytes()
        return tensor

    model.backbone.train()
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor), metered(model, lambda: total) as grown:
        model.backbone(image)
    return grown


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
    channels = maps[0].shape[1]
    if type(model).__name__ == 'SparseRCNN':
        boxes = model.rpn_head.num_proposals
        proposals = (image.new_empty(1, boxes, channels),)
    else:
        boxes, proposals = BOXES, ()
        model.rpn_head(maps)
    if getattr(roi_head, 'semantic_head', None) is not None:
        roi_head.semantic_head(maps)
    for head in _as_list(roi_head.bbox_head):
        head(image.new_empty(boxes, channels, 7, 7), *proposals)
    previous = ()  # HTC hands features on from mask head to mask head
    for head in _as_list(getattr(roi_head, 'mask_head', None)):
        result = head(image.new_empty(MASKS, channels, 14, 14), *previous)
        previous = tuple(result[1:]) if isinstance(result, list | tuple) else ()


def _as_list(heads: nn.Module | None) -> list[nn.Module]:
    return [] if heads is None else list(heads) if isinstance(heads, nn.ModuleList) else [heads]


if __name__ == '__main__':
    sys.exit(cli.run(main, parse_args()))
