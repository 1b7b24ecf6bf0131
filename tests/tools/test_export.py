"""tools/export.py: what it prints, and its errors."""

import json

import pytest
import torch
from mmengine.registry import MODELS
from support import export_models

import swin_mm  # noqa: F401 (registers the backbones)
from swin_mm import cli
from swin_mm.analysis.export import KEY, TOLERANCES

BACKBONE = dict(
    type='swin_mm.SwinTransformer', embed_dims=16, depths=[2, 1], num_heads=[1, 2], strides=[4, 2], out_indices=[0, 1]
)
BACKBONE_ONLY = ('--part', 'backbone')


@pytest.fixture
def files(tmp_path):
    """A config with a tiny backbone, and its checkpoint."""
    (tmp_path / 'config.py').write_text(f'model = dict(backbone={BACKBONE})\n')
    torch.save({'state_dict': MODELS.build(BACKBONE).state_dict()}, tmp_path / 'weights.pth')
    return tmp_path / 'config.py', tmp_path / 'weights.pth'


@pytest.fixture
def export(tool, monkeypatch):
    """Run the tool in this process and return its exit code."""

    def call(*arguments):
        module = tool('export')
        monkeypatch.setattr('sys.argv', ['export', *map(str, arguments)])
        monkeypatch.setenv('COLUMNS', '120')
        return cli.run(module.main, module.parse_args())

    return call


def test_prints_the_comparison(export, files, tmp_path, capsys):
    out = tmp_path / 'swin.pt'
    assert export(*files, '--to', 'torchscript', '--out', out, '--size', '41x26', *BACKBONE_ONLY) == 0
    text = capsys.readouterr().out
    assert 'torchscript against PyTorch' in text and '2×3×26×41' in text and 'stage1' in text
    assert f'{out}: {out.stat().st_size:,} bytes' in text


def test_a_difference_is_shown_and_exits_with_1(export, files, tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(TOLERANCES, 'largest difference / largest value', -1.0)
    with pytest.raises(SystemExit, match='error: torchscript differs from PyTorch: largest .*swin.pt is not written'):
        export(*files, '--to', 'torchscript', '--out', tmp_path / 'swin.pt', '--size', '41x26', *BACKBONE_ONLY)
    assert 'stage1' in capsys.readouterr().out and not (tmp_path / 'swin.pt').exists()


def test_bad_input(refuse, files):
    config, checkpoint = files
    one_size = ('--to', 'torchscript', '--out', 'swin.pt', '--size', '41x26')
    for rest, message in {
        ('--to', 'onnx', '--out', 'swin.pt2'): 'must end in .onnx',
        ('--to', 'onnx', '--out', 'weights.pth/swin.onnx'): 'the folder weights.pth does not exist',
        ('--to', 'torchscript', '--out', 'swin.pt', '--size', '40'): "--size 40: expected two whole numbers with 'x'",
        (*one_size, '--part', 'model'): 'cannot be built',
    }.items():
        assert message in refuse('export', config, checkpoint, *rest)
    torch.save({'state_dict': {'layers.0.blocks.0.norm1.weight': torch.ones(16)}}, checkpoint)
    message = refuse('export', config, checkpoint, *one_size, *BACKBONE_ONLY)
    assert 'checkpoint' in message and 'weights.pth' in message


def test_unknown_part(export, capsys):
    with pytest.raises(SystemExit) as stopped:
        export('config.py', 'weights.pth', '--to', 'onnx', '--out', 'swin.onnx', '--part', 'neck')
    assert stopped.value.code == 2 and "invalid choice: 'neck'" in capsys.readouterr().err


def test_a_whole_model_is_named_after_its_config_and_describes_itself(export, tmp_path, monkeypatch, capsys):
    pytest.importorskip('mmseg')
    config, checkpoint, _ = export_models.build('upernet', tmp_path)
    monkeypatch.chdir(tmp_path)
    options = ('--cfg-options', 'model.test_cfg.mode=slide')
    assert export(config, checkpoint, '--to', 'torchscript', '--size', '96x64', '--preprocess', *options) == 0
    text = capsys.readouterr().out
    assert 'labels' in text and '2×3×64×96' in text and 'share of pixels' in text
    assert 'the config tests by sliding windows' in text
    extra = {KEY: ''}
    model = torch.jit.load('upernet.pt', _extra_files=extra)
    (labels,) = model(torch.randint(0, 256, (1, 3, 64, 96), dtype=torch.uint8))
    assert labels.shape == (1, 64, 96) and labels.dtype == torch.int64
    metadata = json.loads(extra[KEY])
    assert metadata['task'] == 'semantic' and metadata['classes'] == list(export_models.CLASSES)
    assert metadata['outputs'] == ['labels'] and metadata['resize'] == {'scale': [2048, 512], 'keep_ratio': True}
