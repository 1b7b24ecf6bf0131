"""tools/look.py: options, output files and errors."""

import numpy as np
import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from PIL import Image

from swin_mm import cli
from swin_mm.analysis import attention_maps


@pytest.fixture
def photo(tmp_path):
    """A PNG of 60 × 40 pixels of noise."""
    path = tmp_path / 'photo.png'
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 60, 3), dtype=np.uint8)).save(path)
    return path


@pytest.fixture
def weights(tiny, tmp_path):
    """A checkpoint of the whole tiny model, and the model."""
    cfg = Config.fromfile(tiny.config)
    init_default_scope(cfg.default_scope)
    model = MODELS.build(cfg.model)
    path = tmp_path / 'weights.pth'
    torch.save({'state_dict': model.state_dict()}, path)
    return path, model


@pytest.fixture
def look(tool, monkeypatch):
    """Run the tool in this process and return its exit code."""

    def call(*arguments):
        module = tool('look')
        monkeypatch.setattr('sys.argv', ['look', *map(str, arguments)])
        return cli.run(module.main, module.parse_args())

    return call


def test_writes_all_figures(look, tiny, photo, weights, tmp_path, capsys, caplog):
    path, model = weights
    backbone = attention_maps.build_backbone(Config.fromfile(tiny.config), str(path))
    expected = model.backbone.state_dict()
    assert all(torch.equal(tensor, expected[key]) for key, tensor in backbone.state_dict().items())

    out = tmp_path / 'looks'
    assert look(tiny.config, photo, path, '--out', out) == 0
    assert 'random' not in caplog.text and f'written: {out}' in capsys.readouterr().out
    names = {'features', 'windows'} | {f'{kind}_stage{i}' for kind in ('attention', 'bias') for i in range(4)}
    assert {file.name for file in out.iterdir()} == {f'{name}.png' for name in names}
    for file in out.iterdir():
        with Image.open(file) as picture:
            assert min(picture.info['dpi']) >= 150 and len(np.unique(np.asarray(picture.convert('L')))) > 20


def test_the_point_is_a_pixel_of_the_file(look, tiny, photo, weights, tmp_path, monkeypatch):
    points = []
    monkeypatch.setattr(attention_maps, 'draw_attention', lambda *args: points.append(args[3]))
    for name in ('draw_features', 'draw_windows', 'draw_position_bias'):
        monkeypatch.setattr(attention_maps, name, lambda *_: None)
    assert look(tiny.config, photo, weights[0], '--out', tmp_path, '--point', '59,3') == 0
    assert points == [(94, 4)] * 4  # 60 × 40 fits (96, 64) as 96 × 64


def test_random_weights_are_announced(tiny, caplog):
    attention_maps.build_backbone(Config.fromfile(tiny.config), None)
    assert 'the weights are random' in caplog.text


def test_bad_input_is_named(refuse, tiny, photo, tmp_path):
    assert 'image none.jpg cannot be read' in refuse('look', tiny.config, 'none.jpg', '--out', 'x')
    (tmp_path / 'text.jpg').write_text('no image')
    assert 'image text.jpg cannot be' in refuse('look', tiny.config, 'text.jpg', '--out', 'x')
    (tmp_path / 'half.png').write_bytes(photo.read_bytes()[:2000])
    assert 'image half.png cannot be read: image file is truncated' in refuse(
        'look', tiny.config, 'half.png', '--out', 'x'
    )
    assert 'point 60,3 is outside the image, which is 60 × 40 pixels' in refuse(
        'look', tiny.config, photo, '--point', '60,3', '--out', 'x'
    )
    assert '--size 0x5: expected numbers from 1 up' in refuse('look', tiny.config, photo, '--size', '0x5', '--out', 'x')
    assert 'text.jpg/features.png cannot be written' in refuse('look', tiny.config, photo, '--out', 'text.jpg')
    assert "--size 64: expected two whole numbers with 'x'" in refuse(
        'look', tiny.config, photo, '--size', '64', '--out', 'x'
    )
    assert 'block 1: stage 0 has 1 blocks' in refuse('look', tiny.config, photo, '--block', '1', '--out', 'x')
    assert 'checkpoint none.pth' in refuse('look', tiny.config, photo, 'none.pth', '--out', 'x')
    (tmp_path / 'resnet.py').write_text(
        "default_scope = 'mmdet'\nmodel = dict(backbone=dict(type='ResNet', depth=18))\n"
    )
    assert 'has the backbone ResNet' in refuse('look', 'resnet.py', photo, '--out', 'x')
    (tmp_path / 'no_model.py').write_text('a = 1\n')
    assert 'no_model.py has no model.backbone' in refuse('look', 'no_model.py', photo, '--out', 'x')
