"""Drawing predictions and annotations as contours in the colour of their class, so that the picture stays visible."""

import colorsys
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from matplotlib import get_data_path
from mmengine.structures import BaseDataElement
from PIL import Image, ImageDraw, ImageFont

from swin_mm.engine.tiles import PlacedMask
from swin_mm.utils.errors import InputError

TINT = 0.2  # share of the class's colour inside a region
MAX_LABELLED = 25  # objects; with more, or with boxes narrower than a score, text would cover the picture

Colour = tuple[int, int, int]


def class_colours(count: int) -> list[Colour]:
    """Bright colours, of which neighbours differ."""
    hues = (index * 0.618 % 1 for index in range(count))
    colours = (colorsys.hsv_to_rgb(hue, 0.75, 0.95) for hue in hues)
    return [(round(255 * red), round(255 * green), round(255 * blue)) for red, green, blue in colours]


def line_width(picture: np.ndarray) -> int:
    """Pixels of a contour that is visible at the size of a page."""
    return max(1, round(max(picture.shape[:2]) / 500))


def draw_prediction(
    picture: np.ndarray, sample: BaseDataElement, classes: Sequence[str], palette: Sequence[tuple]
) -> np.ndarray:
    """Draw a prediction as contours with a legend beside the picture.

    Args:
        picture: (H, W, 3) RGB.
        sample: of mmdet or mmseg, on the CPU.
        classes: names by class id.
        palette: colours by class id.

    Returns:
        (height, width, 3) RGB, of even height and width.
    """
    drawn, amounts = _draw_part(picture, sample, 'pred', classes, palette)
    rows = [(palette[i], f'{classes[i]}  {amount}') for i, amount in amounts.items()]
    return with_legend(drawn, rows, max(classes, key=len) + '  00.0%')


def draw_comparison(
    picture: np.ndarray, sample: BaseDataElement, classes: Sequence[str], palette: Sequence[tuple]
) -> np.ndarray:
    """Draw the ground truth, the prediction, and a legend with the amounts of both, from left to right.

    Args:
        picture: (H, W, 3) RGB.
        sample: of mmdet or mmseg, on the CPU; without ground truth the left picture stays as it is.
        classes: names by class id.
        palette: colours by class id.

    Returns:
        (height, width, 3) RGB, of even height and width.
    """
    (left, truth), (right, found) = (_draw_part(picture, sample, part, classes, palette) for part in ('gt', 'pred'))
    rows = [((255, 255, 255), 'annotated / predicted')]
    rows += [(palette[i], f'{classes[i]}  {truth.get(i, "-")} / {found.get(i, "-")}') for i in truth | found]
    longest = max([text for _, text in rows], key=len)
    return with_legend(np.concatenate([left, right], 1), rows, longest)


def _draw_part(
    picture: np.ndarray, sample: BaseDataElement, part: str, classes: Sequence[str], palette: Sequence[tuple]
) -> tuple[np.ndarray, dict[int, str]]:
    """Draw the prediction or the ground truth ('pred', 'gt') of a sample.

    Returns:
        The picture, and by class id, the most frequent first, the number of objects or the share of pixels.
    """
    counts: Counter[int]
    kinds = ('panoptic_seg', 'sem_seg')
    if any(f'pred_{kind}' in sample for kind in kinds):
        maps = next((sample.get(f'{part}_{kind}') for kind in kinds if f'{part}_{kind}' in sample), None)
        if maps is None:
            return picture, {}
        panoptic = 'sem_seg' in maps
        regions = _fitted((maps.sem_seg if panoptic else maps.data).squeeze(0).numpy(), picture)
        labels = class_ids_of_segments(regions) if panoptic else regions
        drawn = draw_label_map(picture, labels, palette, regions)
        # One more than the classes is void.
        found = np.bincount(labels[labels < len(classes)].ravel(), minlength=len(classes))
        counts = Counter(dict(enumerate(found.tolist())))
        return drawn, {i: f'{count / labels.size:.1%}' for i, count in counts.most_common() if count}
    if f'{part}_instances' not in sample:
        return picture, {}
    objects = sample.get(f'{part}_instances')
    labels, boxes = objects.labels.numpy(), getattr(objects.bboxes, 'tensor', objects.bboxes).numpy()
    scores = objects.scores.numpy() if 'scores' in objects else None
    drawn = draw_instances(picture, boxes, labels, palette, _as_list(objects.get('masks')), scores)
    counts = Counter(labels.tolist())
    return drawn, {i: str(count) for i, count in counts.most_common()}


