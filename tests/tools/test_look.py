from contextlib import contextmanager

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image

from swin_mm.models.swin import SwinPyramid, SwinPyramidV2
from swin_mm.ops.attention import reference
from swin_mm.ops.windows import padded_size

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
def test_numbers_are_equal_where_tokens_see_each_other(tool, size, window, shift):
    whole = padded_size(size, window)
    found = tool('look').visible(size, window, shift)
    assert found.shape == whole
    # Attention of equal scores, spread back onto the map: what each token gets of every other.
    eye = torch.eye(whole[0] * whole[1]).view(1, *whole, -1)
    zero = torch.zeros_like(eye)
    count = window[0] * window[1]
    qkv, pad = torch.cat([zero, zero, eye], -1), torch.zeros(3 * eye.shape[-1])
    seen = reference.attention(qkv, pad, torch.zeros(1, count, count), window, shift, 1.0)[0].flatten(0, 1) > 1e-6
    assert ((found.flatten()[:, None] == found.flatten()) == seen).all()


def test_parts_of_cut_windows(tool):
    look = tool('look')
    groups = look.visible((8, 12), (4, 4), (2, 2))
    parts = look.cut_parts(groups, (4, 4))
    assert look.borders(groups) == ([2, 6], [2, 6, 10])
    assert parts[2:6, 2:10].isnan().all(), 'whole windows are not cut'
    corners = [parts[7, 11], parts[7, 0], parts[0, 11], parts[0, 0]]  # of the window that joins all edges
    assert corners == [0, 1, 2, 3]
    assert (parts[2:6, 10:] == 0).all() and (parts[2:6, :2] == 1).all() and (parts[:2, 2:10] == 2).all()
    assert look.cut_parts(look.visible((8, 12), (4, 4), (0, 0)), (4, 4)).isnan().all()


@pytest.mark.parametrize('pyramid', PYRAMIDS)
@pytest.mark.parametrize('pad_small_map', [True, False])
@pytest.mark.parametrize('size, token', [((9, 10), (8, 9)), ((9, 10), (0, 5)), ((3, 5), (2, 1)), ((8, 8), (3, 3))])
def test_attention_is_what_the_block_computes_with(tool, pyramid, pad_small_map, size, token):
    block, x = block_of(pyramid, 4, pad_small_map=pad_small_map), torch.randn(1, *size, 16)
    window, shift = block.effective_window(size)
    caught, kernel = [], block.attn.attention_fn

    def attention_fn(*args):
        caught.append((args, kernel(*args)))
        return caught[0][1]

    block.attn.attention_fn = attention_fn
    found = torch.from_numpy(tool('look').attention_map(block, x, token))
    assert block.attn.attention_fn is attention_fn, 'the kernel is put back'
    (qkv, pad, *_), out = caught[0]
    whole = padded_size(size, window)
    assert found.shape == (2, *whole)
    torch.testing.assert_close(found.nansum((1, 2)), torch.ones(2))
    groups = tool('look').visible(size, window, shift)
    assert (found[0].isfinite() == (groups == groups[token])).all()

    values = pad[32:].expand(*whole, 16).clone()
    values[: size[0], : size[1]] = qkv[0, ..., 32:]
    expected = torch.einsum('hij,ijhd->hd', found.nan_to_num(), values.unflatten(-1, (2, 8))).flatten()
    torch.testing.assert_close(expected, out[0, token[0], token[1]])


@pytest.mark.parametrize('pyramid', PYRAMIDS)
def test_bias_map_is_the_bias_by_offset(tool, pyramid):
    block = block_of(pyramid, (3, 4))
    found = tool('look').bias_map(block)
    assert found.shape == (2, 5, 7)
    with torch.no_grad():
        bias = block.attn.position_bias((3, 4)).numpy()
    for query in range(12):
        for key in range(12):
            down, right = key // 4 - query // 4, key % 4 - query % 4
            np.testing.assert_allclose(found[:, 2 + down, 3 + right], bias[:, query, key])


def test_what_is_watched(tool):
    model = SwinPyramid(embed_dims=16, depths=(2, 3), num_heads=(1, 1), strides=(4, 2), out_indices=(1,)).eval()
    image = torch.randn(1, 3, 45, 62)
    first, second = tool('look').watch(model, image, -2)
    assert (first.stride, second.stride) == (4, 8) and (first.size, second.size) == ((12, 16), (6, 8))
    assert first.output is None and torch.equal(second.output, model(image)[0][0])
    torch.testing.assert_close(model.norm1(second.left)[0].permute(2, 0, 1), second.output)
    assert second.block is model.layers[1].blocks[1]
    with torch.no_grad():
        torch.testing.assert_close(model.layers[1].blocks[2](second.block(second.entered)), second.left)
    assert not model.layers[0]._forward_hooks and not second.block._forward_pre_hooks


