"""tools/export.py: the files, run by what reads them, against the model."""

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from safetensors.torch import load_file
from support.oracles import mmdet_twin, randomise
from support.tool_fixtures import ROOT, SMALL_BACKBONE, make_tiny
from torch import nn

import swin_mm  # noqa: F401 (registers the backbones)
from swin_mm import cli

BACKBONE = dict(embed_dims=16, depths=[2, 1], num_heads=[1, 2], strides=[4, 2], out_indices=[0, 1])
VARIANTS = {
    'v1': dict(type='swin_mm.SwinTransformer', window_size=7),
    'v2': dict(type='swin_mm.SwinTransformerV2', window_size=8),
}
# Neither of these is a size that the tool compares at; the second is a single window.
SIZES = ((2, 59, 88), (1, 27, 20), (1, 64, 56), (1, 1, 30))


@pytest.fixture(params=VARIANTS)
def variant(request):
    return request.param


def make(folder, model=None, **options):
    """A config with a tiny backbone, its checkpoint, and the model itself, or one with the same arguments."""
    backbone = BACKBONE | options
    config, checkpoint = folder / 'config.py', folder / 'weights.pth'
    config.write_text(f'model = dict(backbone={backbone})\n')
    model = model or randomise(MODELS.build(backbone)).eval()
    torch.save({'state_dict': {f'backbone.{key}': value for key, value in model.state_dict().items()}}, checkpoint)
    return config, checkpoint, model


@pytest.fixture
def export(tool, monkeypatch):
    """Call the tool in this process: arguments to exit code."""
    module = tool('export')
    monkeypatch.setattr(module, 'SIZES', ((1, 40, 61), (2, 28, 28)))

    def call(*arguments):
        monkeypatch.setattr('sys.argv', ['export', *map(str, arguments)])
        return cli.run(module.main, module.parse_args())

    return call


def leftovers(file):
    """Places in source files of this machine."""
    content = file.read_bytes()
    return [part for part in (b'swin_mm/', b'site-packages', b'test_export', b'fx_node') if part in content]


def read(file):
    """An exported file as a function of an image; none of its operators may be the project's."""
    if file.suffix == '.pt2':
        program = torch.export.load(file)
        assert not [node for node in program.graph.nodes if 'swin' in str(node.target)]
        assert not leftovers(file)
        return program.module()
    if file.suffix == '.pt':
        return torch.jit.load(file)
    onnx, runtime = pytest.importorskip('onnx'), pytest.importorskip('onnxruntime')
    assert [(opset.domain, opset.version) for opset in onnx.load(file).opset_import] == [('', 20)]
    assert not leftovers(file)
    session = runtime.InferenceSession(file)
    return lambda image: [torch.from_numpy(output) for output in session.run(None, {'image': image.numpy()})]


