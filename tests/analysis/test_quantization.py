"""INT8 files: what they predict against their float originals, and that a loss of accuracy is refused."""

import numpy as np
import pytest
import torch
from mmengine.config import Config
from support.exported import Segmentor, metadata, require_exporter, write
from torch import nn

from swin_mm.analysis.quantization import AccuracyError, quantize
from swin_mm.analysis.runtime import ExportedFile, read_metadata, sample_images
from swin_mm.utils.errors import InputError

SUFFIXES = {'.onnx': 'onnxruntime', '.xml': 'openvino'}


class Convolutions(nn.Module):
    """The rectangles of the tiny data set: both are bright, and the first is brighter, averaged over 3 x 3 pixels."""

    def __init__(self) -> None:
        super().__init__()
        self.blur, self.classify = nn.Conv2d(3, 8, 3, padding=1), nn.Conv2d(8, 2, 1)
        nn.init.constant_(self.blur.weight, 1 / 27)
        nn.init.zeros_(self.blur.bias)
        self.classify.weight.data = torch.tensor([[1.0], [0.0]]).expand(2, 8)[..., None, None] / 8
        self.classify.bias.data = torch.tensor([-50.0, 0.0])

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.classify(self.blur(image))


@pytest.fixture(scope='module')
def source(tmp_path_factory):
    """A float file with convolutions."""
    require_exporter()
    pytest.importorskip('mmseg')
    return write(Convolutions(), tmp_path_factory.mktemp('float') / 'float.onnx', metadata('semantic', ['logits']))


@pytest.fixture
def cfg(data, tmp_path):
    """The tiny segmentation config."""
    from support.tool_fixtures import make_tiny

    return Config.fromfile(make_tiny('segmentation', data, tmp_path).config)


@pytest.mark.parametrize('suffix', SUFFIXES)
def test_an_int8_file_predicts_what_its_original_predicts(source, cfg, tmp_path, suffix):
    pytest.importorskip('nncf')
    pytest.importorskip(SUFFIXES[suffix])
    out = tmp_path / f'int8{suffix}'
    done = quantize(cfg, source, out, images=4, max_drop=5)
    assert done.metric == 'mIoU' and 10 < done.before < 90 and done.before - done.after <= 5
    assert (done.quantized, done.total) == (1, 2), 'the last layer stays in float'
    assert read_metadata(out) == read_metadata(source)
    assert not list(tmp_path.glob('.*')), 'nothing half-written is left'
    (images,) = sample_images(cfg, read_metadata(source), 1)
    exact, rounded = (ExportedFile(path)(images)['logits'] for path in (source, out))
    error = np.abs(exact - rounded).max() / np.abs(exact).max()
    assert 1e-5 < error < 0.05, 'it is quantized, and well'


def test_a_file_that_loses_too_much_is_not_written(source, cfg, tmp_path):
    pytest.importorskip('nncf')
    pytest.importorskip('openvino')
    with pytest.raises(AccuracyError, match=r'mIoU drops from .*; .*int8.xml is not written'):
        quantize(cfg, source, tmp_path / 'int8.xml', images=2, max_drop=-100)
    assert not list(tmp_path.glob('*int8*'))


def test_arguments_are_checked_first(source, cfg, tmp_path):
    with pytest.raises(InputError, match=r'must end in .onnx or .xml'):
        quantize(cfg, source, tmp_path / 'int8.bin')
    with pytest.raises(InputError, match='make it first'):
        quantize(cfg, source, tmp_path / 'absent/int8.xml')
    (tmp_path / 'int8.onnx').touch()
    with pytest.raises(InputError, match='--force to replace'):
        quantize(cfg, source, tmp_path / 'int8.onnx')
    (tmp_path / 'weights.bin').write_text('of another model')
    with pytest.raises(InputError, match=r'weights\.bin.*--force to replace'):
        quantize(cfg, source, tmp_path / 'weights.xml')
    bare = write(Segmentor(), tmp_path / 'other.onnx', metadata('detection', ['logits']))
    pytest.importorskip('nncf')
    pytest.importorskip('openvino')
    with pytest.raises(InputError, match='is for the task detection'):
        quantize(cfg, bare, tmp_path / 'int8.xml')
