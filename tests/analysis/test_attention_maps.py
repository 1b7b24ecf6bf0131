"""Figures of attention: values compared with the reference, and positions in the figures."""

from contextlib import contextmanager

import cv2
import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from PIL import Image

from swin_mm.analysis import attention_maps
from swin_mm.analysis.figures import figure
from swin_mm.models.swin import SwinPyramid, SwinPyramidV2
from swin_mm.ops.attention import reference
from swin_mm.ops.windows import padded_size
from swin_mm.utils.errors import InputError

PYRAMIDS = [SwinPyramid, SwinPyramidV2]
# Padded or not, a window larger than the map, an axis without shift.
FITS = [((9, 10), (4, 4), (2, 2)), ((8, 8), (4, 4), (2, 2)), ((3, 5), (4, 4), (2, 2)), ((9, 4), (3, 4), (1, 0))]


def block_of(pyramid, window, **options):
    """A block with shifted windows and weights that let heads differ."""
    model = pyramid(
        embed_dims=16, depths=(2,), num_heads=(2,), strides=(4,), out_indices=(0,), window_size=window, **options
    )
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval().layers[0].blocks[1]


@pytest.mark.parametrize('size, window, shift', FITS)
def test_visibility_groups_are_equal_where_tokens_attend_to_each_other(size, window, shift):
    whole = padded_size(size, window)
    found = attention_maps.visibility_groups(size, window, shift)
    assert found.shape == whole
    # Attention of equal scores, spread back onto the map: what each token gets of every other.
    eye = torch.eye(whole[0] * whole[1]).view(1, *whole, -1)
    zero = torch.zeros_like(eye)
    count = window[0] * window[1]
    qkv, pad = torch.cat([zero, zero, eye], -1), torch.zeros(3 * eye.shape[-1])
    seen = reference.attention(qkv, pad, torch.zeros(1, count, count), window, shift, 1.0)[0].flatten(0, 1) > 1e-6
    assert ((found.flatten()[:, None] == found.flatten()) == seen).all()


def test_windows_cut_by_the_edges_are_numbered_by_part():
    groups = attention_maps.visibility_groups((8, 12), (4, 4), (2, 2))
    parts = attention_maps.window_parts(groups, (4, 4))
    assert attention_maps.boundaries(groups) == ([2, 6], [2, 6, 10])
    assert parts[2:6, 2:10].isnan().all(), 'whole windows are not cut'
    corners = [parts[7, 11], parts[7, 0], parts[0, 11], parts[0, 0]]  # of the window that joins all edges
    assert corners == [0, 1, 2, 3]
    assert (parts[2:6, 10:] == 0).all() and (parts[2:6, :2] == 1).all() and (parts[:2, 2:10] == 2).all()
    assert attention_maps.window_parts(attention_maps.visibility_groups((8, 12), (4, 4), (0, 0)), (4, 4)).isnan().all()


@pytest.mark.parametrize('pyramid', PYRAMIDS)
@pytest.mark.parametrize('pad_small_map', [True, False])
@pytest.mark.parametrize('size, token', [((9, 10), (8, 9)), ((9, 10), (0, 5)), ((3, 5), (2, 1)), ((8, 8), (3, 3))])
def test_attention_map_reproduces_the_output_of_the_block(pyramid, pad_small_map, size, token):
    block, x = block_of(pyramid, 4, pad_small_map=pad_small_map), torch.randn(1, *size, 16)
    window, shift = block.effective_window(size)
    caught, kernel = [], block.attn.attention_fn

    def attention_fn(*args):
        caught.append((args, kernel(*args)))
        return caught[0][1]

    block.attn.attention_fn = attention_fn
    found = torch.from_numpy(attention_maps.attention_map(block, x, token))
    assert block.attn.attention_fn is attention_fn, 'the kernel is put back'
    (qkv, pad, *_), out = caught[0]
    whole = padded_size(size, window)
    assert found.shape == (2, *whole)
    torch.testing.assert_close(found.nansum((1, 2)), torch.ones(2))
    groups = attention_maps.visibility_groups(size, window, shift)
    assert (found[0].isfinite() == (groups == groups[token])).all()

    values = pad[32:].expand(*whole, 16).clone()
    values[: size[0], : size[1]] = qkv[0, ..., 32:]
    expected = torch.einsum('hij,ijhd->hd', found.nan_to_num(), values.unflatten(-1, (2, 8))).flatten()
    torch.testing.assert_close(expected, out[0, token[0], token[1]])


@pytest.mark.parametrize('pyramid', PYRAMIDS)
def test_position_bias_map_is_the_position_bias_by_offset(pyramid):
    block = block_of(pyramid, (3, 4))
    found = attention_maps.position_bias_map(block)
    assert found.shape == (2, 5, 7)
    with torch.no_grad():
        bias = block.attn.position_bias((3, 4)).numpy()
    for query in range(12):
        for key in range(12):
            down, right = key // 4 - query // 4, key % 4 - query % 4
            np.testing.assert_allclose(found[:, 2 + down, 3 + right], bias[:, query, key])


