"""docs/examples: programs that use an exported file without swin_mm, on files whose outputs are known."""

import ast
import html
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import cv2
import numpy as np
import pytest
from PIL import Image
from support.exported import Detector, Segmentor, metadata, require_exporter, write
from support.tool_fixtures import ROOT

EXAMPLES = ROOT / 'docs/examples'
HALF = dict(scale=[80, 64], keep_ratio=True)


@pytest.fixture(scope='module')
def folder(tmp_path_factory):
    """A detector, a segmentor, and a photo of a red and a grey rectangle."""
    pytest.importorskip('onnxruntime')
    require_exporter()
    folder = tmp_path_factory.mktemp('examples')
    write(Detector(False), folder / 'detector.onnx', metadata('detection', ['boxes', 'scores', 'labels'], HALF))
    write(Segmentor(), folder / 'segmentor.onnx', metadata('semantic', ['logits'], HALF))
    pixels = np.zeros((128, 160, 3), np.uint8)
    pixels[20:60, 30:90] = 200, 50, 30
    pixels[80:100, 10:60] = 200, 180, 150
    Image.fromarray(pixels).save(folder / 'photo.png')
    return folder


def run_python(folder: Path, model: str) -> str:
    command = [sys.executable, str(EXAMPLES / 'predict_onnx.py'), model, 'photo.png']
    return subprocess.run(command, cwd=folder, capture_output=True, text=True, check=True).stdout


def test_the_python_example_needs_three_libraries_only():
    tree = ast.parse((EXAMPLES / 'predict_onnx.py').read_text())
    imports = {alias.name for node in ast.walk(tree) if isinstance(node, ast.Import) for alias in node.names}
    imports |= {str(node.module) for node in ast.walk(tree) if isinstance(node, ast.ImportFrom)}
    assert imports == {'json', 'sys', 'numpy', 'onnxruntime', 'PIL'}


def test_python_detects(folder):
    lines = [line.split() for line in run_python(folder, 'detector.onnx').splitlines()]
    assert [line[0] for line in lines] == ['bar', 'square']
    np.testing.assert_allclose(float(lines[0][1]), 0.9 * 180 / 255, atol=1e-3)
    np.testing.assert_allclose(np.float32(lines[0][2:]), [16, 32, 80, 64], atol=0.1)


def test_python_segments(folder):
    run_python(folder, 'segmentor.onnx')
    labels = np.asarray(Image.open(folder / 'labels.png'))
    expected = np.zeros((128, 160), bool)
    expected[20:60, 30:90] = True
    wrong = (labels == 1) != expected
    assert cv2.erode(wrong.astype(np.uint8), np.ones((3, 3))).sum() == 0, 'only a pixel at the edges may differ'


@pytest.fixture
def open_in_browser(folder, tmp_path):
    """Open the page in headless Chromium with a model; what it shows."""
    browser = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome'))), None)
    library = os.environ.get('ORT_WEB_DIST')
    if not browser or not library:
        pytest.skip('needs Chromium, and ORT_WEB_DIST=.../node_modules/onnxruntime-web/dist')
    for file in [EXAMPLES / 'predict_onnx.html', *folder.glob('*.onnx'), folder / 'photo.png']:
        shutil.copy(file, tmp_path)
    (tmp_path / 'dist').symlink_to(library)

    class Quiet(SimpleHTTPRequestHandler):
        def log_message(self, *_):
            pass

    server = ThreadingHTTPServer(('localhost', 0), partial(Quiet, directory=str(tmp_path)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    options = ['--headless', '--no-sandbox', '--disable-gpu', '--virtual-time-budget=100000', '--dump-dom']

    def call(model):
        address = f'http://localhost:{server.server_port}/predict_onnx.html?model={model}&photo=photo.png'
        done = subprocess.run([browser, *options, address], capture_output=True, text=True, timeout=120, check=True)
        found = re.search(r'<pre id="result">(.+?)</pre>', done.stdout, re.DOTALL)
        assert found, done.stdout[:500] + done.stderr[-1000:]
        return json.loads(html.unescape(found[1]))

    yield call
    server.shutdown()


def test_the_browser_detects(open_in_browser):
    found = open_in_browser('detector.onnx')
    assert [each['name'] for each in found] == ['bar', 'square']
    np.testing.assert_allclose(found[0]['score'], 0.9 * 180 / 255, atol=1e-3)
    np.testing.assert_allclose(found[0]['box'], [16, 32, 80, 64], atol=0.1)


def test_the_browser_segments(open_in_browser):
    found = open_in_browser('segmentor.onnx')
    assert found['square'] + found['bar'] == 64 * 80
    assert abs(found['bar'] - 20 * 30) < 2 * (20 + 30), 'only a pixel at the edges may differ'
