"""Small exported files with known outputs, and the metadata of real ones."""

from pathlib import Path

import pytest
import torch
from torch import nn

from swin_mm.analysis.export.metadata import KEY, Input, Metadata
from swin_mm.utils.compat import EXPORTS

MEAN, STD = (10.0, 20.0, 30.0), (2.0, 3.0, 4.0)


def require_exporter() -> None:
    """Skip a module or a test where no ONNX file can be written."""
    pytest.importorskip('onnxscript')
    if not EXPORTS:
        pytest.skip(f'torch {torch.__version__} is too old to export', allow_module_level=True)


def metadata(task: str, outputs: list[str], resize: dict | None = None, inside: dict | None = None) -> Metadata:
    """Metadata of a file that takes normalised RGB; ``inside`` is what it says that it resizes to."""
    divisor = 32 if task != 'semantic' else 1
    takes = Input('RGB', 'float32', False, MEAN, STD, divisor, resize_inside=inside)
    masks = ('box28', 0.5) if 'masks' in outputs else (None, None)
    return Metadata(task, ('square', 'bar'), ((255, 0, 0), (0, 255, 0)), takes, resize, tuple(outputs), *masks)


def write(model: nn.Module, path: Path, about: Metadata, channels: int = 3) -> Path:
    """Export a module that takes images of any size, with metadata."""
    import onnx

    sides = {0: 'batch', 2: 'height', 3: 'width'}
    image = torch.zeros(2, channels, 64, 96)
    options = dict(input_names=['image'], output_names=list(about.outputs), verbose=False, dynamo=True)
    exported = torch.onnx.export(model.eval(), (image,), dynamic_shapes=(sides,), **options).model_proto
    onnx.helper.set_model_props(exported, {KEY: about.dumps()})
    onnx.save(exported, path)
    return path


class Segmentor(nn.Module):
    """Class 1 where red is above 100 and blue is not; logits at the size of the image."""

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        red, blue = (image[:, i] * STD[i] + MEAN[i] - 100 for i in (0, 2))
        return torch.stack([torch.zeros_like(red), torch.minimum(red, -blue)], 1)


class Detector(nn.Module):
    """Two objects and one row of padding; the boxes do not depend on the image, the scores on its largest green."""

    def __init__(self, masks: bool) -> None:
        super().__init__()
        self.masks = masks

    def forward(self, image: torch.Tensor) -> tuple[torch.Tensor, ...]:
        count = image.shape[0]
        boxes = torch.tensor([[8.0, 16, 40, 32], [32, 32, 1000, 64], [0, 0, 0, 0]])[None].expand(count, 3, 4)
        green = (image[:, 1] * STD[1] + MEAN[1]).amax((1, 2)) / 255
        scores = green[:, None] * torch.tensor([0.9, 0.5, 0.0])
        labels = torch.tensor([1, 0, 0])[None].expand(count, 3)
        found = boxes.clone(), scores, labels.clone()
        left = (torch.arange(28) < 14).float()[None, :].expand(28, 28)  # the left half of the box
        return (*found, left.expand(count, 3, 28, 28).clone()) if self.masks else found