def _fitted(regions: np.ndarray, picture: np.ndarray) -> np.ndarray:
    """A label map (h, w) in the size of the picture."""
    if regions.shape == picture.shape[:2]:
        return regions
    rows, columns = (np.arange(new) * old // new for new, old in zip(picture.shape[:2], regions.shape, strict=True))
    return regions[rows][:, columns]


def _as_list(masks: Any) -> Any:
    """Masks of objects, (n, H, W) or a list: tensors of predictions, and what mmdet loads as ground truth."""
    if hasattr(masks, 'to_ndarray'):
        return masks.to_ndarray()
    return masks.numpy() if hasattr(masks, 'numpy') else masks


def class_ids_of_segments(ids: np.ndarray) -> np.ndarray:
    """Class ids of mmdet's panoptic segments."""
    from mmdet.evaluation import INSTANCE_OFFSET

    return ids % INSTANCE_OFFSET


def draw_label_map(
    picture: np.ndarray, labels: np.ndarray, palette: Sequence[Colour], regions: np.ndarray | None = None
) -> np.ndarray:
    """Tint the regions of a label map lightly and draw their contours.

    Args:
        picture: (H, W, 3) RGB.
        labels: (H, W) class ids; those beyond the palette are left out.
        palette: colours by class id.
        regions: (H, W), numbers of the regions to separate by contours; None for the labels themselves.

    Returns:
        A new picture.
    """
    regions = labels if regions is None else regions
    known = labels < len(palette)
    colours = np.asarray(palette, np.uint8)[np.where(known, labels, 0)]
    drawn = picture.copy()
    drawn[known] = cv2.addWeighted(picture, 1 - TINT, colours, TINT, 0)[known]
    width = line_width(picture)
    # Pixels of a region near another one: a contour inside of each region, so that both colours show.
    inner = np.zeros(labels.shape, bool)
    for axis in (0, 1):
        for step in range(1, width + 1):
            differs = np.take(regions, range(step, regions.shape[axis]), axis) != np.take(
                regions, range(regions.shape[axis] - step), axis
            )
            first, second = [slice(None)] * 2, [slice(None)] * 2
            first[axis], second[axis] = slice(0, -step), slice(step, None)
            inner[tuple(first)] |= differs
            inner[tuple(second)] |= differs
    inner &= known
    drawn[inner] = colours[inner]
    return drawn


def draw_instances(
    picture: np.ndarray,
    boxes: np.ndarray,
    labels: np.ndarray,
    palette: Sequence[Colour],
    masks: Sequence[np.ndarray | PlacedMask] | np.ndarray | None = None,
    scores: np.ndarray | None = None,
) -> np.ndarray:
    """Draw objects as contours of their masks, or as boxes if there are no masks; scores if there is room.

    Args:
        picture: (H, W, 3) RGB.
        boxes: (n, 4) as x1, y1, x2, y2 in pixels.
        labels: (n,) class ids.
        palette: colours by class id.
        masks: n masks, (H, W) each or placed.
        scores: (n,).

    Returns:
        A new picture.
    """
    drawn, width = np.ascontiguousarray(picture).copy(), line_width(picture)
    for i in np.argsort(scores if scores is not None else np.zeros(len(labels)), kind='stable'):  # best on top
        colour = tuple(map(int, palette[labels[i]]))
        if masks is None:
            x1, y1, x2, y2 = (round(float(side)) for side in boxes[i])
            cv2.rectangle(drawn, (x1, y1), (x2, y2), colour, width)
            continue
        mask = masks[i] if isinstance(masks[i], PlacedMask) else PlacedMask.crop(np.asarray(masks[i], bool))
        contours, _ = cv2.findContours(mask.pixels.astype(np.uint8), cv2.RETR_CCOMP, cv2.CHAIN_APPROX_NONE)
        cv2.drawContours(drawn, contours, -1, colour, width, offset=(mask.left, mask.top))
    roomy = len(labels) and np.median(boxes[:, 2] - boxes[:, 0]) >= _font(picture).getlength('0.00')
    if scores is not None and roomy and len(labels) <= MAX_LABELLED:
        _draw_scores(drawn, boxes, labels, palette, scores)
    return drawn


def _draw_scores(
    picture: np.ndarray, boxes: np.ndarray, labels: np.ndarray, palette: Sequence[Colour], scores: np.ndarray
) -> None:
    """Write each score at the upper left corner of its box, in place."""
    canvas = Image.fromarray(picture)
    pen, font = ImageDraw.Draw(canvas), _font(picture)
    for (left, top, *_), label, score in zip(boxes.tolist(), labels.tolist(), scores.tolist(), strict=True):
        text, colour = f'{score:.2f}', tuple(map(int, palette[label]))
        place = max(left, 0), max(top - font.size - 2, 0)
        pen.rectangle(pen.textbbox(place, text, font), fill=colour)
        pen.text(place, text, 'black' if np.dot(colour, (0.3, 0.6, 0.1)) > 110 else 'white', font)
    picture[:] = np.asarray(canvas)


def with_legend(picture: np.ndarray, rows: Sequence[tuple[Colour, str]], longest: str) -> np.ndarray:
    """Put a legend to the right of a picture.

    Args:
        picture: (H, W, 3) RGB.
        rows: colours and texts, of one line each; as many as there is room for are shown.
        longest: the longest text possible, so that the frames of a video get one size.

    Returns:
        (height, width, 3) RGB, of even height and width, as video codecs want it.
    """
    height, width = picture.shape[:2]
    font = _font(picture)
    size = round(font.size)
    line = size * 8 // 5
    panel = round(font.getlength(longest)) + 3 * line
    whole = [(side + 1) // 2 * 2 for side in (width + panel, max(height, 8 * line))]
    canvas = Image.new('RGB', whole, 'white')
    canvas.paste(Image.fromarray(picture))
    room = whole[1] // line
    if len(rows) > room:
        rows = [*rows[: room - 1], ((255, 255, 255), f'and {len(rows) - room + 1} more')]
    pen = ImageDraw.Draw(canvas)
    for index, (colour, text) in enumerate(rows):
        left, top = width + line // 2, index * line + (line - size)
        pen.rectangle((left, top, left + size, top + size), fill=tuple(map(int, colour)))
        pen.text((left + line, top + size // 2), text, 'black', font, anchor='lm')
    return np.asarray(canvas)


def _font(picture: np.ndarray) -> ImageFont.FreeTypeFont:
    size = round(min(max(picture.shape[0] / 28, 12), 32))
    return ImageFont.truetype(str(Path(get_data_path(), 'fonts/ttf/DejaVuSans.ttf')), size)


def classes_and_palette(config: dict, checkpoint: dict) -> tuple[list[str], list[tuple]]:
    """Names and colours by class id; the checkpoint's data set takes precedence over the config's."""
    metainfo = config | {key.lower(): value for key, value in checkpoint.items() if value is not None}
    classes = metainfo.get('classes')
    if not classes:
        raise InputError("neither checkpoint nor config names the classes: set the dataset's metainfo.classes")
    palette: Any = metainfo.get('palette')
    if isinstance(palette, str) or len(palette or ()) < len(classes):
        palette = class_colours(len(classes))
    return [' '.join(str(name).split()) for name in classes], [tuple(colour) for colour in palette[: len(classes)]]
