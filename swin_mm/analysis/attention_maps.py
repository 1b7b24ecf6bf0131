"""Figures of a Swin's feature maps, windows, attention and position bias on one image.

B batch, (H, W) map of tokens, (Hp, Wp) the map padded to whole windows, (Hw, Ww) window, nW windows per map,
N = Hw * Ww tokens per window, C channels, h heads.
"""

import logging
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple, cast

import mmcv
import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.colors import ListedColormap, PowerNorm
from matplotlib.image import AxesImage
from matplotlib.legend_handler import HandlerTuple
from matplotlib.patches import Patch, Rectangle
from mmengine.config import Config
from mmengine.model import BaseModule
from torch import Tensor

from swin_mm.analysis.figures import figure
from swin_mm.engine.images import displayable, image_reader, preprocessor_settings, test_pipeline
from swin_mm.models.swin import SwinBlock, SwinPyramid
from swin_mm.openmmlab.config import build_model, type_name
from swin_mm.ops.attention import reference
from swin_mm.ops.windows import Size, padded_size, region_mask, window_partition, window_reverse
from swin_mm.utils.errors import InputError

PART_COLOURS = ('#0072B2', '#E69F00', '#009E73', '#CC79A7')  # parts of a window that the map's edges cut
PADDING_STYLE: dict[str, Any] = dict(fc='0.9', ec='0.6', hatch='////', lw=0)

FEATURES_LEGEND = """above: first three
principal components
as red, green, blue

below: norm of the
feature vectors before
the output LayerNorm"""


class StageRecord(NamedTuple):
    """Intermediate results of one stage on an image.

    Args:
        stride: pixels per token side.
        blocks: the stage's blocks.
        block: the block to look at.
        block_input: input of that block, (1, H, W, C).
        stage_output: output of the last block, (1, H, W, C).
        feature_map: the normed map (C, H, W) that the backbone returns, or None if it does not return this stage.
    """

    stride: int
    blocks: Sequence[SwinBlock]
    block: SwinBlock
    block_input: Tensor
    stage_output: Tensor
    feature_map: Tensor | None

    @property
    def size(self) -> Size:
        """Tokens of the map, (H, W)."""
        return self.stage_output.shape[1], self.stage_output.shape[2]