def test_what_is_drawn_lies_where_it_belongs(tool, monkeypatch):
    look, figures = tool('look'), []

    @contextmanager
    def kept(path, width, height):
        figures.append(Figure((width, height)))
        yield figures[-1]

    monkeypatch.setattr(look, 'figure', kept)
    options = dict(embed_dims=16, depths=(2,), num_heads=(2,), strides=(4,), out_indices=(0,))
    model = SwinPyramid(**options, window_size=(3, 4)).eval()
    (stage,) = look.watch(model, torch.randn(1, 3, 37, 42), -1)  # 10 × 11 tokens, 12 × 12 with padding
    picture = np.random.default_rng(0).integers(0, 256, (37, 42, 3), dtype=np.uint8)
    look.draw_windows('windows', picture, [stage])
    look.draw_attention('attention', picture, stage, (5, 30), 'stage 0')  # x, y: row 7, column 1
    look.draw_bias('bias', stage.block, 'stage 0')
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
    expected = look.attention_map(stage.block, stage.entered, (7, 1))
    assert np.isfinite(expected[0]).nonzero()[0].tolist() == [7] * 2 + [8] * 2 + [9] * 2
    seen, (token,) = panels['a token (cross) and what it sees'].patches[1], panels['head 1'].patches[1:]
    assert (seen.get_xy(), seen.get_width(), seen.get_height()) == ((0, 7), 2, 3)
    assert (token.get_xy(), token.get_width(), token.get_height()) == ((1, 7), 1, 1)
    for title, values in (('head 1', expected[1]), ('mean of the heads', expected.mean(0))):
        image = panels[title].images[-1]
        left, right, bottom, top = image.get_extent()
        np.testing.assert_array_equal(image.get_array().filled(np.nan), values[top:bottom, left:right])
    assert bias.axes[1].images[0].get_extent() == [-3.5, 3.5, 2.5, -2.5]
    np.testing.assert_array_equal(bias.axes[1].images[0].get_array(), look.bias_map(stage.block)[1])


def test_principal_components(tool):
    random = np.random.default_rng(0)
    strengths = random.normal(size=(3, 20, 30)) * np.array([9, 3, 1])[:, None, None]
    features = np.einsum('ck,kij->cij', np.linalg.qr(random.normal(size=(8, 3)))[0], strengths)
    colours, shares = tool('look').principal_colours(torch.tensor(features))
    values = np.linalg.svd((features.reshape(8, -1).T - features.reshape(8, -1).mean(1)), compute_uv=False)[:3] ** 2
    np.testing.assert_allclose(shares, values / values.sum(), atol=1e-9)
    for strength, colour in zip(strengths, np.moveaxis(colours, -1, 0), strict=True):
        inside = (colour > 0) & (colour < 1)
        assert abs(np.corrcoef(strength[inside], colour[inside])[0, 1]) > 0.98
    for equal in (torch.ones(8, 1, 1), torch.ones(8, 4, 5)):
        colours, shares = tool('look').principal_colours(equal)
        assert (colours == 0.5).all() and (shares == 0).all()


@pytest.mark.parametrize('count, grid', [(1, (1, 1)), (3, (1, 3)), (4, (2, 2)), (6, (2, 3)), (24, (4, 6)), (5, (1, 5))])
def test_panels_leave_no_gaps(tool, count, grid):
    assert tool('look').grid_of(count) == grid


@pytest.fixture
def photo(tmp_path):
    """A picture whose pixels all differ from their neighbours, as PNG."""
    path = tmp_path / 'photo.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path)
    return path


def test_image_is_prepared_as_the_config_says(tool, photo):
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
        picture, image, given = tool('look').read_image(cfg, str(photo), None)
        assert given == (60, 40) and (picture == rgb).all()
        np.testing.assert_allclose(image[0].permute(1, 2, 0), (channels - mean) / std, rtol=1e-5)
    for size in ((1000, 80), 80):  # an integer is the side of a square
        pipeline = [dict(type='LoadImageFromFile'), dict(type='mmdet.Resize', scale=size)]
        cfg.test_dataloader = dict(dataset=dict(pipeline=pipeline))
        picture, image, given = tool('look').read_image(cfg, str(photo), None)
        expected = (80, 120) if size != 80 else (53, 80)
        assert given == (60, 40) and picture.shape[:2] == expected and image.shape == (1, 3, *expected)


