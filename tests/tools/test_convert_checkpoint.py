"""tools/convert_checkpoint.py, run as users run it."""

import hashlib
import importlib
import json
import os
import re
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS
from safetensors.torch import load_file
from support.oracles import SMALL, randomise, relative_error

import swin_mm
from swin_mm.cli import run

TOOL = Path(__file__).parents[2] / 'tools' / 'convert_checkpoint.py'


@pytest.fixture
def convert(monkeypatch, capsys):
    """The tool in this process, which saves starting one each time: arguments to (exit code, output, errors)."""
    tool = importlib.import_module('tools.convert_checkpoint')

    def call(*args: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, 'argv', [str(TOOL), *map(str, args)])
        code = run(tool.main, tool.parse_args())
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


def test_the_inspected_config_line_can_be_pasted(convert, file, tmp_path):
    """Also for unusual sizes: it builds a backbone that the file fits."""
    odd = {'embed_dims': 24, 'depths': (1, 1, 2), 'num_heads': (1, 2, 4), 'in_channels': 4, 'patch_size': 2}
    odd |= {'strides': (2, 2, 2), 'out_indices': (0, 1, 2), 'window_size': 5}
    torch.save(swin_mm.SwinTransformer(**odd).state_dict(), tmp_path / 'odd.pth')
    second = swin_mm.SwinTransformerV2(**SMALL, window_size=8).state_dict()
    torch.save(second, tmp_path / 'v2.pth')
    for source in (file, tmp_path / 'odd.pth', tmp_path / 'v2.pth'):
        line = re.search(r'as backbone +(dict.*)', convert(source, '--inspect')[1])[1]
        assert '...' not in line
        if source.name == 'odd.pth':
            line = line[:-1] + ', out_indices=(0, 1, 2))'  # what a file of three stages cannot tell
        (tmp_path / 'config.py').write_text(f'backbone = {line}\n')
        model = MODELS.build(Config.fromfile(tmp_path / 'config.py').backbone)
        model.init_cfg = {'type': 'Pretrained', 'checkpoint': str(source)}
        model.init_weights()
        assert model.load_report.complete and not model.load_report.resized


@pytest.mark.parametrize('version', [1, 2])
def test_transformers_reads_the_folder_that_is_written(convert, tmp_path, version):
    transformers = pytest.importorskip('transformers')
    source, window = tmp_path / 'swin.pth', 7 + version - 1
    backbone = (swin_mm.SwinTransformer, swin_mm.SwinTransformerV2)[version - 1]
    model = randomise(backbone(**SMALL, window_size=window)).eval()
    classifier = {key: value for key, value in model.state_dict().items() if not key.startswith('norm')}
    classifier |= {'norm.weight': torch.rand(256), 'norm.bias': torch.rand(256)}
    classifier |= {'head.weight': torch.rand(5, 256), 'head.bias': torch.rand(5)}
    image, family = torch.rand(1, 3, 32 * window, 32 * window), f'Swin{"v2" * (version - 1)}'
    for name, state in {'backbone': model.state_dict(), 'classifier': classifier}.items():
        if (name, version) == ('backbone', 2):
            continue  # its backbone has no output norms
        torch.save(state, source)
        folder = tmp_path / name
        folder.mkdir()
        args = (source, folder / 'model.safetensors', '--to', 'transformers', '--window', str(window))
        code, out, errors = convert(*args)
        assert code == 0, errors
        assert f'config  {folder / "config.json"}' in re.sub(' +', '  ', out).replace('  /', '  /')
        if name == 'backbone':
            theirs, info = transformers.SwinBackbone.from_pretrained(folder, output_loading_info=True)
            features = theirs.eval()(image).feature_maps
        else:
            theirs, info = getattr(transformers, f'{family}Model').from_pretrained(folder, output_loading_info=True)
            features = theirs.eval()(image, output_hidden_states=True).reshaped_hidden_states
            whole = getattr(transformers, f'{family}ForImageClassification').from_pretrained(folder)
            assert whole(image).logits.shape == (1, 5)
        # Version 4 counts its index tables, which are computed.
        missing = [key for key in info['missing_keys'] if not key.endswith('relative_position_index')]
        assert not missing and not info['mismatched_keys']
        with torch.no_grad():
            if name == 'backbone':
                ours = model(image)
                assert relative_error(ours, features) < 1e-5
            else:  # the last map has no shift there
                plain = backbone(**SMALL, window_size=window, pad_small_map=False).eval()
                plain.load_state_dict(model.state_dict())
                for i in range(4):
                    setattr(plain, f'norm{i}', torch.nn.Identity())
                maps = plain(image)
                merged = [plain.layers[i].downsample(maps[i].permute(0, 2, 3, 1)).permute(0, 3, 1, 2) for i in range(3)]
                assert relative_error([*merged, maps[3]], features[1:]) < 1e-5
        assert json.loads((folder / 'config.json').read_text())['window_size'] == window
        assert convert(*args)[0] == 2
        assert convert(*args, '--force')[0] == 0


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


def test_force_keeps_the_mode_and_a_full_disk_keeps_the_file(convert, file, tmp_path):
    there = tmp_path / 'there.pth'
    there.write_bytes(b'kept')
    there.chmod(0o640)
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    for name in ('there.pth', 'new.safetensors'):
        resource.setrlimit(resource.RLIMIT_FSIZE, (10_000, before[1]))
        try:
            code, _, errors = convert(file, tmp_path / name, '--to', 'mmdet', '--force')
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, before)
        assert (code, errors.count('\n')) == (2, 1)
        assert f'{name} cannot be written' in errors
    assert there.read_bytes() == b'kept' and os.listdir(tmp_path) == ['there.pth']
    assert convert(file, there, '--to', 'mmdet', '--force')[0] == 0
    assert there.stat().st_mode & 0o777 == 0o640


@pytest.mark.parametrize('suffix', ['.pth', '.safetensors'])
def test_file_names_need_not_be_text(convert, file, tmp_path, suffix):
    folder = tmp_path / os.fsdecode(b'\xff\xfe')
    folder.mkdir()
    code, out, errors = convert(file, folder / f'a{suffix}', '--to', 'timm')
    assert code == 0, errors
    assert r'\xff\xfe' in out
    assert convert(folder / f'a{suffix}', '--inspect')[0] == 0
