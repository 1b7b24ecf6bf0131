"""Preparing a whole model for inference: its frozen backbone and its precision."""

from collections.abc import Callable
from typing import Any

import torch
from mmengine.hooks import Hook
from mmengine.logging import print_log
from mmengine.model import is_model_wrapper
from mmengine.runner import Runner
from torch import nn

from swin_mm.models.inference import optimize_for_inference
from swin_mm.models.swin import SwinPyramid
from swin_mm.openmmlab.loading import unwrap_model

DTYPES = {'fp32': torch.float32, 'bf16': torch.bfloat16, 'fp16': torch.float16}


def prepare_for_inference(model: nn.Module, dtype: str = 'fp32') -> nn.Module:
    """Return a copy of a model with a frozen Swin backbone (``optimize_for_inference``), computing in ``dtype``.

    A model without a Swin backbone of this package, with hooks on it, or wrapped for several processes is returned
    itself, in evaluation mode.

    Args:
        model: a detector or segmentor, or one of these in a wrapper for test-time augmentation.
        dtype: a key of :data:`DTYPES`, see :func:`set_autocast`.
    """
    if not is_model_wrapper(model) and any(isinstance(module, SwinPyramid) for module in model.modules()):
        try:
            model = optimize_for_inference(model)
        except ValueError as error:
            print_log(f'inference is not optimized: {error}', logger='current')
    model.eval()
    set_autocast(model, dtype)
    return model


def set_autocast(model: nn.Module, dtype: str) -> None:
    """Make a model compute in ``dtype``, a key of :data:`DTYPES`.

    bf16 and fp16 use autocast, in the whole network of a segmentor but only in backbone and neck of a detector: box
    coordinates with 8 bits of precision would be off by pixels, and mmcv's operators on boxes need fp32.
    """
    if dtype == 'fp32':
        return
    inner = unwrap_model(model)
    name = 'encode_decode' if hasattr(inner, 'encode_decode') else 'extract_feat'
    device = next(inner.parameters()).device.type
    setattr(inner, name, _with_autocast(getattr(inner, name), device, DTYPES[dtype]))


def _with_autocast(function: Callable, device: str, dtype: torch.dtype) -> Callable:
    """Run a function under autocast, and return fp32."""

    def call(*args: Any, **kwargs: Any) -> Any:
        with torch.autocast(device, dtype):
            result = function(*args, **kwargs)
        return result.float() if isinstance(result, torch.Tensor) else tuple(map(torch.Tensor.float, result))

    return call


class InferenceHook(Hook):
    """Replaces the runner's model during a test by the result of :func:`prepare_for_inference`.

    Args:
        dtype: a key of :data:`DTYPES`.
    """

    priority = 'LOWEST'  # after hooks that change weights for the test, as mmengine's EMAHook does

    def __init__(self, dtype: str = 'fp32') -> None:
        self.dtype = dtype

    def before_test_epoch(self, runner: Runner) -> None:
        """Replace the model."""
        self._model = runner.model
        runner.model = prepare_for_inference(runner.model, self.dtype)

    def after_test_epoch(self, runner: Runner, metrics: dict[str, float] | None = None) -> None:
        """Restore the model."""
        runner.model = self._model
