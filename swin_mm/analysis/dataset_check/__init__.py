"""Check of a whole data set before a long training: what is missing, broken or suspicious in it."""

from swin_mm.analysis.dataset_check.check import check_datasets
from swin_mm.analysis.dataset_check.findings import Finding
from swin_mm.analysis.dataset_check.report import Part, Report

__all__ = ['Finding', 'Part', 'Report', 'check_datasets']
