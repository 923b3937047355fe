"""The picture beside the GeoJSON: the slide with the mask drawn over it, and a legend."""

import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageDraw, ImageFont

from wsiseg.classes import ClassTable
from wsiseg.geometry import Box
from wsiseg.outputs import write_bytes
from wsiseg.slides.reader import Slide
from wsiseg.store.masks import SlideMask
from wsiseg.store.ngff import level_shape

UInt8 = npt.NDArray[np.uint8]

PICTURE_PX = 2000
"""Longest side of the picture, legend included: sharp on a screen, a few megabytes."""

FILL_OPACITY = 0.28

FONT_PX = 24
MAX_ENTRIES = 24
MAX_NAME = 40
PADDING_PX = 16
SWATCH_PX = 26
TEXT_COLOR = (40, 40, 46)
LEGEND_COLOR = (255, 255, 255)


def write_overlay(
    slide: Slide, mask: SlideMask, path: Path, *, area_um2: Mapping[str, float]
) -> None:
    """Write a PNG of the slide, each class tinted and outlined, with a legend below.

    Parameters
    ----------
    area_um2
        Area of each class by name, for the legend.
    """
    entries = _legend_entries(mask.classes, area_um2)
    meta = slide.meta
    image = slide.thumbnail(_image_px(meta.width_px_l0, meta.height_px_l0, entries))
    labels = _labels_at(mask, width=image.shape[1], height=image.shape[0])
    picture = with_legend(paint(image, labels, mask.classes), entries)
    buffer = io.BytesIO()
    Image.fromarray(picture).save(buffer, "PNG")
    write_bytes(path, buffer.getvalue())


def _labels_at(mask: SlideMask, *, width: int, height: int) -> UInt8:
    """Return the mask's labels at a size in pixels, read from the level just above it."""
    level = 0
    while level + 1 < mask.num_levels and level_shape(mask.raster, level + 1)[1] >= width:
        level += 1
    rows, columns = level_shape(mask.raster, level)
    labels = mask.read_level(level, Box(0, 0, columns, rows))
    return np.asarray(Image.fromarray(labels).resize((width, height), Image.Resampling.NEAREST))


def paint(image: UInt8, labels: UInt8, classes: ClassTable) -> UInt8:
    """Return the image uint8 (H, W, 3) with the labels (H, W) tinted and outlined in solid colour.

    The outline is the outermost pixel of each region, drawn inside it: what has no class keeps
    its own pixels.
    """
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
    result: UInt8 = np.rint(painted).astype(np.uint8)
    return result


Entry = tuple[str, tuple[int, int, int]]
"""Text and colour of a line of the legend."""


def _image_px(width_px_l0: int, height_px_l0: int, entries: list[Entry]) -> int:
    """Return the longer side of the slide's image that leaves room for the legend."""
    longer = max(width_px_l0, height_px_l0)
    image_px = PICTURE_PX
    for _ in range(2):  # a narrower image may need one more line
        width, height = (side * image_px // longer for side in (width_px_l0, height_px_l0))
        room = PICTURE_PX - _strip_height(len(_rows(entries, width)))
        if height > room:
            image_px = max(image_px // 2, image_px * room // height)
    return image_px


def _legend_entries(classes: ClassTable, area_um2: Mapping[str, float]) -> list[Entry]:
    entries: list[Entry] = []
    for item in classes.classes[:MAX_ENTRIES]:
        name = item.name if len(item.name) <= MAX_NAME else item.name[: MAX_NAME - 3] + "..."
        entries.append((f"{name}  {_area_text(area_um2.get(item.name, 0.0))}", item.color))
    if len(classes.classes) > MAX_ENTRIES:
        entries.append((f"and {len(classes.classes) - MAX_ENTRIES} more", LEGEND_COLOR))
    return entries


def _area_text(area_um2: float) -> str:
    """Return an area in the unit that a person would use; the font has no superscripts."""
    if area_um2 >= 1e4:
        return f"{area_um2 / 1e6:.3g} mm2" if area_um2 < 1e9 else f"{area_um2 / 1e6:,.0f} mm2"
    return f"{area_um2:,.0f} um2"


def with_legend(image: UInt8, entries: list[Entry]) -> UInt8:
    """Return the image uint8 (H, W, 3) with a white strip below that names each colour.

    An image narrower than a line of the legend gets a white margin on its right.
    """
    height, width = image.shape[:2]
    width = max(width, *(_entry_width(text) + PADDING_PX for text, _ in entries))
    rows = _rows(entries, width)
    canvas = Image.new("RGB", (width, height + _strip_height(len(rows))), LEGEND_COLOR)
    canvas.paste(Image.fromarray(image), (0, 0))
    draw = ImageDraw.Draw(canvas)
    font = ImageFont.load_default(FONT_PX)
    for number, row in enumerate(rows):
        x, y = PADDING_PX, height + PADDING_PX + number * (SWATCH_PX + PADDING_PX)
        for text, color in row:
            draw.rectangle((x, y, x + SWATCH_PX, y + SWATCH_PX), fill=color, outline=TEXT_COLOR)
            middle = (x + SWATCH_PX + PADDING_PX // 2, y + SWATCH_PX / 2)
            draw.text(middle, text, fill=TEXT_COLOR, font=font, anchor="lm")
            x += _entry_width(text) + PADDING_PX
    return np.asarray(canvas)


def _strip_height(num_rows: int) -> int:
    return PADDING_PX + num_rows * (SWATCH_PX + PADDING_PX)


def _entry_width(text: str) -> int:
    """Return the width of a swatch with its text, in pixels, up to the next one."""
    length = ImageFont.load_default(FONT_PX).getlength(text)
    return int(PADDING_PX + SWATCH_PX + PADDING_PX // 2 + length)


def _rows(entries: list[Entry], width: int) -> list[list[Entry]]:
    """Distribute the entries over lines that fit in a width."""
    rows: list[list[Entry]] = []
    x = width
    for entry in entries:
        needed = _entry_width(entry[0]) + PADDING_PX
        if x + needed > width:
            rows.append([])
            x = 0
        rows[-1].append(entry)
        x += needed
    return rows
