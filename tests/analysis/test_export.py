"""Exported files, run by the libraries that read them, against the model."""

import errno
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from mmengine.config import Config
from mmengine.registry import MODELS, init_default_scope
from safetensors.torch import load_file
from support.oracles import mmdet_twin, randomise
from support.tool_fixtures import ROOT, SMALL_BACKBONE, make_tiny
from torch import nn

import swin_mm  # noqa: F401 (registers the backbones)
from swin_mm.analysis.export import ExportDiffersError, check_arguments, export, formats
from swin_mm.analysis.export import run as run_module
from swin_mm.analysis.export.layers import AdaptivePool
from swin_mm.analysis.export.run import smallest_side
from swin_mm.analysis.export.whole import Exportable
from swin_mm.openmmlab.config import load_config
from swin_mm.utils.compat import EXPORTS, EXPORTS_ANY_SIZE
from swin_mm.utils.errors import InputError

needs_export = pytest.mark.skipif(not EXPORTS, reason='this torch is too old to export')
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


@pytest.fixture(autouse=True)
def few_sizes(monkeypatch):
    monkeypatch.setattr(run_module, 'SIZES', ((1, 40, 61), (2, 28, 28)))


def run(config, checkpoint, to, out, part='backbone', **options):
    """Export from files."""
    return export(load_config(config), str(checkpoint), to, out, part=part, **options)


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
@needs_export
def test_any_size(tmp_path, variant, to, suffix):
    if to == 'onnx':
        pytest.importorskip('onnxscript')
    # V1 is compared with mmdet's, whose weights the file then has.
    model = mmdet_twin(**BACKBONE, window_size=7)[0] if variant == 'v1' else None
    config, checkpoint, model = make(tmp_path, model, **VARIANTS[variant])
    if not EXPORTS_ANY_SIZE:
        with pytest.raises(InputError, match='before torch 2.13, give the size of the images with --size WxH'):
            run(config, checkpoint, to, tmp_path / f'swin.{suffix}')
        return
    assert run(config, checkpoint, to, tmp_path / f'swin.{suffix}')
    same(tmp_path / f'swin.{suffix}', model, SIZES)
    assert {path.name for path in tmp_path.iterdir()} == {'config.py', 'weights.pth', f'swin.{suffix}'}


@pytest.mark.parametrize('pads, least', [(True, 1), (False, 57)])
def test_windows_that_shrink_give_a_smallest_size(tmp_path, pads, least):
    model = make(tmp_path, **VARIANTS['v1'], pad_small_map=pads)[2]
    assert smallest_side(model) == least  # the last stage has a stride of 8 and windows of 7


@pytest.mark.slow
def test_windows_that_shrink(tmp_path):
    config, checkpoint, model = make(tmp_path, **VARIANTS['v1'], pad_small_map=False)
    assert run(config, checkpoint, 'torch.export', tmp_path / 'swin.pt2')
    same(tmp_path / 'swin.pt2', model, [(1, 57, 80)])
    with pytest.raises((RuntimeError, AssertionError)):  # and no wrong answer
        torch.export.load(tmp_path / 'swin.pt2').module()(torch.zeros(1, 3, 56, 80))


def test_torchscript_of_one_size(tmp_path):
    config, checkpoint, model = make(tmp_path, **VARIANTS['v1'], pad_small_map=False)
    assert run(config, checkpoint, 'torchscript', tmp_path / 'swin.pt', size=(41, 26))
    same(tmp_path / 'swin.pt', model, [(3, 26, 41)])


def test_safetensors(tmp_path, variant):
    config, checkpoint, model = make(tmp_path, **VARIANTS[variant])
    assert run(config, checkpoint, 'safetensors', tmp_path / 'swin.safetensors') == []
    state = load_file(tmp_path / 'swin.safetensors')
    assert state.keys() == model.state_dict().keys()
    assert all(torch.equal(state[key], value) for key, value in model.state_dict().items())


def test_any_backbone(tmp_path):
    config, checkpoint, model = make(tmp_path, MODELS.build(dict(type='mmdet.ResNet', depth=18)))
    config.write_text("model = dict(backbone=dict(type='mmdet.ResNet', depth=18))")
    assert run(config, checkpoint, 'safetensors', tmp_path / 'resnet.safetensors') == []
    assert torch.equal(load_file(tmp_path / 'resnet.safetensors')['conv1.weight'], model.state_dict()['conv1.weight'])


def test_a_wrong_weight_is_detected_and_nothing_is_written(tmp_path, monkeypatch):
    config, checkpoint, _ = make(tmp_path, **VARIANTS['v1'])
    load = torch.jit.load

    def damaged(file):
        loaded = load(file)
        next(value for name, value in loaded.named_parameters() if name.endswith('fc1.bias')).data[3] += 0.1
        return loaded

    monkeypatch.setattr(torch.jit, 'load', damaged)
    with pytest.raises(ExportDiffersError, match='differs from PyTorch') as raised:
        run(config, checkpoint, 'torchscript', tmp_path / 'swin.pt', size=(40, 40))
    assert not any(each.within_tolerance for each in raised.value.differences)
    assert {path.name for path in tmp_path.iterdir()} == {'config.py', 'weights.pth'}


