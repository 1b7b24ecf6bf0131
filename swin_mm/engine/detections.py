"""Saving a detector's predictions; importing this needs mmdet."""

from collections.abc import Sequence
from pathlib import Path

from mmdet.evaluation import DumpDetResults
from mmengine.fileio import dump

from swin_mm.utils.files import atomic_write


class SaveDetections(DumpDetResults):
    """mmdet's ``DumpDetResults``, which mmdet's analysis tools read, written atomically."""

    def process(self, data_batch: dict, data_samples: Sequence[dict]) -> None:
        """Keep the predictions; those on tiles have masks as run lengths already."""
        for sample in data_samples:
            objects = dict(sample['pred_instances'])
            masks = objects.pop('masks') if isinstance(objects.get('masks'), list) else None
            super().process(data_batch, [sample | {'pred_instances': objects}])
            if masks is not None:
                self.results[-1]['pred_instances']['masks'] = masks

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Write the file; there is no metric."""
        with atomic_write(Path(self.out_file_path)) as part:
            dump(results, part)
        return {}