def save_figures(
    cfg: Config,
    image: str,
    checkpoint: str | None,
    out: Path,
    point: tuple[int, int] | None = None,
    block: int = -1,
    size: tuple[int, int] | None = None,
    suffix: str = 'png',
) -> list[Path]:
    """Run a config's backbone on one image and save all figures.

    Args:
        cfg: the config.
        image: image file.
        checkpoint: weights of the whole model or of the backbone; None for what the backbone's init_cfg names.
        out: folder to write to.
        point: (x, y), the pixel of the image whose attention is drawn; None for the centre.
        block: index of the block to look at in each stage.
        size: (width, height) that the image is scaled to fit; None for the config's test scale.
        suffix: format of the figures, one of ``figures.FORMATS``.

    Returns:
        The files written.

    Raises:
        InputError: the image, the point, the block or the config is unsuitable, or a file cannot be written.
        CheckpointError: the weights cannot be read or do not fit.
    """
    picture, tensor, (width, height) = prepare_image(cfg, image, size)
    x, y = point or (width // 2, height // 2)
    if not (0 <= x < width and 0 <= y < height):
        raise InputError(f'point {x},{y} is outside the image, which is {width} × {height} pixels')
    pixel = x * picture.shape[1] // width, y * picture.shape[0] // height
    backbone = build_backbone(cfg, checkpoint)
    channels = backbone.patch_embed.proj.in_channels
    if tensor.shape[1] != channels:
        raise InputError(
            f'image {image} is read with {tensor.shape[1]} channels and the backbone takes {channels}; '
            "color_type='unchanged' in the LoadImageFromFile step of the test pipeline keeps all channels of a file"
        )
    stages = record_stages(backbone, tensor, block)

    written = []

    def path(name: str) -> Path:
        written.append(out / f'{name}.{suffix}')
        return written[-1]

    draw_features(path('features'), picture, stages)
    draw_windows(path('windows'), picture, stages)
    for number, stage in enumerate(stages):
        where = f'stage {number}, block {list(stage.blocks).index(stage.block)}'
        draw_attention(path(f'attention_stage{number}'), picture, stage, pixel, where)
        draw_position_bias(path(f'bias_stage{number}'), stage.block, where)
    return written


def prepare_image(cfg: Config, path: str, size: tuple[int, int] | None) -> tuple[np.ndarray, Tensor, tuple[int, int]]:
    """Read an image, scale it, and normalise it as the config's test pipeline or data preprocessor does.

    Args:
        cfg: the config.
        path: image file.
        size: (width, height) to fit, keeping the ratio; None for the config's test scale.

    Returns:
        The scaled image as (H, W, 3) RGB uint8, as the backbone's input (1, channels, H, W), and the file's
        (width, height).
    """
    image = image_reader(cfg)(path)
    file_size = image.shape[1], image.shape[0]
    if size := size or test_scale(cfg):
        image = mmcv.imrescale(image, size)
        image = image if image.ndim == 3 else image[..., None]  # OpenCV drops a single channel
    # A Normalize step of the pipeline does it, or the data preprocessor; the names of the settings are the same.
    step = next((step for step in test_pipeline(cfg) if type_name(step) == 'Normalize'), None)
    settings = preprocessor_settings(cfg) if step is None else {'to_rgb': True, **step}
    tensor = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)).astype(np.float32))
    # Classifiers call the switch to_rgb.
    if settings.get('bgr_to_rgb', settings.get('to_rgb', False)) and len(tensor) >= 3:
        tensor = torch.cat([tensor[:3].flip(0), tensor[3:]])
    if (mean := settings.get('mean')) is not None:
        tensor = (tensor - torch.tensor(mean).view(-1, 1, 1)) / torch.tensor(settings['std']).view(-1, 1, 1)
    return displayable(image), tensor[None], file_size


def test_scale(cfg: Config) -> tuple[int, int] | None:
    """The (width, height) that the config's test pipeline scales images to fit, if it has a Resize step."""
    resizes = (step for step in test_pipeline(cfg) if str(step['type']).endswith('Resize') and 'scale' in step)
    scale = next((step['scale'] for step in resizes), None)
    return (scale, scale) if isinstance(scale, int) else scale


