"""Saving a detector's predictions; importing this needs mmdet."""

from pathlib import Path

from mmdet.evaluation import DumpDetResults
from mmengine.fileio import dump

from swin_mm.utils.files import atomic_write


class SaveDetections(DumpDetResults):
    """mmdet's ``DumpDetResults``, which mmdet's analysis tools read, written atomically."""

    def compute_metrics(self, results: list) -> dict[str, float]:
        """Write the file; there is no metric."""
        with atomic_write(Path(self.out_file_path)) as part:
            dump(results, part)
        return {}
