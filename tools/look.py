"""Pictures of what a Swin does with an image: features, windows, attention, position bias.

  python tools/look.py CONFIG photo.jpg weights.pth --out looks --point 320,200

writes into looks/
  features.png           each stage's map: its principal components as colours, and the length of its vectors
  windows.png            windows and shifted windows; which tokens of a shifted window see each other
  attention_stage*.png   what the token at --point attends to, head by head
  bias_stage*.png        the learned position bias, head by head

The image is scaled to fit the config's test scale or --size, its ratio kept, and normalised as the config says. Weights
are those of a checkpoint, of the whole model or of a backbone, in any naming; without one, those that the backbone's
init_cfg names.
"""

import math
import sys
from argparse import Namespace, RawDescriptionHelpFormatter
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple
from unittest import mock

import mmcv
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.image import AxesImage
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import Patch, Rectangle
from mmengine.config import Config
from mmengine.model import ImgDataPreprocessor
from torch import Tensor

from swin_mm import cli
from swin_mm.analysis.figures import figure
from swin_mm.models.swin import SwinBlock, SwinPyramid
from swin_mm.openmmlab.config import build_model, test_dataset
from swin_mm.ops.attention import reference
from swin_mm.ops.windows import Size, padded_size, region_mask, window_partition, window_reverse
from swin_mm.utils.errors import InputError

PARTS = ('#0072B2', '#E69F00', '#009E73', '#CC79A7')  # of a window that the map's edges cut
PADDING = dict(fc='0.9', ec='0.6', hatch='////', lw=0)

FEATURES = """above: first three
principal components
as red, green, blue

below: length of the
vectors before the
output norm"""


def parse_args() -> Namespace:
    """Read the command line."""
    parser = cli.parser(__doc__, runner=False, formatter_class=RawDescriptionHelpFormatter)
    parser.add_argument('image', help='image file')
    parser.add_argument('checkpoint', nargs='?', help='checkpoint file (default: what the init_cfg names)')
    parser.add_argument('--out', type=Path, required=True, metavar='DIR', help='folder to write to')
    parser.add_argument('--point', metavar='X,Y', help="pixel of the image (default: the image's centre)")
    parser.add_argument('--block', type=int, default=-1, help='block of each stage to look at (default: -1, the last)')
    parser.add_argument('--size', metavar='WxH', help="to scale the image to (default: the config's test scale)")
    parser.add_argument('--format', choices=['png', 'svg', 'pdf'], default='png', help='default: png')
    return parser.parse_args()


class Stage(NamedTuple):
    """What a stage did with the image.

    Args:
        stride: side of a token in pixels.
        blocks: all of them.
        block: the one to look at.
        entered: what went into that block, (1, H, W, C).
        left: what came out of the stage, (1, H, W, C).
        output: the normed map (C, H, W) that the backbone returns, if it returns this stage's.
    """

    stride: int
    blocks: Sequence[SwinBlock]
    block: SwinBlock
    entered: Tensor
    left: Tensor
    output: Tensor | None

    @property
    def size(self) -> Size:
        """Of the map: (H, W)."""
        return tuple(self.left.shape[1:3])