def build_backbone(cfg: Config, checkpoint: str | None) -> SwinPyramid:
    """Build the config's backbone with weights, in evaluation mode.

    Raises:
        InputError: the config has no backbone of ours.
        CheckpointError: the weights cannot be read or do not fit.
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
        logging.getLogger('swin_mm').warning('no checkpoint and no init_cfg: the weights are random')
    cast(BaseModule, backbone).init_weights()
    return backbone.eval()


def record_stages(backbone: SwinPyramid, image: Tensor, block: int) -> list[StageRecord]:
    """Run the backbone and record what the figures need.

    Args:
        backbone: in evaluation mode.
        image: (1, channels, H, W), normalised.
        block: index of the block to look at in each stage; negative ones count from the end.
    """
    stages: Any = backbone.layers  # nn.ModuleList does not know the type of its items
    inputs: list[Tensor] = []
    outputs: list[Tensor] = []
    hooks = []
    try:
        for number, stage in enumerate(stages):
            if not -len(stage.blocks) <= block < len(stage.blocks):
                raise InputError(f'block {block}: stage {number} has {len(stage.blocks)} blocks, counted from 0')
            hooks.append(stage.blocks[block].register_forward_pre_hook(lambda _, args: inputs.append(args[0])))
            hooks.append(stage.register_forward_hook(lambda _, args, result: outputs.append(result)))
        with torch.no_grad():
            maps = dict(zip(backbone.out_indices, backbone(image), strict=True))
    finally:
        for hook in hooks:
            hook.remove()
    strides = [backbone.patch_embed.proj.stride[0]]
    strides += [stage.downsample.stride for stage in stages if stage.downsample is not None]
    return [
        StageRecord(
            stride=math.prod(strides[: i + 1]),
            blocks=stage.blocks,
            block=stage.blocks[block],
            block_input=inputs[i],
            stage_output=outputs[i],
            feature_map=maps[i][0] if i in maps else None,
        )
        for i, stage in enumerate(stages)
    ]


@torch.no_grad()
def attention_weights(block: SwinBlock, x: Tensor) -> Tensor:
    """Attention weights of a block, (nW, h, N, N); each row sums to 1.

    The block runs once with an attention function that records the weights; its own is restored afterwards.

    Args:
        block: in evaluation mode.
        x: the block's input, (1, H, W, C).
    """
    kernel, kept = block.attn.attention_fn, []

    def keep_weights(*args: Any) -> Tensor:
        qkv, pad, bias, window, shift, scale = args[:6]
        kept.append(reference.weights(qkv, pad, bias, window, shift, scale)[0])
        return kernel(*args)

    block.attn.attention_fn = keep_weights
    try:
        block(x)
    finally:
        block.attn.attention_fn = kernel
    return kept[0]


def visibility_groups(size: Size, window: Size, shift: Size) -> Tensor:
    """Label the tokens of the padded map so that tokens with equal labels attend to each other: (Hp, Wp), int64.

    The label of a token is window * N + the first token of the window that it attends to.
    """
    padded, tokens = padded_size(size, window), window[0] * window[1]
    count = padded[0] * padded[1] // tokens
    mask = region_mask(size, window, shift, torch.device('cpu')) if any(shift) else torch.zeros(count, tokens, tokens)
    first = (mask == 0).int().argmax(-1) + tokens * torch.arange(count)[:, None]
    return window_reverse(first[..., None], padded, window, shift)[0, ..., 0]


def attention_map(block: SwinBlock, x: Tensor, token: tuple[int, int]) -> np.ndarray:
    """How much one token attends to each token of the padded map, (h, Hp, Wp); NaN where it cannot attend.

    Args:
        block: in evaluation mode.
        x: the block's input, (1, H, W, C).
        token: row and column.
    """
    size = (x.shape[1], x.shape[2])
    window, shift = block.effective_window(size)
    padded = padded_size(size, window)
    index = token[0] * padded[1] + token[1]
    tokens = torch.arange(padded[0] * padded[1]).view(1, *padded, 1)
    tokens = window_partition(tokens, window, shift)[..., 0]  # (nW, N)
    ((n, t),) = (tokens == index).nonzero().tolist()
    weights = attention_weights(block, x)[n, :, t]  # (h, N)
    result = torch.full((weights.shape[0], padded[0] * padded[1]), torch.nan)
    result[:, tokens[n]] = weights
    groups = visibility_groups(size, window, shift).flatten()
    result[:, groups != groups[index]] = torch.nan
    return result.unflatten(1, padded).numpy()


@torch.no_grad()
def position_bias_map(block: SwinBlock) -> np.ndarray:
    """The position bias by offset from query to key, (h, 2 * Hw - 1, 2 * Ww - 1); offset (0, 0) is in the middle."""
    height, width = block.attn.window
    bias = block.attn.position_bias((height, width))  # (h, N, N), query by key
    down, right = torch.meshgrid(torch.arange(1 - height, height), torch.arange(1 - width, width), indexing='ij')
    # For each offset, the first query that has a key there.
    query_row, query_column = (-down).clamp(min=0), (-right).clamp(min=0)
    query = query_row * width + query_column
    key = (query_row + down) * width + query_column + right
    return bias[:, query, key].numpy()


def principal_colours(features: Tensor) -> tuple[np.ndarray, np.ndarray]:
    """The first three principal components of a map as colours.

    Args:
        features: (C, H, W).

    Returns:
        (H, W, 3) RGB from 0 to 1, and the components' shares of the variance, (3,).
    """
    x = features.flatten(1).T.double()
    x = x - x.mean(0)
    values, vectors = torch.linalg.eigh(x.T @ x)
    vectors = vectors[:, -3:].flip(1)
    parts = x @ (vectors * vectors.sum(0).sign())  # the sign of an eigenvector is arbitrary
    low, high = (torch.quantile(parts, q, 0) for q in (0.01, 0.99))
    spread = high - low
    # The map of a single token, or of equal ones, has no direction.
    colours = torch.where(spread > 1e-6 * spread.max(), (parts - low) / spread, 0.5).clamp(0, 1)
    shares = values[-3:].flip(0) / values.sum().clamp(min=torch.finfo(x.dtype).tiny)
    return colours.unflatten(0, features.shape[1:]).numpy(), shares.numpy()


def window_parts(groups: Tensor, window: Size) -> Tensor:
    """Number the regions of windows that contain several of them, 0 to 3; NaN in the other windows.

    Args:
        groups: the result of :func:`visibility_groups`.
        window: (Hw, Ww).
    """
    tokens = window[0] * window[1]
    number, first = groups // tokens, groups % tokens
    part = 2 * (first // window[1] > 0) + (first % window[1] > 0).int()
    return torch.where(torch.isin(number, number[first > 0]), part, torch.nan)


def boundaries(groups: Tensor) -> tuple[list[int], list[int]]:
    """Rows and columns at which another group begins; the groups form a grid."""
    rows, columns = groups[:, 0].diff().nonzero() + 1, groups[0].diff().nonzero() + 1
    return rows.flatten().tolist(), columns.flatten().tolist()


def panel_grid(count: int) -> tuple[int, int]:
    """Rows and columns for ``count`` panels: no gaps, at least as wide as high."""
    columns = next(c for c in range(math.isqrt(count - 1) + 1, count + 1) if count % c == 0)
    return count // columns, columns


def draw_features(path: Path, picture: np.ndarray, stages: list[StageRecord]) -> None:
    """Draw each stage's map as principal components and as vector norms, beside the image."""
    height, width = picture.shape[:2]
    panel = float(np.clip(2.5 * height / width, 1.2, 4))
    with figure(path, 2.6 * (len(stages) + 1), 2 * panel + 1.5) as drawn:
        drawn.suptitle('Feature maps')
        axes = drawn.subplots(2, len(stages) + 1)
        axes[0, 0].imshow(picture, extent=(0, width, height, 0))
        axes[0, 0].set_title(f'image: {_times(picture.shape[:2])}')
        for number, (stage, (top, bottom)) in enumerate(zip(stages, axes.T[1:], strict=True)):
            features = stage.stage_output[0].permute(2, 0, 1) if stage.feature_map is None else stage.feature_map
            colours, shares = principal_colours(features)
            norms = stage.stage_output[0].norm(dim=-1).numpy()
            # In pixels of the image, so that all panels have its size: a map may reach a little beyond it.
            covered = (0, stage.size[1] * stage.stride, stage.size[0] * stage.stride, 0)
            top.imshow(colours, interpolation='nearest', extent=covered)
            top.set_title(f'stage {number}: {_times(features.shape)}')
            top.set_xlabel(f'{" + ".join(f"{share:.0%}" for share in shares)} of the variance')
            shown = bottom.imshow(norms, cmap='magma', interpolation='nearest', extent=covered)
            drawn.colorbar(shown, ax=bottom, location='bottom', shrink=0.8, pad=0.02)
        for panel_axes in axes.flat:
            panel_axes.set(xticks=[], yticks=[], xlim=(0, width), ylim=(height, 0), aspect='equal')
            panel_axes.spines[:].set_visible(False)
        axes[1, 0].text(0.5, 0.5, FEATURES_LEGEND, ha='center', va='center', transform=axes[1, 0].transAxes)


