"""The config's metrics on its test set, of the model and of the file."""

from typing import Any, NamedTuple

import numpy as np
import torch
from mmengine.config import Config

from swin_mm.analysis.export.comparison import METRIC, Difference, Run
from swin_mm.analysis.export.metadata import Metadata
from swin_mm.analysis.quantization import METRICS, test_set
from swin_mm.analysis.runtime import ExportedModel
from swin_mm.openmmlab.config import require_data
from swin_mm.utils.errors import InputError


class LoadedFile(NamedTuple):
    """A file that is loaded, as :class:`swin_mm.analysis.runtime.ExportedModel` takes one."""

    run: Run
    metadata: Metadata

    def __call__(self, images: np.ndarray) -> dict[str, np.ndarray]:
        """The outputs by name."""
        outputs = self.run(torch.from_numpy(images))
        return {name: output.numpy() for name, output in zip(self.metadata.outputs, outputs, strict=True)}


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
    found = []
    for tested in (model, ExportedModel(LoadedFile(run, metadata))):
        count = 0
        for batch in loader:
            samples = tested.test_step(batch)
            evaluator.process(data_samples=samples, data_batch=batch)
            count += len(samples)
        found.append(evaluator.evaluate(count))
    names = [name for name in METRICS if name in found[0]]
    if not names:
        raise InputError(f'--metrics: the test gives none of {", ".join(METRICS)}, but {", ".join(found[0])}')
    rows = []
    for name in names:
        before, after = (float(metrics[name]) * METRICS[name] for metrics in found)
        rows.append(Difference((count,), f'{name} {before:.2f} -> {after:.2f}', (), METRIC, abs(after - before)))
    return rows
