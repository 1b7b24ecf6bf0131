"""mmseg's metric for large images; importing this needs mmseg."""

import torch
from mmseg.evaluation import IoUMetric

MOST_PIXELS = 2**24  # fp32 cannot count further in steps of 1


class LargeImageIoU(IoUMetric):
    """mmseg's ``IoUMetric`` for images of any size.

    mmseg counts the pixels of an image with ``torch.histc``, in fp32: counts stop at 2^24 (4096 x 4096), and beyond the
    metrics are wrong. Here mmseg counts parts of the image, and the counts are added.
    """

    @staticmethod
    def intersect_and_union(
        pred_label: torch.Tensor, label: torch.Tensor, num_classes: int, ignore_index: int
    ) -> tuple[torch.Tensor, ...]:
        """Count pixels by class: of the intersection, the union, the prediction, the ground truth."""
        parts = zip(pred_label.flatten().split(MOST_PIXELS), label.flatten().split(MOST_PIXELS), strict=True)
        counts = [IoUMetric.intersect_and_union(*part, num_classes, ignore_index) for part in parts]
        if len(counts) == 1:
            return counts[0]
        return tuple(torch.stack(each).double().sum(0) for each in zip(*counts, strict=True))