def draw_windows(path: Path, picture: np.ndarray, stages: list[StageRecord]) -> None:
    """Draw the windows, the shifted windows, and the map after the cyclic shift; one row per stage."""
    fits = []
    for stage in stages:
        shifted = (block for block in stage.blocks if any(block.effective_window(stage.size)[1]))
        fits.append(next(shifted, stage.block).effective_window(stage.size))
    padded = [padded_size(stage.size, window) for stage, (window, _) in zip(stages, fits, strict=True)]
    heights = [min(4 * size[0] / size[1], 3) for size in padded]
    with figure(path, 12, sum(heights) + 0.3 * len(stages) + 0.9) as drawn:
        drawn.suptitle('Windows')
        rows = drawn.subplots(len(stages), 3, squeeze=False, height_ratios=heights)
        for i, (stage, (window, shift), size) in enumerate(zip(stages, fits, padded, strict=True)):
            canvas, tokens = _on_padded_map(picture, size, stage.stride), (slice(0, size[0]), slice(0, size[1]))
            groups = visibility_groups(stage.size, window, shift)
            parts = window_parts(groups, window).numpy()
            plain = boundaries(visibility_groups(stage.size, window, (0, 0)))
            back = np.negative(shift)
            rolled = np.roll(canvas, back * stage.stride, (0, 1)), np.roll(parts, back, (0, 1))
            titles = (
                f'stage {i}: {_times(stage.size)} tokens in windows of {_times(window)}',
                f'windows shifted by {_times(shift)}',
                'the same after the cyclic shift, as computed',
            )
            panels = (canvas, np.full(size, np.nan), plain), (canvas, parts, boundaries(groups)), (*rolled, plain)
            for axes, title, (pixels, tint, cuts) in zip(rows[i], titles, panels, strict=True):
                _show_image(axes, pixels, tokens, stage.stride)
                _show_values(axes, tint, tokens, cmap=ListedColormap(PART_COLOURS), vmin=0, vmax=3, alpha=0.5)
                _draw_lines(axes, *cuts, width=0.4 if len(cuts[1]) > 20 else 0.8)
                axes.set_title(title)
        # Matplotlib accepts tuples of artists, its type stubs do not.
        handles: list[Any] = [tuple(Patch(color=colour, alpha=0.6) for colour in PART_COLOURS), Patch(**PADDING_STYLE)]
        drawn.legend(
            handles,
            [
                'parts that the cyclic shift joins into one window: a token attends to its own part only',
                'padding, attended to like any token',
            ],
            handler_map={tuple: HandlerTuple(ndivide=None)},
            handlelength=5,
            loc='outside lower center',
            ncols=2,
        )


