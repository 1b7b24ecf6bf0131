"""tools/convert_checkpoint.py, run as users run it."""

import hashlib
import runpy
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from support.oracles import SMALL, randomise

import swin_mm
from swin_mm.cli import run

TOOL = Path(__file__).parents[2] / 'tools' / 'convert_checkpoint.py'


@pytest.fixture
def convert(monkeypatch, capsys):
    """The tool in this process, which saves starting one each time: arguments to (exit code, output, errors)."""
    tool = runpy.run_path(str(TOOL))

    def call(*args: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, 'argv', [str(TOOL), *map(str, args)])
        code = run(tool['main'], tool['parse_args']())
        return code, *capsys.readouterr()

    return call


@pytest.fixture(scope='module')
def file(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp('weights') / 'swin-00000000.pth'
    state = randomise(swin_mm.SwinTransformer(**SMALL, window_size=5)).state_dict()
    torch.save({'state_dict': {f'backbone.{k}': v for k, v in state.items()}, 'optimizer': {}}, path)
    return path


def test_there_and_back(convert, file, tmp_path):
    command = [sys.executable, TOOL, file, tmp_path / 'there.safetensors', '--to', 'mmdet']
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert 'backbone.stages.0.downsample.reduction.weight' in load_file(tmp_path / 'there.safetensors')
    code, out, _ = convert(tmp_path / 'there.safetensors', tmp_path / 'back.pth', '--to', 'swin_mm')
    assert code == 0
    back, before = (torch.load(path)['state_dict'] for path in (tmp_path / 'back.pth', file))
    assert back.keys() == before.keys()
    assert all(torch.equal(back[key], value) for key, value in before.items())
    digest = hashlib.sha256((tmp_path / 'back.pth').read_bytes()).hexdigest()
    assert f'SHA-256  {digest}\n' in out


def test_inspect_tells_what_a_file_is(convert, file):
    code, out, _ = convert(file, '--inspect')
    assert code == 0
    rows = dict(line.strip().split('  ', 1) for line in out.splitlines()[1:])
    rows = {name: value.strip() for name, value in rows.items()}
    assert rows['size'] == f'{file.stat().st_size:,} bytes'
    assert 'NOT 00000000 as the name says' in rows['SHA-256']
    assert rows['naming'] == "official, under 'backbone.'"
    assert rows['model'] == 'Swin V1 with embed_dims=32, depths=(2, 2, 2, 2), num_heads=(1, 2, 4, 8)'
    assert rows['window'] == '5'
    assert rows['classes'] == 'no classification head'
    assert rows['output norms'] == 'norm0, norm1, norm2, norm3'
    assert rows['parameters of the backbone'] == f'{sum(v.numel() for v in torch.load(file)["state_dict"].values()):,}'
    assert rows['beside the weights'] == 'optimizer'


def test_bad_input_is_one_line_and_writes_nothing(convert, file, tmp_path):
    there = tmp_path / 'there.pth'
    there.write_bytes(b'kept')
    resnet = tmp_path / 'resnet.pth'
    torch.save({'layer1.0.conv1.weight': torch.ones(1)}, resnet)
    for args, message in {
        (file,): 'give either SRC DST --to NAMING, or SRC --inspect',
        (file, there, '--to', 'timm'): 'exists already',
        (file, tmp_path / 'new.onnx', '--to', 'timm'): 'must end in',
        (tmp_path / 'none.pth', '--inspect'): 'does not exist',
        (resnet, tmp_path / 'new.pth', '--to', 'timm'): 'nothing in the checkpoint fits',
        (file, tmp_path / 'new.pth', '--to', 'timm', '--window', '7', '7'): '--window takes 1 or 4 numbers',
    }.items():
        code, _, errors = convert(*args)
        assert code == 2
        assert message in errors and errors.count('\n') == 1, errors
    assert there.read_bytes() == b'kept'
    assert {path.name for path in tmp_path.iterdir()} == {'there.pth', 'resnet.pth'}
    assert convert(file, there, '--to', 'timm', '--force')[0] == 0
    assert 'layers.1.downsample.reduction.weight' in torch.load(there)
