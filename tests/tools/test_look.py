import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image

from swin_mm.kernels import reference
from swin_mm.swin import SwinPyramid, SwinPyramidV2
from swin_mm.windows import padded

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
    whole = padded(size, window)
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
    window, shift = block.fit(size)
    caught, kernel = [], block.attn.attend

    def attend(*args):
        caught.append((args, kernel(*args)))
        return caught[0][1]

    block.attn.attend = attend
    found = torch.from_numpy(tool('look').attention_map(block, x, token))
    assert block.attn.attend is attend, 'the kernel is put back'
    (qkv, pad, *_), out = caught[0]
    whole = padded(size, window)
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


@pytest.fixture
def photo(tmp_path):
    """A picture whose pixels all differ from their neighbours, as PNG."""
    path = tmp_path / 'photo.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path)
    return path


def test_image_is_prepared_as_the_config_says(tool, photo):
    mean, std = [10.0, 20.0, 30.0], [2.0, 4.0, 8.0]
    rgb = np.array(Image.open(photo)).astype(np.float32)
    for swap, channels in ((True, rgb), (False, rgb[..., ::-1])):
        cfg = Config(
            dict(model=dict(data_preprocessor=dict(type='Any', mean=mean, std=std, bgr_to_rgb=swap, pad_val=0)))
        )
        picture, image, scale = tool('look').read_image(cfg, str(photo), None)
        assert scale == 1 and (picture == rgb).all()
        np.testing.assert_allclose(image[0].permute(1, 2, 0), (channels - mean) / std, rtol=1e-5)
    picture, image, scale = tool('look').read_image(cfg, str(photo), (1000, 80))
    assert scale == 2 and picture.shape == (80, 120, 3) and image.shape == (1, 3, 80, 120)


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
    assert [list(point) for point in asked] == [[94, 4]] * 4  # 60 × 40 fits (96, 64) as 96 × 64
    capsys.readouterr()

    out = tmp_path / 'looks'
    assert call(tool, monkeypatch, tiny.config, photo, path, '--out', out) == 0
    printed = capsys.readouterr()
    assert 'random' not in printed.err
    names = {'features', 'windows'} | {f'{kind}_stage{i}' for kind in ('attention', 'bias') for i in range(4)}
    assert {file.name for file in out.iterdir()} == {f'{name}.png' for name in names}
    for file in out.iterdir():
        assert str(file) in printed.out
        with Image.open(file) as picture:
            assert min(picture.info['dpi']) >= 150 and len(np.unique(np.asarray(picture.convert('L')))) > 20


def test_random_weights_are_announced(tool, tiny, monkeypatch, capsys):
    tool('look').build(Config.fromfile(tiny.config), None)
    assert 'the weights are random' in capsys.readouterr().err


def test_bad_input_is_named(refuse, tiny, photo, tmp_path):
    assert 'image none.jpg cannot be read' in refuse('look', tiny.config, 'none.jpg', '--out', 'x')
    (tmp_path / 'text.jpg').write_text('no image')
    assert 'image text.jpg cannot be decoded' in refuse('look', tiny.config, 'text.jpg', '--out', 'x')
    assert '--point 60,3 is outside' in refuse('look', tiny.config, photo, '--point', '60,3', '--out', 'x')
    assert "--size 64: expected two whole numbers with 'x'" in refuse(
        'look', tiny.config, photo, '--size', '64', '--out', 'x'
    )
    assert '--block 1: stage 0 has 1 blocks' in refuse('look', tiny.config, photo, '--block', '1', '--out', 'x')
    assert 'checkpoint none.pth' in refuse('look', tiny.config, photo, 'none.pth', '--out', 'x')
    (tmp_path / 'resnet.py').write_text(
        "default_scope = 'mmdet'\nmodel = dict(backbone=dict(type='ResNet', depth=18))\n"
    )
    assert 'has the backbone ResNet' in refuse('look', 'resnet.py', photo, '--out', 'x')