@torch.no_grad()
def same(file, model, sizes):
    run = read(file)
    for batch, height, width in sizes:
        image = torch.randn(batch, 3, height, width)
        torch.testing.assert_close(list(run(image)), list(model(image)), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize('to, suffix', [('torch.export', 'pt2'), ('onnx', 'onnx')])
def test_any_size(export, tmp_path, variant, to, suffix):
    if to == 'onnx':
        pytest.importorskip('onnxscript')
    # V1 is compared with mmdet's, whose weights the file then has.
    model = mmdet_twin(**BACKBONE, window_size=7)[0] if variant == 'v1' else None
    config, checkpoint, model = make(tmp_path, model, **VARIANTS[variant])
    assert export(config, checkpoint, '--to', to, '--out', tmp_path / f'swin.{suffix}') == 0
    same(tmp_path / f'swin.{suffix}', model, SIZES)
    assert {path.name for path in tmp_path.iterdir()} == {'config.py', 'weights.pth', f'swin.{suffix}'}


@pytest.mark.parametrize('pads, least', [(True, 1), (False, 57)])
def test_windows_that_shrink_give_a_smallest_size(tool, tmp_path, pads, least):
    model = make(tmp_path, **VARIANTS['v1'], pad_small_map=pads)[2]
    assert tool('export').smallest(model) == least  # the last stage has a stride of 8 and windows of 7


@pytest.mark.slow
def test_windows_that_shrink(export, tmp_path):
    config, checkpoint, model = make(tmp_path, **VARIANTS['v1'], pad_small_map=False)
    assert export(config, checkpoint, '--to', 'torch.export', '--out', tmp_path / 'swin.pt2') == 0
    same(tmp_path / 'swin.pt2', model, [(1, 57, 80)])
    with pytest.raises((RuntimeError, AssertionError)):  # and no wrong answer
        torch.export.load(tmp_path / 'swin.pt2').module()(torch.zeros(1, 3, 56, 80))


def test_torchscript_of_one_size(export, tmp_path):
    config, checkpoint, model = make(tmp_path, **VARIANTS['v1'], pad_small_map=False)
    assert export(config, checkpoint, '--to', 'torchscript', '--out', tmp_path / 'swin.pt', '--size', '41x26') == 0
    same(tmp_path / 'swin.pt', model, [(3, 26, 41)])


def test_safetensors(export, tmp_path, variant):
    config, checkpoint, model = make(tmp_path, **VARIANTS[variant])
    assert export(config, checkpoint, '--to', 'safetensors', '--out', tmp_path / 'swin.safetensors') == 0
    state = load_file(tmp_path / 'swin.safetensors')
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_any_backbone(export, tmp_path):
    config, checkpoint, model = make(tmp_path, MODELS.build(dict(type='mmdet.ResNet', depth=18)))
    config.write_text("model = dict(backbone=dict(type='mmdet.ResNet', depth=18))")
    assert export(config, checkpoint, '--to', 'safetensors', '--out', tmp_path / 'resnet.safetensors') == 0
    assert torch.equal(load_file(tmp_path / 'resnet.safetensors')['conv1.weight'], model.state_dict()['conv1.weight'])


def test_a_wrong_weight_is_seen_and_leaves_nothing(export, tmp_path, monkeypatch):
    config, checkpoint, _ = make(tmp_path, **VARIANTS['v1'])
    load = torch.jit.load

    def damaged(file):
        loaded = load(file)
        next(value for name, value in loaded.named_parameters() if name.endswith('fc1.bias')).data[3] += 0.1
        return loaded

    monkeypatch.setattr(torch.jit, 'load', damaged)
    with pytest.raises(SystemExit, match='differs from PyTorch'):
        export(config, checkpoint, '--to', 'torchscript', '--out', tmp_path / 'swin.pt', '--size', '40x40')
    assert {path.name for path in tmp_path.iterdir()} == {'config.py', 'weights.pth'}


def test_bad_input(refuse, tmp_path):
    config, checkpoint, _ = make(tmp_path, **VARIANTS['v1'])
    (tmp_path / 'there.onnx').touch()
    for rest, message in {
        ('--to', 'onnx', '--out', 'swin.pt2'): 'must end in .onnx',
        ('--to', 'onnx', '--out', 'no/swin.onnx'): 'the folder no does not exist',
        ('--to', 'onnx', '--out', 'weights.pth/swin.onnx'): 'the folder weights.pth does not exist',
        ('--to', 'onnx', '--out', 'there.onnx'): 'exists',
        ('--to', 'onnx', '--out', 'swin.onnx', '--opset', '9'): '--opset 9',
        ('--to', 'torch.export', '--out', 'swin.pt2', '--opset', '20'): '--opset 20: of ONNX',
        ('--to', 'torchscript', '--out', 'swin.pt'): 'give it with --size WxH',
        ('--to', 'torchscript', '--out', 'swin.pt', '--size', '40'): "--size 40: expected two whole numbers with 'x'",
        ('--to', 'safetensors', '--out', 'swin.safetensors', '--size', '40x40'): 'leave --size out',
        ('--to', 'torch.export', '--out', 'swin.pt2', '--part', 'model'): 'cannot be built',
    }.items():
        assert message in refuse('export', config, checkpoint, *rest)
    torch.save({'state_dict': {'layers.0.blocks.0.norm1.weight': torch.ones(16)}}, checkpoint)
    refuse('export', config, checkpoint, '--to', 'torch.export', '--out', 'swin.pt2')


def test_unknown_part(export, tmp_path, capsys):
    with pytest.raises(SystemExit) as stopped:
        export('config.py', 'weights.pth', '--to', 'onnx', '--out', 'swin.onnx', '--part', 'neck')
    assert stopped.value.code == 2 and "invalid choice: 'neck'" in capsys.readouterr().err


def build(config, folder):
    """The model of a config, and its checkpoint in a folder."""
    cfg = Config.fromfile(config)
    init_default_scope(cfg.default_scope)
    model = randomise(MODELS.build(cfg.model)).eval()
    torch.save({'state_dict': model.state_dict()}, folder / 'weights.pth')
    return model


def whole(task, data, folder):
    """The tiny model of a task: config, checkpoint and model."""
    config = make_tiny(task, data, folder).config
    return config, folder / 'weights.pth', build(config, folder)


def test_two_stages_are_refused(refuse, data, tmp_path):
    config, checkpoint, _ = whole('detection', data, tmp_path)
    message = refuse('export', config, checkpoint, '--part', 'model', '--to', 'torch.export', '--out', 'swin.pt2')
    assert 'MaskRCNN chooses boxes between its two stages' in message


@pytest.mark.slow
@pytest.mark.parametrize('to, suffix', [('torch.export', 'pt2'), ('onnx', 'onnx')])
def test_a_whole_segmentor_at_any_size(export, data, tmp_path, to, suffix):
    config, checkpoint, model = whole('segmentation', data, tmp_path)
    file = tmp_path / f'swin.{suffix}'
    assert export(config, checkpoint, '--part', 'model', '--to', to, '--out', file) == 0
    same(file, lambda image: [model.encode_decode(image, [{'img_shape': image.shape[2:]}])], SIZES)


@pytest.mark.slow
def test_a_whole_one_stage_detector_at_any_size(export, tmp_path):
    config = tmp_path / 'config.py'
    config.write_text(
        f"_base_ = r'{ROOT}/configs/retinanet/retinanet_swin-t-p4-w7_fpn_adamw-1x_coco.py'\n"
        f'model = dict({SMALL_BACKBONE} neck=dict(in_channels=[32, 64, 128], out_channels=16), '
        'bbox_head=dict(in_channels=16, feat_channels=16, stacked_convs=1, num_classes=2))\n'
    )
    model = build(config, tmp_path)
    file = tmp_path / 'swin.onnx'
    assert export(config, tmp_path / 'weights.pth', '--part', 'model', '--to', 'onnx', '--out', file) == 0
    same(file, lambda image: [output for kind in model(image, mode='tensor') for output in kind], SIZES)


@pytest.mark.parametrize('size', [(1, 1), (2, 5), (6, 3), (7, 12), (13, 4)])
def test_pooling_as_products(tool, size):
    image = torch.randn(2, 3, *size, dtype=torch.double)
    for cells in (1, 3, (6, 2)):
        native = nn.AdaptiveAvgPool2d(cells)
        torch.testing.assert_close(tool('export').pool(native, image), native(image))
