"""The config's metrics on its test set, of the model and of the file."""

import copy
from typing import Any

import numpy as np
import torch
from mmengine.config import Config

from swin_mm.analysis.export.comparison import METRIC, Difference, Run
from swin_mm.analysis.export.metadata import Metadata
from swin_mm.analysis.quantization import METRICS, evaluate, test_set
from swin_mm.analysis.runtime import ExportedModel, LoadedFile, pipeline_of
from swin_mm.openmmlab.config import require_data, test_dataset
from swin_mm.utils.errors import InputError


@torch.no_grad()
def compare_metrics(cfg: Config, model: Any, run: Run, metadata: Metadata) -> list[Difference]:
    """Test the model and the file on the config's test set.

    Returns:
        One entry for each of the metrics in ``METRICS`` that the config's evaluator gives.

    Raises:
        InputError: the test set is missing, or the evaluator gives none of them.
    """
    require_data(cfg, 'test')
    loader, evaluator = test_set(cfg)

    file_cfg = copy.deepcopy(cfg)
    dataset = test_dataset(file_cfg)
    dataset.pipeline = pipeline_of(metadata, dataset.pipeline)
    file_loader, _ = test_set(file_cfg)

    def by_name(images: np.ndarray) -> dict[str, np.ndarray]:
        outputs = (output.numpy() for output in run(torch.from_numpy(images)))
        return dict(zip(metadata.outputs, outputs, strict=True))

    exported = ExportedModel(LoadedFile(by_name, metadata))
    found = [evaluate(model, loader, evaluator), evaluate(exported, file_loader, evaluator)]
    names = [name for name in METRICS if name in found[0]]
    if not names:
        raise InputError(f'--metrics: the test gives none of {", ".join(METRICS)}, but {", ".join(found[0])}')
    images = (len(loader),)  # one in each batch
    rows = []
    for name in names:
        before, after = (float(metrics[name]) * METRICS[name] for metrics in found)
        rows.append(Difference(images, f'{name} {before:.2f} -> {after:.2f}', (), METRIC, abs(after - before)))
    return rows
