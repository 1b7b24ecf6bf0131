"""Counting the pixels of large images."""

import pytest
import torch

pytest.importorskip('mmseg')


def test_more_pixels_than_fp32_can_count():
    """mmseg's own count stops at 2^24; when it no longer does, remove LargeImageIoU."""
    from mmseg.evaluation import IoUMetric

    from swin_mm.engine.segments import LargeImageIoU

    truth = torch.zeros(4200, 4100, dtype=torch.uint8)
    truth[:100] = 1
    truth[-1] = 255  # ignored
    predicted = torch.zeros_like(truth)
    predicted[:50] = 1
    width, rows = 4100, 4199
    expected = [
        [width * (rows - 100), width * 50],
        [width * (rows - 50), width * 100],
        [width * (rows - 50), width * 50],
        [width * (rows - 100), width * 100],
    ]
    found = LargeImageIoU.intersect_and_union(predicted, truth, 2, 255)
    assert [counts.tolist() for counts in found] == expected
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # each thread has a count of its own
    try:
        theirs = IoUMetric.intersect_and_union(predicted, truth, 2, 255)
    finally:
        torch.set_num_threads(threads)
    assert theirs[3][0] == 2**24 < expected[3][0]
