"""The picture beside the GeoJSON: the slide with the mask drawn over it."""

import io
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image

from wsiseg.classes import ClassTable
from wsiseg.geometry import Box
from wsiseg.outputs import write_bytes
from wsiseg.slides.reader import Slide
from wsiseg.store.masks import SlideMask, level_shape

OVERLAY_PX = 2048
"""Longer side of the picture: sharp on a screen, a few megabytes."""

FILL_OPACITY = 0.3


def write_overlay(slide: Slide, mask: SlideMask, path: Path) -> None:
    """Write a PNG of the slide with each class tinted and outlined in its colour."""
    image = slide.thumbnail(OVERLAY_PX)
    labels = _labels_at(mask, width=image.shape[1], height=image.shape[0])
    buffer = io.BytesIO()
    Image.fromarray(paint(image, labels, mask.classes)).save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def _labels_at(mask: SlideMask, *, width: int, height: int) -> npt.NDArray[np.uint8]:
    """Return the mask's labels at a size in pixels, read from the level just above it."""
    level = 0
    while level + 1 < mask.num_levels and level_shape(mask.raster, level + 1)[1] >= width:
        level += 1
    rows, columns = level_shape(mask.raster, level)
    labels = mask.read_level(level, Box(0, 0, columns, rows))
    return np.asarray(Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST))


def paint(
    image: npt.NDArray[np.uint8], labels: npt.NDArray[np.uint8], classes: ClassTable
) -> npt.NDArray[np.uint8]:
    """Return the image uint8 (H, W, 3) with the labels (H, W) tinted and their borders solid."""
    painted = image.astype(np.float32)
    is_border = np.zeros(labels.shape, bool)
    for axis in (0, 1):
        differs = np.diff(labels, axis=axis) != 0
        is_border |= np.pad(differs, [(0, 1) if a == axis else (0, 0) for a in (0, 1)])
        is_border |= np.pad(differs, [(1, 0) if a == axis else (0, 0) for a in (0, 1)])
    for item in classes.classes:
        is_class = labels == item.label
        opacity = np.where(is_border[is_class], 1.0, FILL_OPACITY)[:, None]
        painted[is_class] += opacity * (np.array(item.color) - painted[is_class])
    result: npt.NDArray[np.uint8] = np.rint(painted).astype(np.uint8)
    return result
