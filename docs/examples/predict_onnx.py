"""Run a file that tools/export.py wrote, without swin_mm: python predict_onnx.py model.onnx photo.jpg."""

import json
import sys

import numpy as np
import onnxruntime
from PIL import Image

session = onnxruntime.InferenceSession(sys.argv[1], providers=['CPUExecutionProvider'])
about = json.loads(session.get_modelmeta().custom_metadata_map['swin_mm'])
takes, size = about['input'], None
photo = Image.open(sys.argv[2]).convert('RGB')
if about['resize']:
    size = about['resize']['scale']
    if about['resize']['keep_ratio']:
        factor = min(max(size) / max(photo.size), min(size) / min(photo.size))
        size = [int(side * factor + 0.5) for side in photo.size]
pixels = np.asarray(photo.resize(size, Image.Resampling.BILINEAR) if size else photo, np.float32)
height, width = pixels.shape[:2]
pixels = pixels[..., ::-1] if takes['channels'] == 'BGR' else pixels
if not takes['normalize_inside']:
    pixels = (pixels - np.float32(takes['mean'])) / np.float32(takes['std'])
    pixels = np.pad(pixels, [(0, -side % (takes['size_divisor'] or 1)) for side in (height, width)] + [(0, 0)])
image = np.ascontiguousarray(pixels.transpose(2, 0, 1)[None].astype(takes['dtype']))
found = dict(zip(about['outputs'], session.run(about['outputs'], {takes['name']: image}), strict=True))
if about['task'] == 'semantic':
    labels = found['labels'][0] if 'labels' in found else found['logits'][0].argmax(0)
    picture = Image.fromarray(labels[:height, :width].astype(np.uint8)).resize(photo.size, Image.Resampling.NEAREST)
    picture.putpalette(np.uint8(about['palette']).ravel().tolist())
    picture.save('labels.png')
else:
    for box, score, label in zip(found['boxes'][0], found['scores'][0], found['labels'][0], strict=True):
        if score > 0.3:
            corners = box * np.tile(np.divide(photo.size, (width, height)), 2)
            print(about['classes'][label], f'{score:.3f}', *corners.round(1))