def main(args: Namespace) -> None:
    """Draw."""
    cfg = cli.read_config(args)
    size = cli.parse_size('--size', args.size, 'x', least=1)
    picture, image, (width, height) = read_image(cfg, args.image, size)
    x, y = cli.parse_size('--point', args.point, ',') or (width // 2, height // 2)
    if not (x < width and y < height):
        raise InputError(f'--point {args.point} is outside of the image, which has {width} × {height} pixels')
    point = x * picture.shape[1] // width, y * picture.shape[0] // height
    backbone = build(cfg, args.checkpoint)
    stages = watch(backbone, image, args.block)

    def path(name: str) -> Path:
        return args.out / f'{name}.{args.format}'

    draw_features(path('features'), picture, stages)
    draw_windows(path('windows'), picture, stages)
    for number, stage in enumerate(stages):
        where = f'stage {number}, block {list(backbone.layers[number].blocks).index(stage.block)}'
        draw_attention(path(f'attention_stage{number}'), picture, stage, point, where)
        draw_bias(path(f'bias_stage{number}'), stage.block, where)
    print(f'written: {args.out}')


def read_image(cfg: Config, path: str, size: Size | None) -> tuple[np.ndarray, Tensor, Size]:
    """The scaled image as (H, W, 3) RGB and as the backbone takes it, (1, 3, H, W); and the file's width and height."""
    try:
        picture = mmcv.imread(path)
    except OSError as error:
        raise InputError(f'image {path} cannot be read: {error}') from error
    if picture is None:
        raise InputError(f'image {path} cannot be decoded; give a JPEG or PNG file')
    given = picture.shape[1::-1]
    if size := size or usual_scale(cfg):
        picture = mmcv.imrescale(picture, size)
    # That of a classifier stands beside the model, with a name of its own for the order of the channels.
    settings = cfg.get('model', {}).get('data_preprocessor') or cfg.get('data_preprocessor') or {}
    swap = settings.get('bgr_to_rgb', settings.get('to_rgb', False))
    prepare = ImgDataPreprocessor(settings.get('mean'), settings.get('std'), bgr_to_rgb=swap)
    tensor = torch.from_numpy(picture.transpose(2, 0, 1).copy())
    return picture[..., ::-1].copy(), prepare({'inputs': [tensor]})['inputs'], given


def usual_scale(cfg: Config) -> Size | None:
    """What the config's test pipeline scales images to fit."""
    pipeline = test_dataset(cfg).get('pipeline', ()) if cfg.get('test_dataloader') else ()
    scale = next((step['scale'] for step in pipeline if step['type'].endswith('Resize') and 'scale' in step), None)
    return (scale, scale) if isinstance(scale, int) else scale


def build(cfg: Config, checkpoint: str | None) -> SwinPyramid:
    """The backbone with its weights, in evaluation.

    Raises:
        InputError: the config has none of ours.
        CheckpointError: the weights cannot be read or are of another backbone.
    """
    options = cfg.get('model', {}).get('backbone')
    if options is None:
        raise InputError(f'{cfg.filename} has no model.backbone')
    if checkpoint:
        options.init_cfg = dict(type='Pretrained', checkpoint=checkpoint)
    backbone = build_model(cfg, options)
    if not isinstance(backbone, SwinPyramid):
        raise InputError(
            f'{cfg.filename} has the backbone {options.type}, not one of swin_mm; tools/plug.py puts ours into it'
        )
    if not options.get('init_cfg') and not options.get('pretrained'):
        print('warning: no checkpoint and no init_cfg: the weights are random', file=sys.stderr)
    backbone.init_weights()
    return backbone.eval()


def watch(backbone: SwinPyramid, image: Tensor, block: int) -> list[Stage]:
    """Run the backbone and keep what is to be drawn.

    Args:
        backbone: in evaluation.
        image: (1, 3, H, W), normalised.
        block: index of the block to look at in each stage.
    """
    entered, left, hooks = [], [], []
    for number, stage in enumerate(backbone.layers):
        if not -len(stage.blocks) <= block < len(stage.blocks):
            raise InputError(f'--block {block}: stage {number} has {len(stage.blocks)} blocks, counted from 0')
        hooks.append(stage.blocks[block].register_forward_pre_hook(lambda _, inputs: entered.append(inputs[0])))
        hooks.append(stage.register_forward_hook(lambda _, inputs, result: left.append(result)))
    with torch.no_grad():
        outputs = dict(zip(backbone.out_indices, backbone(image), strict=True))
    for hook in hooks:
        hook.remove()
    strides = [backbone.patch_embed.patch[0]]
    strides += [stage.downsample.stride for stage in backbone.layers if stage.downsample is not None]
    return [
        Stage(
            math.prod(strides[: i + 1]),
            stage.blocks,
            stage.blocks[block],
            entered[i],
            left[i],
            outputs[i][0] if i in outputs else None,
        )
        for i, stage in enumerate(backbone.layers)
    ]


@torch.no_grad()
def attention_weights(block: SwinBlock, x: Tensor) -> Tensor:
    """How much the tokens of each window attend to each other in a block, (nW, h, N, N).

    Args:
        block: any.
        x: what goes into it, (1, H, W, C).
    """
    kernel, caught = block.attn.attention_fn, []

    def attention_fn(*args: Any) -> Tensor:
        caught.append(reference.weights(*args[:6])[0])
        return kernel(*args)

    with mock.patch.object(block.attn, 'attention_fn', attention_fn):
        block.whole(x, *block.effective_window(tuple(x.shape[1:3])))
    return caught[0]


def visible(size: Size, window: Size, shift: Size) -> Tensor:
    """Numbers, equal for tokens that see each other: (Hp, Wp) of the padded map, int64.

    The number of a token is window * N + the first token of the window that it sees.
    """
    whole, slots = padded_size(size, window), window[0] * window[1]
    count = whole[0] * whole[1] // slots
    mask = region_mask(size, window, shift, torch.device('cpu')) if any(shift) else torch.zeros(count, slots, slots)
    first = (mask == 0).int().argmax(-1) + slots * torch.arange(count)[:, None]
    return window_reverse(first[..., None], whole, window, shift)[0, ..., 0]


def attention_map(block: SwinBlock, x: Tensor, token: tuple[int, int]) -> np.ndarray:
    """How much one token attends to each token of the padded map, (h, Hp, Wp); NaN for those it does not see.

    Args:
        block: any.
        x: what goes into it, (1, H, W, C).
        token: row and column.
    """
    size = tuple(x.shape[1:3])
    window, shift = block.effective_window(size)
    whole = padded_size(size, window)
    tokens = torch.arange(whole[0] * whole[1]).view(1, *whole, 1)
    tokens = window_partition(tokens, window, shift)[..., 0]  # (nW, N)
    place = tokens == token[0] * whole[1] + token[1]
    ((n, t),) = place.nonzero().tolist()
    weights = attention_weights(block, x)[n, :, t]  # (h, N)
    result = torch.full((weights.shape[0], whole[0] * whole[1]), torch.nan)
    result[:, tokens[n]] = weights
    groups = visible(size, window, shift).flatten()
    result[:, groups != groups[token[0] * whole[1] + token[1]]] = torch.nan
    return result.unflatten(1, whole).numpy()


@torch.no_grad()
def bias_map(block: SwinBlock) -> np.ndarray:
    """The position bias by where the key lies, (h, 2 * Hw - 1, 2 * Ww - 1), the query in the middle."""
    table, window = block.attn.bias_table(block.attn.window)
    # The table lists offsets from key to query.
    return table.unflatten(0, (2 * window[0] - 1, -1)).flip(0, 1).permute(2, 0, 1).numpy()


def principal_colours(features: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The first three principal components of (C, H, W) as RGB, (H, W, 3), and their shares of the variance."""
    x = features.flatten(1).T.double()
    x = x - x.mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x)
    vectors = vectors[:, -3:].flip(1)
    parts = x @ (vectors * vectors.sum(0).sign())  # else their signs would be anyone's guess
    low, high = (torch.quantile(parts, q, 0) for q in (0.01, 0.99))
    spread = high - low
    # A map of one token, or of equal ones, has no direction.
    colours = torch.where(spread > 1e-6 * spread.max(), (parts - low) / spread, 0.5).clamp(0, 1)
    shares = values[-3:].flip(0) / values.sum().clamp(min=torch.finfo(x.dtype).tiny)
    return colours.unflatten(0, features.shape[1:]).numpy(), shares.numpy()


def cut_parts(groups: Tensor, window: Size) -> Tensor:
    """Which part of a window each token is in, 0 to 3, or NaN where all of a window see each other.

    Args:
        groups: what :func:`visible` gives.
        window: (Hw, Ww).
    """
    number, first = groups // (window[0] * window[1]), groups % (window[0] * window[1])
    part = 2 * (first // window[1] > 0) + (first % window[1] > 0).int()
    return torch.where(torch.isin(number, number[first > 0]), part, torch.nan)


def on_map(picture: np.ndarray, size: Size, stride: int) -> np.ndarray:
    """The image on a map of so many tokens, (H * stride, W * stride, 4) RGBA, transparent where there is padding."""
    canvas = np.zeros((size[0] * stride, size[1] * stride, 4), np.uint8)
    height, width = picture.shape[:2]
    canvas[:height, :width, :3] = picture
    canvas[:height, :width, 3] = 255
    return canvas


def extent(tokens: tuple[slice, slice]) -> tuple[int, int, int, int]:
    """Where these rows and columns of tokens lie in a picture whose coordinates are tokens."""
    rows, columns = tokens
    return columns.start, columns.stop, rows.stop, rows.start


def show(axes: Axes, canvas: np.ndarray, tokens: tuple[slice, slice], stride: int) -> None:
    """Draw the image at these rows and columns of tokens."""
    axes.add_patch(Rectangle((0, 0), 1, 1, transform=axes.transAxes, zorder=0, **PADDING))
    pixels = tuple(slice(side.start * stride, side.stop * stride) for side in tokens)
    axes.imshow(canvas[pixels], extent=extent(tokens))
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def heat(axes: Axes, values: np.ndarray, tokens: tuple[slice, slice], **colours: Any) -> AxesImage:
    """Draw a value per token over the image; none where it is NaN."""
    return axes.imshow(values, extent=extent(tokens), interpolation='nearest', **colours)


def lines(axes: Axes, rows: list[int], columns: list[int], width: float) -> None:
    """Lines through the whole picture that show on bright and on dark ground."""
    for colour, thickness in (('black', 2.2 * width), ('white', width)):
        for row in rows:
            axes.axhline(row, color=colour, lw=thickness)
        for column in columns:
            axes.axvline(column, color=colour, lw=thickness)


def borders(groups: Tensor) -> tuple[list[int], list[int]]:
    """Rows and columns before which another set of tokens begins; the sets lie on a grid."""
    rows, columns = groups[:, 0].diff().nonzero() + 1, groups[0].diff().nonzero() + 1
    return rows.flatten().tolist(), columns.flatten().tolist()


def frame(axes: Axes, tokens: tuple[slice, slice], colour: str, width: float) -> None:
    """A rectangle around rows and columns of tokens."""
    rows, columns = tokens
    corner, sides = (columns.start, rows.start), (columns.stop - columns.start, rows.stop - rows.start)
    axes.add_patch(Rectangle(corner, *sides, fill=False, ec=colour, lw=width, zorder=5))


def draw_features(path: Path, picture: np.ndarray, stages: list[Stage]) -> None:
    """Each stage's map as colours and as length, beside the image."""
    height = np.clip(2.5 * picture.shape[0] / picture.shape[1], 1.2, 4)
    with figure(path, 2.6 * (len(stages) + 1), 2 * height + 1.3) as drawn:
        drawn.suptitle('Feature maps')
        axes = drawn.subplots(2, len(stages) + 1)
        axes[0, 0].imshow(picture)
        axes[0, 0].set_title(f'image: {text(picture.shape[:2])}')
        axes[1, 0].text(0.5, 0.5, FEATURES, ha='center', va='center', transform=axes[1, 0].transAxes)
        for number, (stage, (top, bottom)) in enumerate(zip(stages, axes.T[1:], strict=True)):
            features = stage.left[0].permute(2, 0, 1) if stage.output is None else stage.output
            colours, shares = principal_colours(features)
            top.imshow(colours, interpolation='nearest')
            top.set_title(f'stage {number}: {text(features.shape)}')
            top.set_xlabel(f'{" + ".join(f"{share:.0%}" for share in shares)} of the variance')
            lengths = stage.left[0].norm(dim=-1).numpy()
            shown = bottom.imshow(lengths, cmap='magma', interpolation='nearest')
            drawn.colorbar(shown, ax=bottom, location='bottom', shrink=0.8, pad=0.02)
        for panel in axes.flat:
            panel.set(xticks=[], yticks=[])
            panel.spines[:].set_visible(False)


def draw_windows(path: Path, picture: np.ndarray, stages: list[Stage]) -> None:
    """Windows, shifted windows, and what the cyclic shift makes of them, a row per stage."""
    fits = [
        next((b for b in s.blocks if any(b.effective_window(s.size)[1])), s.block).effective_window(s.size)
        for s in stages
    ]
    wholes = [padded_size(stage.size, window) for stage, (window, _) in zip(stages, fits, strict=True)]
    heights = [min(4 * whole[0] / whole[1], 3) for whole in wholes]
    with figure(path, 12, sum(heights) + 0.3 * len(stages) + 0.9) as drawn:
        drawn.suptitle('Windows')
        rows = drawn.subplots(len(stages), 3, squeeze=False, height_ratios=heights)
        for i, (stage, (window, shift), whole) in enumerate(zip(stages, fits, wholes, strict=True)):
            canvas, tokens = on_map(picture, whole, stage.stride), tuple(slice(0, side) for side in whole)
            groups = visible(stage.size, window, shift)
            parts = cut_parts(groups, window).numpy()
            plain = borders(visible(stage.size, window, (0, 0)))
            back = np.negative(shift)
            rolled = np.roll(canvas, back * stage.stride, (0, 1)), np.roll(parts, back, (0, 1))
            titles = (
                f'stage {i}: {text(stage.size)} tokens in windows of {text(window)}',
                f'windows shifted by {text(shift)}',
                'the same after the cyclic shift, as computed',
            )
            panels = (canvas, np.full(whole, np.nan), plain), (canvas, parts, borders(groups)), (*rolled, plain)
            for axes, title, (pixels, tint, cuts) in zip(rows[i], titles, panels, strict=True):
                show(axes, pixels, tokens, stage.stride)
                heat(axes, tint, tokens, cmap=ListedColormap(PARTS), vmin=0, vmax=3, alpha=0.5)
                lines(axes, *cuts, width=0.4 if len(cuts[1]) > 20 else 0.8)
                axes.set_title(title)
        drawn.legend(
            [tuple(Patch(color=colour, alpha=0.6) for colour in PARTS), Patch(**PADDING)],
            [
                'parts that the cyclic shift joins to a window: a token sees its own part only',
                'padding, seen like any token',
            ],
            handler_map={tuple: HandlerTuple(ndivide=None)},
            handlelength=5,
            loc='outside lower center',
            ncols=2,
        )


def text(size: Sequence[int]) -> str:
    """A size for people."""
    return ' × '.join(map(str, size))


def draw_attention(path: Path, picture: np.ndarray, stage: Stage, point: tuple[int, int], where: str) -> None:
    """What the token at a point (x, y in pixels) attends to: where its window lies, and each head."""
    token = point[1] // stage.stride, point[0] // stage.stride
    maps = attention_map(stage.block, stage.entered, token)
    window, shift = stage.block.effective_window(stage.size)
    whole = tuple(slice(0, side) for side in maps.shape[1:])
    seen = tuple(slice(int(a.min()), int(a.max()) + 1) for a in np.isfinite(maps[0]).nonzero())
    near = tuple(
        slice(max(part.start - side // 2, 0), min(part.stop + side // 2, end.stop))
        for part, side, end in zip(seen, window, whole, strict=True)
    )
    canvas = on_map(picture, maps.shape[1:], stage.stride)
    grey = canvas.copy()
    grey[..., :3] = canvas[..., :3].mean(-1, keepdims=True)
    asked = tuple(slice(place, place + 1) for place in token)
    # Roots tell small weights apart where one key takes nearly all.
    norm = PowerNorm(0.5, 0, np.nanmax(maps))

    down, across = grid_of(len(maps))
    height = down * (6.5 / across * (near[0].stop - near[0].start) / (near[1].stop - near[1].start) + 0.3)
    with figure(path, 12, max(height + 0.4, 5)) as drawn:
        drawn.suptitle(f'Attention in {where}{" (shifted windows)" if any(shift) else ""}')
        left, right = drawn.subfigures(1, 2, width_ratios=[1, 2])
        top, bottom = left.subplots(2, 1)
        show(top, canvas, whole, stage.stride)
        frame(top, seen, 'red', 1.5)
        top.plot(token[1] + 0.5, token[0] + 0.5, '+', color='cyan', ms=5)
        top.set_title('a token (cross) and what it sees')
        grid = right.subplots(down, across, squeeze=False)
        panels = {'mean of the heads': (bottom, maps.mean(0))}
        panels |= {f'head {i}': panel for i, panel in enumerate(zip(grid.flat, maps, strict=True))}
        for title, (axes, values) in panels.items():
            show(axes, grey, near, stage.stride)
            shown = heat(axes, values[near], near, cmap='inferno', norm=norm, alpha=0.75)
            frame(axes, asked, 'cyan', 1)
            axes.set_title(title)
        equal = 1 / np.isfinite(maps[0]).sum()
        bar = right.colorbar(shown, ax=grid, label=f'attention weight (equal shares: {equal:.3f})', shrink=0.8)
        bar.solids.set_alpha(1)


def grid_of(count: int) -> tuple[int, int]:
    """Rows and columns of so many panels: no gaps, wider than high."""
    columns = next(c for c in range(math.isqrt(count - 1) + 1, count + 1) if count % c == 0)
    return count // columns, columns


def draw_bias(path: Path, block: SwinBlock, where: str) -> None:
    """The position bias of each head, by offset."""
    maps = bias_map(block)
    down, across = grid_of(len(maps))
    top, left = (0.5 - (side + 1) // 2 for side in maps.shape[1:])
    # V2's biases lie between 0 and 16.
    largest = np.abs(maps).max()
    colours = dict(cmap='RdBu_r', vmin=-largest, vmax=largest) if maps.min() < 0 else dict(cmap='viridis')
    with figure(path, 1.5 * across + 1.5, 1.6 * down + 1.2) as drawn:
        drawn.suptitle(f'Relative position bias in {where}')
        drawn.supxlabel('columns from query to key')
        drawn.supylabel('rows from query to key')
        grid = drawn.subplots(down, across, sharex=True, sharey=True, squeeze=False)
        for i, (axes, values) in enumerate(zip(grid.flat, maps, strict=True)):
            shown = axes.imshow(values, extent=(left, -left, -top, top), interpolation='nearest', **colours)
            axes.plot(0, 0, '+', color='black', ms=4)
            axes.set_title(f'head {i}')
        drawn.colorbar(shown, ax=grid, label='added to the score', shrink=0.8)


if __name__ == '__main__':
    sys.exit(cli.run(main, parse_args()))
