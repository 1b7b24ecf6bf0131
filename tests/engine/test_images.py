"""Reading images, whole and by windows, and displaying them."""

import pickle

import cv2
import numpy as np
import pytest
from mmengine.config import Config
from PIL import Image

from swin_mm.engine.images import WindowedImage, displayable, image_reader, overview
from swin_mm.utils.errors import InputError


def test_displayable():
    colours = np.arange(2 * 3 * 3, dtype=np.uint8).reshape(2, 3, 3)
    assert (displayable(colours) == colours[..., ::-1]).all()
    assert (displayable(np.dstack([colours, colours[..., :1]])) == colours[..., ::-1]).all()
    grey = np.linspace(0, 65535, 10000).astype(np.uint16).reshape(100, 100)
    shown = displayable(grey)
    assert shown.shape == (100, 100, 3) and shown.min() == 0 and shown.max() == 255 and 126 < shown.mean() < 129


def test_a_truncated_image_is_refused(tmp_path):
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 40, 3), dtype=np.uint8)).save(tmp_path / 'a.jpg')
    content = (tmp_path / 'a.jpg').read_bytes()
    (tmp_path / 'a.jpg').write_bytes(content[: len(content) // 2])
    assert cv2.imread(str(tmp_path / 'a.jpg')) is not None, 'OpenCV fills the rest'
    with pytest.raises(InputError, match='truncated'):
        image_reader(Config())(str(tmp_path / 'a.jpg'))


# Windows


@pytest.fixture(scope='module')
def pixels():
    """A smooth picture, as JPEG wants it."""
    noise = np.random.default_rng(0).integers(0, 256, (8, 10, 3), dtype=np.uint8)
    return cv2.resize(noise, (150, 120), interpolation=cv2.INTER_CUBIC)


def reader(color_type, above):
    step = dict(type='LoadImageFromFile', color_type=color_type, imdecode_backend='cv2')
    return image_reader(Config({'test_dataloader': {'dataset': {'pipeline': [step]}}}), above)


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'tif', 'webp'])
@pytest.mark.parametrize('kind', ['colours', 'grey', 'four', 'deep'])
@pytest.mark.parametrize('color_type', ['color', 'unchanged'])
def test_windows_have_the_pixels_of_the_loader(pixels, suffix, kind, color_type, tmp_path):
    pytest.importorskip('pyvips')
    image = {
        'colours': pixels,
        'grey': pixels[..., 0],
        'four': np.dstack([pixels, pixels[..., 1]]),
        'deep': np.dstack([pixels, pixels[..., 1]]).astype(np.uint16) * 256 + 7,
    }[kind]
    if kind in ('four', 'deep') and suffix in ('jpg', 'webp'):
        return  # OpenCV writes no such files
    path = str(tmp_path / f'a.{suffix}')
    assert cv2.imwrite(path, image)
    whole, parts = reader(color_type, None)(path), reader(color_type, 100)(path)
    assert isinstance(parts, WindowedImage) == (color_type == 'unchanged' or kind in ('colours', 'grey'))
    assert parts.shape == whole.shape
    for window in ((slice(0, 120), slice(0, 150)), (slice(7, 50), slice(33, 150)), (slice(100, 120), slice(0, 1))):
        found = parts[window]
        assert found.dtype == whole.dtype and (found == whole[window]).all()
    small = overview(parts, 75)
    assert small.shape == (60, 75, whole.shape[2]) and small.dtype == whole.dtype
    assert abs(small.mean((0, 1)) - whole.mean((0, 1))).max() < 0.02 * np.iinfo(whole.dtype).max


def test_windows_are_used_for_large_images_that_are_not_turned(pixels, tmp_path):
    pytest.importorskip('pyvips')
    Image.fromarray(pixels).save(tmp_path / 'a.jpg')
    turned = Image.Exif()
    turned[0x0112] = 6
    Image.fromarray(pixels).save(tmp_path / 'b.jpg', exif=turned)
    assert isinstance(reader('color', 149)(str(tmp_path / 'a.jpg')), WindowedImage)
    assert reader('color', 150)(str(tmp_path / 'a.jpg')).shape == (120, 150, 3)
    assert reader('color', 100)(str(tmp_path / 'b.jpg')).shape == (150, 120, 3), 'OpenCV turns it'
    path = str(tmp_path / 'a.jpg')
    copied = pickle.loads(pickle.dumps(WindowedImage.open(path, 100)))  # by data workers
    assert (copied[:, :] == cv2.imread(path)).all()


@pytest.mark.parametrize('suffix', ['jpg', 'png', 'tif'])
def test_a_truncated_large_image_is_refused(pixels, suffix, tmp_path):
    pytest.importorskip('pyvips')
    path = tmp_path / f'a.{suffix}'
    assert cv2.imwrite(str(path), pixels)
    content = path.read_bytes()
    path.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match='a.*cannot be read'):
        reader('color', 100)(str(path))