def test_arguments_that_do_not_fit_are_named(tmp_path):
    (tmp_path / 'there.onnx').touch()
    for arguments, message in {
        ('onnx', 'swin.pt2', None, None): 'must end in .onnx',
        ('onnx', 'no/swin.onnx', None, None): 'no does not exist',
        ('onnx', 'there.onnx', None, None): 'there.onnx exists',
        ('onnx', 'swin.onnx', None, 9): '--opset 9',
        ('pt2', 'swin.pt2', None, 20): '--opset 20: expected 18 to 23, for --to onnx only',
        ('torchscript', 'swin.pt', None, None): 'give it with --size WxH',
        ('safetensors', 'swin.safetensors', (40, 40), None): 'leave --size out',
    }.items():
        to, name, size, opset = arguments
        with pytest.raises(InputError, match=message):
            check_arguments(to, tmp_path / name, size, opset, force=False)


@pytest.mark.skipif(EXPORTS, reason='this torch exports')
def test_a_torch_that_is_too_old(tmp_path):
    config, checkpoint, _ = make(tmp_path, **VARIANTS['v1'])
    with pytest.raises(InputError, match='--to onnx needs torch 2.8 or later'):
        run(config, checkpoint, 'onnx', tmp_path / 'swin.onnx', size=(41, 26))


@pytest.mark.skipif(not EXPORTS_ANY_SIZE, reason='this torch exports models for one size')
def test_the_private_setting_of_torch_export_exists():
    """When it goes, exports fall back to the defaults of torch.export; then look for its successor."""
    from torch.fx.experimental import _config

    with formats.without_special_sizes():
        assert _config.backed_size_oblivious


@needs_export
def test_exports_without_the_private_setting(tmp_path, monkeypatch):
    monkeypatch.setattr(formats, 'without_special_sizes', nullcontext)
    config, checkpoint, model = make(tmp_path, **VARIANTS['v1'])
    try:
        assert run(config, checkpoint, 'torch.export', tmp_path / 'swin.pt2')
    except InputError as error:
        assert 'cannot export the backbone' in str(error)
        assert not (tmp_path / 'swin.pt2').exists()
    else:
        same(tmp_path / 'swin.pt2', model, SIZES)


def test_a_full_disk_leaves_nothing(tmp_path, monkeypatch):
    config, checkpoint, _ = make(tmp_path, **VARIANTS['v1'])

    def full(*_):
        raise OSError(errno.ENOSPC, 'No space left on device')

    monkeypatch.setattr(Path, 'write_bytes', full)
    with pytest.raises(InputError, match=r'swin.pt cannot be written: No space left on device'):
        run(config, checkpoint, 'torchscript', tmp_path / 'swin.pt', size=(40, 40))
    assert {path.name for path in tmp_path.iterdir()} == {'config.py', 'weights.pth'}


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


def test_two_stages_are_refused(data, tmp_path):
    config, checkpoint, _ = whole('detection', data, tmp_path)
    with pytest.raises(InputError, match='--part model: MaskRCNN selects boxes between its two stages'):
        run(config, checkpoint, 'torchscript', tmp_path / 'swin.pt', part='model', size=(96, 64))


@pytest.mark.slow
@pytest.mark.parametrize('to, suffix', [('torch.export', 'pt2'), ('onnx', 'onnx')])
def test_a_whole_segmentor_at_any_size(data, tmp_path, to, suffix):
    config, checkpoint, model = whole('segmentation', data, tmp_path)
    file = tmp_path / f'swin.{suffix}'
    assert run(config, checkpoint, to, file, part='model')
    same(file, lambda image: [model.encode_decode(image, [{'img_shape': image.shape[2:]}])], SIZES)


@pytest.mark.slow
def test_a_whole_one_stage_detector_at_any_size(tmp_path):
    config = tmp_path / 'config.py'
    config.write_text(
        f"_base_ = r'{ROOT}/configs/retinanet/retinanet_swin-t-p4-w7_fpn_adamw-1x_coco.py'\n"
        f'model = dict({SMALL_BACKBONE} neck=dict(in_channels=[32, 64, 128], out_channels=16), '
        'bbox_head=dict(in_channels=16, feat_channels=16, stacked_convs=1, num_classes=2))\n'
    )
    model = build(config, tmp_path)
    file = tmp_path / 'swin.onnx'
    assert run(config, tmp_path / 'weights.pth', 'onnx', file, part='model')
    same(file, lambda image: [output for kind in model(image, mode='tensor') for output in kind], SIZES)


@pytest.mark.parametrize('size', [(1, 1), (2, 5), (6, 3), (7, 12), (13, 4)])
def test_pooling_as_products(size):
    image = torch.randn(2, 3, *size, dtype=torch.double)
    for cells in (1, 3, (6, 2), (None, 2)):
        native = nn.AdaptiveAvgPool2d(cells)
        torch.testing.assert_close(AdaptivePool(native)(image), native(image))


def test_the_model_keeps_its_pooling(data, tmp_path):
    """Replacements are made on a copy."""
    _, _, model = whole('segmentation', data, tmp_path)
    exportable = Exportable(model, 'model').eval()
    assert len([m for m in exportable.modules() if isinstance(m, AdaptivePool)]) == 4
    assert not [m for m in model.modules() if isinstance(m, AdaptivePool)]
    image = torch.randn(1, 3, 64, 96)
    torch.testing.assert_close(exportable(image)[0], model.encode_decode(image, [{'img_shape': (64, 96)}]))


def test_metrics_of_the_model_and_of_the_file(data, tmp_path):
    config, checkpoint, _ = whole('segmentation', data, tmp_path)
    options = dict(part='predictions', size=(96, 64), preprocess=True, metrics=True)
    rows = run(config, checkpoint, 'torchscript', tmp_path / 'swin.pt', **options)
    assert rows[-1].images == (2,) and rows[-1].output.startswith('mIoU ') and rows[-1].value == 0
    before, _, after = rows[-1].output.removeprefix('mIoU ').partition(' -> ')
    assert before == after and 0 < float(before) < 100