def test_stages_are_recorded_and_hooks_removed():
    model = SwinPyramid(embed_dims=16, depths=(2, 3), num_heads=(1, 1), strides=(4, 2), out_indices=(1,)).eval()
    image = torch.randn(1, 3, 45, 62)
    first, second = attention_maps.record_stages(model, image, -2)
    assert (first.stride, second.stride) == (4, 8) and (first.size, second.size) == ((12, 16), (6, 8))
    assert first.feature_map is None and torch.equal(second.feature_map, model(image)[0][0])
    torch.testing.assert_close(model.norm1(second.stage_output)[0].permute(2, 0, 1), second.feature_map)
    assert second.block is model.layers[1].blocks[1]
    with torch.no_grad():
        torch.testing.assert_close(model.layers[1].blocks[2](second.block(second.block_input)), second.stage_output)
    assert not model.layers[0]._forward_hooks and not second.block._forward_pre_hooks


def test_panels_show_lines_frames_and_values_at_the_right_tokens(monkeypatch):
    figures = []

    @contextmanager
    def kept(path, width, height):
        figures.append(Figure((width, height)))
        yield figures[-1]

    monkeypatch.setattr(attention_maps, 'figure', kept)
    options = dict(embed_dims=16, depths=(2,), num_heads=(2,), strides=(4,), out_indices=(0,))
    model = SwinPyramid(**options, window_size=(3, 4)).eval()
    (stage,) = attention_maps.record_stages(
        model, torch.randn(1, 3, 37, 42), -1
    )  # 10 × 11 tokens, 12 × 12 with padding
    picture = np.random.default_rng(0).integers(0, 256, (37, 42, 3), dtype=np.uint8)
    attention_maps.draw_windows('windows', picture, [stage])
    attention_maps.draw_attention('attention', picture, stage, (5, 30), 'stage 0')  # x, y: row 7, column 1
    attention_maps.draw_position_bias('bias', stage.block, 'stage 0')
    windows, attention, bias = figures

    for axes, rows, columns in zip(
        windows.axes, ([3, 6, 9], [1, 4, 7, 10], [3, 6, 9]), ([4, 8], [2, 6, 10], [4, 8]), strict=True
    ):
        drawn = [tuple(np.ravel(line.get_data())) for line in axes.lines]
        assert {y for *_, y, z in drawn if y == z} == set(rows) and {x for x, z, *_ in drawn if x == z} == set(columns)
        assert all(image.get_extent() == [0, 12, 12, 0] for image in axes.images)
    rolled = windows.axes[2].images[0].get_array()
    assert (rolled[0, 0, :3] == picture[4, 8]).all() and (rolled[-4, -8, :3] == picture[0, 0]).all()
    assert (rolled[29:33, :34, 3] == 255).all() and (rolled[33:44, :34, 3] == 0).all(), 'padding is transparent'

    panels = {axes.get_title(): axes for axes in attention.axes}
    expected = attention_maps.attention_map(stage.block, stage.block_input, (7, 1))
    assert np.isfinite(expected[0]).nonzero()[0].tolist() == [7] * 2 + [8] * 2 + [9] * 2
    seen, (token,) = panels['a token (cross) and what it attends to'].patches[1], panels['head 1'].patches[1:]
    assert (seen.get_xy(), seen.get_width(), seen.get_height()) == ((0, 7), 2, 3)
    assert (token.get_xy(), token.get_width(), token.get_height()) == ((1, 7), 1, 1)
    for title, values in (('head 1', expected[1]), ('mean of the heads', expected.mean(0))):
        image = panels[title].images[-1]
        left, right, bottom, top = image.get_extent()
        np.testing.assert_array_equal(image.get_array().filled(np.nan), values[top:bottom, left:right])
    assert bias.axes[1].images[0].get_extent() == [-3.5, 3.5, 2.5, -2.5]
    np.testing.assert_array_equal(bias.axes[1].images[0].get_array(), attention_maps.position_bias_map(stage.block)[1])


def test_principal_components_recover_planted_directions():
    random = np.random.default_rng(0)
    strengths = random.normal(size=(3, 20, 30)) * np.array([9, 3, 1])[:, None, None]
    features = np.einsum('ck,kij->cij', np.linalg.qr(random.normal(size=(8, 3)))[0], strengths)
    colours, shares = attention_maps.principal_colours(torch.tensor(features))
    values = np.linalg.svd((features.reshape(8, -1).T - features.reshape(8, -1).mean(1)), compute_uv=False)[:3] ** 2
    np.testing.assert_allclose(shares, values / values.sum(), atol=1e-9)
    for strength, colour in zip(strengths, np.moveaxis(colours, -1, 0), strict=True):
        inside = (colour > 0) & (colour < 1)
        assert abs(np.corrcoef(strength[inside], colour[inside])[0, 1]) > 0.98
    for equal in (torch.ones(8, 1, 1), torch.ones(8, 4, 5)):
        colours, shares = attention_maps.principal_colours(equal)
        assert (colours == 0.5).all() and (shares == 0).all()


