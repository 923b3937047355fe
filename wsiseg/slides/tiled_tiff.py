"""Decode the tiles of a TIFF directly: the stored pixels, at five times OpenSlide's speed for JPEG.

Most slides (Aperio, generic tiled TIFF) are TIFF files with JPEG or lossless tiles. OpenSlide opens
them and says what they are; their pixels come straight from the decoder. That is faster, and on a
level whose downsample is a fraction also exact, where OpenSlide interpolates. Used only for files
all of whose levels it understands, and after a part of each was seen to be what OpenSlide gives.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tifffile

from wsiseg.geometry import Box

CACHE_BYTES = 96 << 20
"""Decoded tiles kept: a row of windows meets each stored tile more than once."""

MAX_TILE_PIXELS = 1 << 24
"""A larger tile is no slide's, and would be decoded whole for each of its pixels."""

CODECS = (
    tifffile.COMPRESSION.NONE,
    tifffile.COMPRESSION.LZW,
    tifffile.COMPRESSION.JPEG,
    tifffile.COMPRESSION.ADOBE_DEFLATE,
    tifffile.COMPRESSION.DEFLATE,
)

UInt8 = npt.NDArray[np.uint8]


class TiledTiff:
    """The levels of a tiled RGB TIFF. Reads are thread-safe."""

    def __init__(self, path: Path, tiff: tifffile.TiffFile, pages: list[tifffile.TiffPage]) -> None:
        """Use `TiledTiff.open`."""
        self._tiff = tiff
        self._pages = pages
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._cache: OrderedDict[tuple[int, int], UInt8] = OrderedDict()
        self._cached_bytes = 0
        self._lock = threading.Lock()

    @classmethod
    def open(cls, path: Path, level_sizes: Sequence[tuple[int, int]]) -> "TiledTiff | None":
        """Return the file's levels, or None if it is not of the kind that is understood.

        Parameters
        ----------
        level_sizes
            (width, height) of each level as OpenSlide counts them.
        """
        try:
            tiff = tifffile.TiffFile(path)
        except (OSError, ValueError, tifffile.TiffFileError):
            return None
        try:
            pages = [_page_of(tiff, size) for size in level_sizes]
        except (ValueError, KeyError, IndexError, tifffile.TiffFileError):
            pages = [None]
        known = [page for page in pages if page is not None]
        if len(known) < len(level_sizes) or not known:
            tiff.close()
            return None
        return cls(path, tiff, known)

    def close(self) -> None:
        """Give the file back."""
        os.close(self._file)
        self._tiff.close()

    def read(self, level: int, box: Box) -> UInt8:
        """Return a box of a level, which must lie inside it: uint8 (box.height, box.width, 3) RGB.

        Raises
        ------
        OSError, ValueError
            The file cannot be read or a tile cannot be decoded.
        """
        page = self._pages[level]
        side_x, side_y = page.tilewidth, page.tilelength
        across = -(-page.imagewidth // side_x)
        out = np.empty((box.height, box.width, 3), np.uint8)
        for row in range(box.y // side_y, (box.bottom - 1) // side_y + 1):
            for column in range(box.x // side_x, (box.right - 1) // side_x + 1):
                tile = self._tile(level, row * across + column)
                place = Box(column * side_x, row * side_y, side_x, side_y)
                part = place.intersection(box)
                out[part.y - box.y : part.bottom - box.y, part.x - box.x : part.right - box.x] = (
                    tile[
                        part.y - place.y : part.bottom - place.y,
                        part.x - place.x : part.right - place.x,
                    ]
                )
        return out

    def middle_tile(self, level: int) -> Box:
        """Return the box of the middle tile of a level, where there is most likely tissue."""
        page = self._pages[level]
        x = page.imagewidth // 2 // page.tilewidth * page.tilewidth
        y = page.imagelength // 2 // page.tilelength * page.tilelength
        whole = Box(0, 0, page.imagewidth, page.imagelength)
        return Box(x, y, page.tilewidth, page.tilelength).intersection(whole)

    def _tile(self, level: int, index: int) -> UInt8:
        with self._lock:
            cached = self._cache.get((level, index))
            if cached is not None:
                self._cache.move_to_end((level, index))
                return cached
        page = self._pages[level]
        data = os.pread(self._file, page.databytecounts[index], page.dataoffsets[index])
        decoded, _, _ = page.decode(data, index, jpegtables=page.jpegtables)
        if decoded is None or decoded.shape[-1] != 3 or decoded.dtype != np.uint8:
            msg = f"tile {index} of level {level} is not an RGB image"
            raise ValueError(msg)
        tile: UInt8 = decoded.reshape(decoded.shape[-3:])
        self._keep((level, index), tile)
        return tile

    def _keep(self, key: tuple[int, int], tile: UInt8) -> None:
        with self._lock:
            if key not in self._cache:
                self._cache[key] = tile
                self._cached_bytes += tile.nbytes
            while self._cached_bytes > CACHE_BYTES:
                _, dropped = self._cache.popitem(last=False)
                self._cached_bytes -= dropped.nbytes


def _page_of(tiff: tifffile.TiffFile, size: tuple[int, int]) -> tifffile.TiffPage | None:
    """Return the page that holds a level as RGB tiles, none of them missing or beyond reason."""
    for page in tiff.pages:
        if not isinstance(page, tifffile.TiffPage) or not page.is_tiled:
            continue
        if (page.imagewidth, page.imagelength) != size:
            continue
        is_rgb = page.samplesperpixel == 3 and page.bitspersample == 8 and page.planarconfig == 1
        tiles = -(-size[0] // page.tilewidth) * -(-size[1] // page.tilelength)
        is_whole = len(page.databytecounts) == tiles and all(page.databytecounts)
        tile_pixels = page.tilewidth * page.tilelength
        # A damaged count would be allocated before it is read.
        is_sane = (
            tile_pixels <= MAX_TILE_PIXELS
            and is_whole
            and (max(page.databytecounts) <= 4 * 3 * tile_pixels + (1 << 16))
        )
        return page if is_rgb and page.compression in CODECS and is_sane else None
    return None