@pytest.fixture
def weights(tiny, tmp_path):
    """Of the whole tiny model."""
    cfg = Config.fromfile(tiny.config)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    path = tmp_path / 'weights.pth'
    torch.save({'state_dict': model.state_dict()}, path)
    return path, model


def call(tool, monkeypatch, *arguments):
    look = tool('look')
    monkeypatch.setattr('sys.argv', ['look', *map(str, arguments)])
    return look.cli.run(look.main, look.parse_args())


def test_pictures(tool, tiny, photo, weights, tmp_path, monkeypatch, capsys):
    path, model = weights
    look = tool('look')
    backbone = look.build(Config.fromfile(tiny.config), str(path))
    expected = model.backbone.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in backbone.state_dict().items())

    # The point is one of the photo, not of what it is scaled to.
    asked = []
    monkeypatch.setattr(look, 'draw_attention', lambda *args: asked.append(args[3]))
    monkeypatch.setattr('sys.argv', ['look', str(tiny.config), str(photo), str(path), '--out', 'x', '--point', '59,3'])
    monkeypatch.setattr(look, 'figure', pytest.fail)
    monkeypatch.setattr(look, 'draw_features', lambda *_: None)
    monkeypatch.setattr(look, 'draw_windows', lambda *_: None)
    monkeypatch.setattr(look, 'draw_bias', lambda *_: None)
    look.main(look.parse_args())
    assert asked == [(94, 4)] * 4  # 60 × 40 fits (96, 64) as 96 × 64
    capsys.readouterr()

    out = tmp_path / 'looks'
    assert call(tool, monkeypatch, tiny.config, photo, path, '--out', out) == 0
    printed = capsys.readouterr()
    assert 'random' not in printed.err and f'written: {out}' in printed.out
    names = {'features', 'windows'} | {f'{kind}_stage{i}' for kind in ('attention', 'bias') for i in range(4)}
    assert {file.name for file in out.iterdir()} == {f'{name}.png' for name in names}
    for file in out.iterdir():
        with Image.open(file) as picture:
            assert min(picture.info['dpi']) >= 150 and len(np.unique(np.asarray(picture.convert('L')))) > 20


def test_random_weights_are_announced(tool, tiny, monkeypatch, capsys):
    tool('look').build(Config.fromfile(tiny.config), None)
    assert 'the weights are random' in capsys.readouterr().err


def test_bad_input_is_named(refuse, tiny, photo, tmp_path):
    assert 'image none.jpg cannot be read' in refuse('look', tiny.config, 'none.jpg', '--out', 'x')
    (tmp_path / 'text.jpg').write_text('no image')
    assert 'image text.jpg cannot be decoded' in refuse('look', tiny.config, 'text.jpg', '--out', 'x')
    assert '--point 60,3 is outside of the image, which has 60 × 40 pixels' in refuse(
        'look', tiny.config, photo, '--point', '60,3', '--out', 'x'
    )
    assert '--size 0x5: expected numbers from 1 up' in refuse('look', tiny.config, photo, '--size', '0x5', '--out', 'x')
    assert 'text.jpg/features.png cannot be written' in refuse('look', tiny.config, photo, '--out', 'text.jpg')
    assert "--size 64: expected two whole numbers with 'x'" in refuse(
        'look', tiny.config, photo, '--size', '64', '--out', 'x'
    )
    assert '--block 1: stage 0 has 1 blocks' in refuse('look', tiny.config, photo, '--block', '1', '--out', 'x')
    assert 'checkpoint none.pth' in refuse('look', tiny.config, photo, 'none.pth', '--out', 'x')
    (tmp_path / 'resnet.py').write_text(
        "default_scope = 'mmdet'\nmodel = dict(backbone=dict(type='ResNet', depth=18))\n"
    )
    assert 'has the backbone ResNet' in refuse('look', 'resnet.py', photo, '--out', 'x')
    (tmp_path / 'no_model.py').write_text('a = 1\n')
    assert 'no_model.py has no model.backbone' in refuse('look', 'no_model.py', photo, '--out', 'x')