def draw_attention(path: Path, picture: np.ndarray, stage: StageRecord, point: tuple[int, int], where: str) -> None:
    """Draw what one token attends to: the position of its window, and the weights of each head.

    Args:
        path: the file to write.
        picture: (H, W, 3) RGB, as the backbone saw it.
        stage: the stage to draw.
        point: (x, y) in pixels of the picture.
        where: the stage and block, for the title.
    """
    token = point[1] // stage.stride, point[0] // stage.stride
    maps = attention_map(stage.block, stage.block_input, token)
    window, shift = stage.block.effective_window(stage.size)
    padded = maps.shape[1:]
    whole = slice(0, padded[0]), slice(0, padded[1])
    seen = tuple(slice(int(a.min()), int(a.max()) + 1) for a in np.isfinite(maps[0]).nonzero())
    near = tuple(
        slice(max(part.start - side // 2, 0), min(part.stop + side // 2, end))
        for part, side, end in zip(seen, window, padded, strict=True)
    )
    canvas = _on_padded_map(picture, padded, stage.stride)
    grey = canvas.copy()
    grey[..., :3] = canvas[..., :3].mean(-1, keepdims=True)
    asked = tuple(slice(place, place + 1) for place in token)
    # The square root shows differences between small weights where one key has nearly all of the weight.
    norm = PowerNorm(0.5, 0, np.nanmax(maps))

    down, across = panel_grid(len(maps))
    height = down * (6.5 / across * (near[0].stop - near[0].start) / (near[1].stop - near[1].start) + 0.3)
    with figure(path, 12, max(height + 0.4, 5)) as drawn:
        drawn.suptitle(f'Attention in {where}{" (shifted windows)" if any(shift) else ""}')
        left, right = drawn.subfigures(1, 2, width_ratios=[1, 2], squeeze=False)[0]
        top, bottom = left.subplots(2, 1)
        _show_image(top, canvas, whole, stage.stride)
        _draw_frame(top, seen, 'red', 1.5)
        top.plot(token[1] + 0.5, token[0] + 0.5, '+', color='cyan', ms=5)
        top.set_title('a token (cross) and what it attends to')
        grid = right.subplots(down, across, squeeze=False)
        panels = {'mean of the heads': (bottom, maps.mean(0))}
        panels |= {f'head {i}': panel for i, panel in enumerate(zip(grid.flat, maps, strict=True))}
        for title, (axes, values) in panels.items():
            _show_image(axes, grey, near, stage.stride)
            shown = _show_values(axes, values[near], near, cmap='inferno', norm=norm, alpha=0.75)
            _draw_frame(axes, asked, 'cyan', 1)
            axes.set_title(title)
        equal = 1 / np.isfinite(maps[0]).sum()
        bar = right.colorbar(shown, ax=grid, label=f'attention weight (equal shares: {equal:.3f})', shrink=0.8)
        bar.solids.set_alpha(1)


def draw_position_bias(path: Path, block: SwinBlock, where: str) -> None:
    """Draw the position bias of each head by offset."""
    maps = position_bias_map(block)
    down, across = panel_grid(len(maps))
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


def _times(size: Sequence[int]) -> str:
    return ' × '.join(map(str, size))


def _on_padded_map(picture: np.ndarray, size: Size, stride: int) -> np.ndarray:
    """The image on a canvas of ``size`` tokens, (H * stride, W * stride, 4) RGBA; padding is transparent."""
    canvas = np.zeros((size[0] * stride, size[1] * stride, 4), np.uint8)
    height, width = picture.shape[:2]
    canvas[:height, :width, :3] = picture
    canvas[:height, :width, 3] = 255
    return canvas


# The axes below count tokens; `tokens` is a slice of rows and a slice of columns.


def _extent(tokens: tuple[slice, ...]) -> tuple[int, int, int, int]:
    rows, columns = tokens
    return columns.start, columns.stop, rows.stop, rows.start


def _show_image(axes: Axes, canvas: np.ndarray, tokens: tuple[slice, ...], stride: int) -> None:
    axes.add_patch(Rectangle((0, 0), 1, 1, transform=axes.transAxes, zorder=0, **PADDING_STYLE))
    pixels = tuple(slice(side.start * stride, side.stop * stride) for side in tokens)
    axes.imshow(canvas[pixels], extent=_extent(tokens))
    axes.set(xticks=[], yticks=[])
    axes.spines[:].set_visible(False)


def _show_values(axes: Axes, values: np.ndarray, tokens: tuple[slice, ...], **colours: Any) -> AxesImage:
    """Draw one value per token over the image; nothing where it is NaN."""
    return axes.imshow(values, extent=_extent(tokens), interpolation='nearest', **colours)


def _draw_lines(axes: Axes, rows: list[int], columns: list[int], width: float) -> None:
    """Draw white lines with a black edge, visible on bright and on dark images."""
    for colour, thickness in (('black', 2.2 * width), ('white', width)):
        for row in rows:
            axes.axhline(row, color=colour, lw=thickness)
        for column in columns:
            axes.axvline(column, color=colour, lw=thickness)


def _draw_frame(axes: Axes, tokens: tuple[slice, ...], colour: str, width: float) -> None:
    rows, columns = tokens
    corner, sides = (columns.start, rows.start), (columns.stop - columns.start, rows.stop - rows.start)
    axes.add_patch(Rectangle(corner, *sides, fill=False, ec=colour, lw=width, zorder=5))
