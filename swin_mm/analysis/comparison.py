"""Pictures that compare predictions with the ground truth: right, wrong and missed.

H, W: height and width of an image; n, m: number of annotated and of predicted objects.
"""

from collections.abc import Sequence
from pathlib import Path

import cv2
import numpy as np
from matplotlib import get_data_path
from PIL import Image, ImageDraw, ImageFont

TRUTH = (255, 225, 25)
RIGHT = (60, 220, 110)
WRONG = (255, 95, 50)
MISSED = (70, 170, 255)
MIN_IOU = 0.5
LEGEND = ((TRUTH, 'annotation'), (RIGHT, 'right'), (WRONG, 'wrong'), (MISSED, 'missed'))


def brighten(image: np.ndarray) -> np.ndarray:
    """Stretch the contrast of a dark photograph, (H, W, 3) uint8, for looking at."""
    low, high = np.percentile(image, (25, 99.7))
    stretched = np.clip((image - low) / max(high - low, 1), 0, 1) ** 0.75
    return (stretched * 255).astype(np.uint8)


def match_objects(truth: np.ndarray, predicted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Match predicted masks to annotated ones, each at most once, where their IoU is at least ``MIN_IOU``.

    Args:
        truth: Annotated masks, bool (n, H, W).
        predicted: Predicted masks, bool (m, H, W), the most confident first.

    Returns:
        Which predictions are right, bool (m,), and which annotated objects were found, bool (n,).
    """
    pixels = truth.shape[1] * truth.shape[2]
    flat_truth = truth.reshape(-1, pixels).astype(np.float32)
    flat_predicted = predicted.reshape(-1, pixels).astype(np.float32)
    overlap = flat_predicted @ flat_truth.T
    union = flat_predicted.sum(1)[:, None] + flat_truth.sum(1) - overlap
    iou = overlap / np.maximum(union, 1)
    right, found = np.zeros(len(predicted), bool), np.zeros(len(truth), bool)
    for index, row in enumerate(iou):
        row = np.where(found, 0, row)
        if len(row) and row.max() >= MIN_IOU:
            right[index] = found[row.argmax()] = True
    return right, found


def draw_annotation(image: np.ndarray, masks: np.ndarray, scale: int = 2) -> np.ndarray:
    """Outline annotated masks, bool (n, H, W), on an RGB image (H, W, 3) that is enlarged ``scale`` times."""
    drawn = _enlarge(image, scale)
    _outline(drawn, masks, TRUTH, scale)
    return drawn


def draw_objects(image: np.ndarray, truth: np.ndarray, predicted: np.ndarray, scale: int = 2) -> np.ndarray:
    """Outline predicted objects in the colours of right and wrong, and annotated objects that were missed.

    Args:
        image: RGB, uint8 (H, W, 3).
        truth: Annotated masks, bool (n, H, W).
        predicted: Predicted masks, bool (m, H, W), the most confident first.
        scale: How many times the image is enlarged.
    """
    right, found = match_objects(truth, predicted)
    drawn = _enlarge(image, scale)
    _outline(drawn, truth[~found], MISSED, scale)
    _outline(drawn, predicted[~right], WRONG, scale)
    _outline(drawn, predicted[right], RIGHT, scale)
    return drawn


def draw_pixels(image: np.ndarray, truth: np.ndarray, predicted: np.ndarray, scale: int = 2) -> np.ndarray:
    """Outline a predicted area, and fill what is wrong or missed; one pixel of tolerance at outlines.

    Args:
        image: RGB, uint8 (H, W, 3).
        truth: Annotated pixels of one class, bool (H, W).
        predicted: Predicted pixels of that class, bool (H, W).
        scale: How many times the image is enlarged.
    """
    drawn = _enlarge(image, scale)
    _outline(drawn, predicted[None], RIGHT, scale)
    for area, colour in ((predicted & ~_dilate(truth), WRONG), (truth & ~_dilate(predicted), MISSED)):
        drawn[_enlarge(area, scale)] = colour
    return drawn


def contact_sheet(titles: Sequence[str], rows: Sequence[Sequence[np.ndarray]], gap: int = 8) -> Image.Image:
    """Join RGB pictures of one size, with a title above each column and the legend of the colours below."""
    height, width = rows[0][0].shape[:2]
    size = max(width // 16, 10)
    line = 2 * size
    font = ImageFont.truetype(str(Path(get_data_path(), 'fonts/ttf/DejaVuSans.ttf')), size)
    total_width = len(titles) * (width + gap) - gap
    sheet = Image.new('RGB', (total_width, len(rows) * (height + gap) - gap + 2 * line), 'black')
    pen = ImageDraw.Draw(sheet)
    for column, title in enumerate(titles):
        pen.text((column * (width + gap) + width // 2, line // 2), title, 'white', font, anchor='mm')
    for i, row in enumerate(rows):
        for j, picture in enumerate(row):
            sheet.paste(Image.fromarray(picture), (j * (width + gap), line + i * (height + gap)))
    for i, (colour, text) in enumerate(LEGEND):
        left, middle = (2 * i + 1) * total_width // (2 * len(LEGEND)) - 3 * size, sheet.height - line // 2
        pen.line((left, middle, left + line, middle), fill=colour, width=max(size // 5, 2))
        pen.text((left + line + size // 2, middle), text, 'white', font, anchor='lm')
    return sheet


def _enlarge(picture: np.ndarray, scale: int) -> np.ndarray:
    """Repeat every pixel ``scale`` times along both axes."""
    return picture.repeat(scale, axis=0).repeat(scale, axis=1)


def _dilate(area: np.ndarray) -> np.ndarray:
    """Grow an area, bool (H, W), by one pixel."""
    return cv2.dilate(area.astype(np.uint8), np.ones((3, 3), np.uint8)) > 0


def _outline(drawn: np.ndarray, masks: np.ndarray, colour: tuple[int, int, int], scale: int) -> None:
    """Draw the contour of each mask on an enlarged picture, in place."""
    for mask in masks:
        contours, _ = cv2.findContours(_enlarge(mask.astype(np.uint8), scale), cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(drawn, contours, -1, colour, 2, cv2.LINE_AA)