@pytest.mark.parametrize('count, grid', [(1, (1, 1)), (3, (1, 3)), (4, (2, 2)), (6, (2, 3)), (24, (4, 6)), (5, (1, 5))])
def test_panels_leave_no_gaps(count, grid):
    assert attention_maps.panel_grid(count) == grid


@pytest.fixture
def photo(tmp_path):
    """A picture whose pixels all differ from their neighbours, as PNG."""
    path = tmp_path / 'photo.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path)
    return path


def test_image_is_scaled_and_normalised_as_the_config_says(photo):
    mean, std = [10.0, 20.0, 30.0], [2.0, 4.0, 8.0]
    rgb = np.array(Image.open(photo)).astype(np.float32)
    settings = dict(type='Any', mean=mean, std=std, pad_val=0)
    for name, swap, channels in (
        ('bgr_to_rgb', True, rgb),
        ('bgr_to_rgb', False, rgb[..., ::-1]),
        ('to_rgb', True, rgb),
    ):
        prepare = dict(data_preprocessor=settings | {name: swap})
        cfg = Config(dict(model=dict(), **prepare) if name == 'to_rgb' else dict(model=prepare))
        picture, image, given = attention_maps.prepare_image(cfg, str(photo), None)
        assert given == (60, 40) and (picture == rgb).all()
        np.testing.assert_allclose(image[0].permute(1, 2, 0), (channels - mean) / std, rtol=1e-5)
    for size in ((1000, 80), 80):  # an integer is the side of a square
        pipeline = [dict(type='LoadImageFromFile'), dict(type='mmdet.Resize', scale=size)]
        cfg.test_dataloader = dict(dataset=dict(pipeline=pipeline))
        picture, image, given = attention_maps.prepare_image(cfg, str(photo), None)
        expected = (80, 120) if size != 80 else (53, 80)
        assert given == (60, 40) and picture.shape[:2] == expected and image.shape == (1, 3, *expected)


@pytest.mark.parametrize('step', [False, True])
def test_image_of_four_channels_and_sixteen_bits(step, tmp_path):
    """The data preprocessor normalises it, or a step of the pipeline."""
    pixels = np.random.default_rng(0).integers(0, 65536, (20, 30, 4)).astype(np.uint16)
    path = tmp_path / 'multi.tiff'
    assert cv2.imwrite(str(path), pixels)
    mean, std = [1e4, 2e4, 3e4, 4e4], [100.0, 200.0, 300.0, 400.0]
    pipeline = [dict(type='LoadImageFromFile', color_type='unchanged', imdecode_backend='cv2')]
    cfg = Config(
        dict(
            model=dict(data_preprocessor=dict(mean=mean, std=std, bgr_to_rgb=True)),
            test_dataloader=dict(dataset=dict(pipeline=pipeline)),
        )
    )
    order = [2, 1, 0, 3]
    if step:
        order = [0, 1, 2, 3]
        pipeline.append(dict(type='Normalize', mean=mean, std=std, to_rgb=False))
        cfg.test_dataloader.dataset.pipeline = pipeline
        cfg.model.data_preprocessor = dict(mean=None, std=None, bgr_to_rgb=False)
    picture, image, size = attention_maps.prepare_image(cfg, str(path), None)
    assert size == (30, 20) and picture.shape == (20, 30, 3) and picture.dtype == np.uint8
    expected = (pixels[..., order] - np.array(mean)) / std
    np.testing.assert_allclose(image[0].permute(1, 2, 0), expected, rtol=1e-4, atol=1e-3)


def test_channels_that_do_not_fit_the_backbone_are_named(photo, tmp_path):
    cfg = Config(dict(model=dict(backbone=dict(type='swin_mm.SwinTransformer', in_channels=4, depths=(1, 1, 1, 1)))))
    with pytest.raises(InputError, match='read with 3 channels and the backbone takes 4'):
        attention_maps.save_figures(cfg, str(photo), None, tmp_path)


def test_feature_panels_are_of_equal_size(tmp_path):
    """A map may reach beyond the image, by less than a token; its panel must not."""
    model = SwinPyramid(embed_dims=16, depths=(1, 1), num_heads=(1, 1), strides=(4, 2), out_indices=(0, 1)).eval()
    stages = attention_maps.record_stages(model, torch.randn(1, 3, 37, 61), -1)
    kept = []

    @contextmanager
    def keep(path, width, height):
        with figure(path, width, height) as drawn:
            yield drawn
        kept.append(drawn)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(attention_maps, 'figure', keep)
        attention_maps.draw_features(tmp_path / 'features.png', np.zeros((37, 61, 3), np.uint8), stages)
    panels = [axes for axes in kept[0].axes if axes.images and axes.get_title()]
    boxes = np.array([axes.get_window_extent().bounds for axes in panels])
    assert len(panels) == 3
    np.testing.assert_allclose(boxes[:, 1:], boxes[:1, 1:].repeat(3, 0), atol=0.5)
