"""What a slide may claim before anything is allocated for it.

A few bytes of a header can claim terabytes. The limits are far beyond what scanners write, and
low enough that what passes is tiled within an ordinary machine's memory.
"""

import contextlib
import struct
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from wsiseg.errors import SlideOpenError

MAX_SLIDE_PIXELS = 1 << 39
"""A whole slide (75 x 25 mm) at 0.07 um/px; its tissue mask takes 0.1 GB."""

MAX_LEVELS = 64
"""Each level halves the one before: even 1 px from the largest slide takes 20."""

MAX_TILE_PIXELS = 1 << 24
"""A stored tile is decoded whole for each of its pixels; slides have some of 4096 x 4096 px."""

SMALL_IMAGE_PIXELS = 1 << 24
MAX_PIXELS_PER_BYTE = 128
"""Of a larger plain image; a JPEG of tissue has 10, one of nothing 85."""

MAX_ENTRIES = 4096
"""Tags of a page; there are some 300 known ones."""

MAX_DIRECTORIES = 4096
"""Pages of a TIFF; a slide has a dozen. OpenSlide's time goes with the square of their number."""

_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS = 256, 257, 322, 323, 324
"""TIFF tags."""


@dataclass(frozen=True, slots=True)
class _Layout:
    """How a TIFF file is written: formats of a directory's length, of its entries, of an offset."""

    length: str
    entry: str
    offset: str


_LAYOUTS = {
    b"II*\0": _Layout("<H", "<HHII", "<I"),
    b"MM\0*": _Layout(">H", ">HHII", ">I"),
    b"II+\0": _Layout("<Q", "<HHQQ", "<Q"),
    b"MM\0+": _Layout(">Q", ">HHQQ", ">Q"),
}

_SHORT = 3
"""The type of a number of two bytes, which lies in the first of the entry's four or eight."""


def check_tiff(path: Path) -> None:
    """Raise ValueError if a TIFF has more pages than any slide, or lists fewer tiles than it has.

    A damaged height makes millions of tiles of twenty, all of them missing. Files that are no TIFF
    pass, and what else is wrong with a chain of directories is left to OpenSlide.
    """
    with path.open("rb") as file:
        layout = _LAYOUTS.get(file.read(4))
        if layout is None:
            return
        start = struct.calcsize(layout.offset)
        offset = _numbers(file, 4 if start == 4 else 8, layout.offset)[0]
        for _ in range(MAX_DIRECTORIES):
            (num_entries,) = _numbers(file, offset, layout.length)
            if not offset or not 0 < num_entries <= MAX_ENTRIES:
                return
            begin = offset + struct.calcsize(layout.length)
            size = struct.calcsize(layout.entry)
            tags = {}
            for i in range(num_entries):
                tag, kind, count, value = _numbers(file, begin + i * size, layout.entry)
                tags[tag] = count, _short(value, layout) if kind == _SHORT else value
            _check_tile_table(tags)
            (offset,) = _numbers(file, begin + num_entries * size, layout.offset)
    msg = f"it claims more than {MAX_DIRECTORIES} pages, or they follow each other in a circle"
    raise ValueError(msg)


def _check_tile_table(tags: Mapping[int, tuple[int, int]]) -> None:
    """Compare the number of tiles in a directory's table with the size of its image."""
    if not tags.keys() >= {_WIDTH, _HEIGHT, _TILE_WIDTH, _TILE_HEIGHT, _TILE_OFFSETS}:
        return
    width, height = tags[_WIDTH][1], tags[_HEIGHT][1]
    tile_width, tile_height = max(1, tags[_TILE_WIDTH][1]), max(1, tags[_TILE_HEIGHT][1])
    tiles = -(-width // tile_width) * -(-height // tile_height)
    listed = tags[_TILE_OFFSETS][0]
    if listed < tiles:
        msg = f"a page of {width} x {height} px needs {tiles} tiles, but lists {listed}"
        raise ValueError(msg)


def _short(value: int, layout: _Layout) -> int:
    """Return a number of two bytes from the field that it stands at the beginning of."""
    field = struct.pack(layout.offset, value)
    return int(struct.unpack(layout.offset[0] + "H", field[:2])[0])


def _numbers(file: BinaryIO, offset: int, layout: str) -> tuple[int, ...]:
    """Return the numbers at an offset, zeros beyond the end of the file."""
    size = struct.calcsize(layout)
    data = b""
    with contextlib.suppress(OSError, OverflowError, ValueError):
        file.seek(offset)
        data = file.read(size)
    return struct.unpack(layout, data if len(data) == size else bytes(size))


def check_budget(level_sizes: Sequence[tuple[int, int]], properties: Mapping[str, str]) -> None:
    """Raise ValueError if a slide's levels or stored tiles are beyond the limits.

    Parameters
    ----------
    level_sizes
        (width, height) of each level in pixels, level 0 first.
    properties
        OpenSlide's, which state the size of the stored tiles of most formats.
    """
    if len(level_sizes) > MAX_LEVELS:
        msg = f"it claims {len(level_sizes)} levels, the limit is {MAX_LEVELS}"
        raise ValueError(msg)
    width, height = level_sizes[0]
    if width * height > MAX_SLIDE_PIXELS:
        msg = f"it claims {width} x {height} px, the limit is {MAX_SLIDE_PIXELS} px"
        raise ValueError(msg)
    for level in range(len(level_sizes)):
        sides = [properties.get(f"openslide.level[{level}].tile-{s}") for s in ("width", "height")]
        if not all(side is not None and side.isdecimal() for side in sides):
            continue
        tile_width, tile_height = (int(side or 0) for side in sides)
        if tile_width * tile_height > MAX_TILE_PIXELS:
            msg = (
                f"level {level} claims stored tiles of {tile_width} x {tile_height} px, the limit "
                f"is {MAX_TILE_PIXELS} px"
            )
            raise ValueError(msg)


def check_image(width: int, height: int, num_bytes: int, place: str) -> None:
    """Raise SlideOpenError if a plain image claims more pixels than a file of its size can hold."""
    if width * height > max(SMALL_IMAGE_PIXELS, MAX_PIXELS_PER_BYTE * num_bytes):
        msg = f"{place}: it claims {width} x {height} px in {num_bytes} bytes; is the file damaged?"
        raise SlideOpenError(msg)
