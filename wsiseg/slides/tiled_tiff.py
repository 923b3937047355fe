"""Decode the tiles of a TIFF directly: the stored pixels, at several times OpenSlide's speed.

Most slides (Aperio, generic tiled TIFF) are TIFF files with tiles of JPEG, JPEG 2000 or lossless
kinds. OpenSlide opens them and says what they are; their pixels come straight from the decoder,
each tile once. On a level whose downsample is a fraction this is also exact, where OpenSlide
interpolates. Other vendors' TIFFs place their tiles with overlaps and offsets and stay OpenSlide's.
"""

import os
import threading
from collections import OrderedDict
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import tifffile

from wsiseg.geometry import Box
from wsiseg.slides.resample import block_means
from wsiseg.slides.tile_decoders import JpegTiles, TileDecoder, decoder_of

MIN_CACHE_BYTES, MAX_CACHE_BYTES = 96 << 20, 384 << 20
"""Decoded tiles kept: the stored tiles under one row of windows are met again by the next row."""

MAX_TILE_PIXELS = 1 << 24
"""A larger tile is no slide's, and would be decoded whole for each of its pixels."""

VENDORS = ("aperio", "generic-tiff")
"""What OpenSlide calls files whose levels are single pages with tiles on a plain grid."""

UInt8 = npt.NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class TileLevel:
    """One page: its size, its grid of tiles and where each lies in the file."""

    width_px: int
    height_px: int
    tile_width_px: int
    tile_height_px: int
    offsets: Sequence[int]
    sizes_bytes: Sequence[int]
    decoder: TileDecoder
    has_missing: bool

    @property
    def tiles_across(self) -> int:
        """Tiles in a row, the last of which may reach over the border."""
        return -(-self.width_px // self.tile_width_px)

    @property
    def box(self) -> Box:
        """The whole level."""
        return Box(0, 0, self.width_px, self.height_px)

    @property
    def factors(self) -> tuple[int, ...]:
        """By what `TiledTiff.read` can shrink while it decodes, largest first."""
        return () if self.has_missing else self.decoder.factors

    def tile_box(self, index: int) -> Box:
        """Return where a tile lies, padding included."""
        row, column = divmod(index, self.tiles_across)
        width, height = self.tile_width_px, self.tile_height_px
        return Box(column * width, row * height, width, height)

    def tiles_in(self, box: Box) -> list[int]:
        """Return the tiles that a box inside the level meets, in reading order."""
        rows = range(box.y // self.tile_height_px, (box.bottom - 1) // self.tile_height_px + 1)
        columns = range(box.x // self.tile_width_px, (box.right - 1) // self.tile_width_px + 1)
        return [row * self.tiles_across + column for row in rows for column in columns]


class TiledTiff:
    """The levels of a tiled RGB TIFF; None stands for one that is OpenSlide's. Thread-safe."""

    def __init__(self, path: Path, levels: Sequence[TileLevel | None]) -> None:
        """Use `TiledTiff.open`."""
        self.levels = tuple(levels)
        self._file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self._cache: OrderedDict[tuple[int, int, int], Future[UInt8]] = OrderedDict()
        self._cached_bytes = 0
        rows = [3 * x.width_px * x.tile_height_px for x in self.levels if x is not None]
        self._cache_bytes = min(MAX_CACHE_BYTES, max(MIN_CACHE_BYTES, 3 * max(rows, default=0)))
        self._lock = threading.Lock()

    @classmethod
    def open(
        cls, path: Path, level_sizes: Sequence[tuple[int, int]], *, vendor: str = VENDORS[0]
    ) -> "TiledTiff | None":
        """Return the file's levels, or None if it is not of the kind that is understood.

        Parameters
        ----------
        level_sizes
            (width, height) of each level as OpenSlide counts them.
        vendor
            What OpenSlide calls the format.
        """
        if vendor not in VENDORS:
            return None
        try:
            with tifffile.TiffFile(path) as tiff:
                found = [_level_of(tiff, size) for size in level_sizes]
        except (OSError, ValueError, KeyError, IndexError, tifffile.TiffFileError):
            return None
        levels = [level for level in found if level is not None]
        if len(levels) < len(level_sizes) or not levels:
            return None
        return cls(path, _without_guessed(levels, vendor))

    def close(self) -> None:
        """Give the file back."""
        os.close(self._file)

    def covers(self, level: int, box: Box) -> bool:
        """Whether all tiles under a box of a level are in the file and can be read here."""
        page = self.levels[level]
        if page is None:
            return False
        return not page.has_missing or all(page.sizes_bytes[i] for i in page.tiles_in(box))

    def read(self, level: int, box: Box, factor: int = 1) -> UInt8:
        """Return a box of a level that it `covers`: uint8 (box.height, box.width, 3) RGB.

        Parameters
        ----------
        factor
            1 or one of the level's `factors`: the level is shrunk by it, its last pixel of a row
            being the mean of what there is, and `box` counts the pixels of that.

        Raises
        ------
        OSError, ValueError, RuntimeError
            The file cannot be read or a tile is damaged.
        """
        page = self._page(level)
        whole = Box(box.x * factor, box.y * factor, box.width * factor, box.height * factor)
        tiles = page.tiles_in(whole.intersection(page.box))
        if len(tiles) == 1 and whole == page.tile_box(tiles[0]).intersection(page.box):
            return self._decode(level, tiles[0], factor)[: box.height, : box.width]
        out = np.empty((box.height, box.width, 3), np.uint8)
        for index in tiles:
            place = page.tile_box(index)
            tile_width, tile_height = place.width // factor, place.height // factor
            place = Box(place.x // factor, place.y // factor, tile_width, tile_height)
            part = place.intersection(box)
            inner = part.translated(-place.x, -place.y)
            outer = part.translated(-box.x, -box.y)
            tile = self._tile(level, index, factor)
            out[outer.y : outer.bottom, outer.x : outer.right] = tile[
                inner.y : inner.bottom, inner.x : inner.right
            ]
        return out

    def jpeg_tile(self, level: int, box: Box) -> bytes | None:
        """Return the JPEG of a box that is exactly one tile, untouched but for its tables.

        None if the box is not one, or reaches over the border.
        """
        page = self.levels[level]
        if page is None or not isinstance(page.decoder, JpegTiles):
            return None
        if box.intersection(page.box) != box or box.is_empty:
            return None
        tiles = page.tiles_in(box)
        if len(tiles) > 1 or page.tile_box(tiles[0]) != box or not page.sizes_bytes[tiles[0]]:
            return None
        return page.decoder.complete(self._data(page, tiles[0]))

    def check_boxes(self, level: int) -> list[Box]:
        """Return the first, middle and last tile of a level that are in the file."""
        page = self._page(level)
        tiles_down = -(-page.height_px // page.tile_height_px)
        middle = tiles_down // 2 * page.tiles_across + page.tiles_across // 2
        present = [i for i, size in enumerate(page.sizes_bytes) if size] if page.has_missing else []
        last = len(page.sizes_bytes) - 1
        chosen = [i for i in (0, middle, last) if page.sizes_bytes[i]] or present[:1]
        return [page.tile_box(i).intersection(page.box) for i in chosen]

    def _page(self, level: int) -> TileLevel:
        page = self.levels[level]
        if page is None:
            msg = f"level {level} is not read from its tiles"
            raise ValueError(msg)
        return page

    def _data(self, page: TileLevel, index: int) -> bytes:
        return os.pread(self._file, page.sizes_bytes[index], page.offsets[index])

    def _tile(self, level: int, index: int, factor: int) -> UInt8:
        """Return a tile from the cache; the first who asks decodes it, others wait for that."""
        key = level, index, factor
        with self._lock:
            found = self._cache.get(key)
            if found is not None:
                self._cache.move_to_end(key)
            else:
                made: Future[UInt8] = Future()
                self._cache[key] = made
        if found is not None:
            return found.result()
        try:
            tile = self._decode(level, index, factor)
        except BaseException as error:
            with self._lock:
                del self._cache[key]
            made.set_exception(error)
            raise
        made.set_result(tile)
        self._count(tile.nbytes)
        return tile

    def _count(self, num_bytes: int) -> None:
        """Account for a decoded tile and drop those not asked for the longest."""
        with self._lock:
            self._cached_bytes += num_bytes
            while self._cached_bytes > self._cache_bytes:
                oldest = next((key for key, tile in self._cache.items() if tile.done()), None)
                if oldest is None:
                    return
                self._cached_bytes -= self._cache.pop(oldest).result().nbytes

    def _decode(self, level: int, index: int, factor: int) -> UInt8:
        page = self._page(level)
        data = self._data(page, index)
        inside = page.tile_box(index).intersection(page.box)
        if not (inside.width % factor or inside.height % factor):
            return page.decoder.decode(data, index, factor)
        # Beyond the border lies padding that must not count in the last pixel.
        tile = page.decoder.decode(data, index, 1)
        return block_means(tile[: inside.height, : inside.width], factor)


def _level_of(tiff: tifffile.TiffFile, size: tuple[int, int]) -> TileLevel | None:
    """Return the page that holds a level as RGB tiles within reason."""
    for page in tiff.pages:
        if not isinstance(page, tifffile.TiffPage) or not page.is_tiled:
            continue
        if (page.imagewidth, page.imagelength) != size:
            continue
        is_rgb = page.samplesperpixel == 3 and page.bitspersample == 8 and page.planarconfig == 1
        tiles = -(-size[0] // page.tilewidth) * -(-size[1] // page.tilelength)
        counts = page.databytecounts
        tile_pixels = page.tilewidth * page.tilelength
        is_whole = len(counts) == len(page.dataoffsets) == tiles and any(counts)
        # A damaged count would be allocated before it is read.
        is_sane = tile_pixels <= MAX_TILE_PIXELS and is_whole
        is_sane = is_sane and max(counts) <= 4 * 3 * tile_pixels + (1 << 16)
        if not (is_rgb and is_sane):
            return None
        first = next(i for i, count in enumerate(counts) if count)
        tiff.filehandle.seek(page.dataoffsets[first])
        decoder = decoder_of(page, tiff.filehandle.read(counts[first]))
        if decoder is None:
            return None
        has_missing = not all(counts)
        return TileLevel(
            *size, page.tilewidth, page.tilelength, page.dataoffsets, counts, decoder, has_missing
        )
    return None


def _without_guessed(levels: list[TileLevel], vendor: str) -> list[TileLevel | None]:
    """Leave to OpenSlide what it makes up itself.

    In Aperio's files it paints a missing tile from the next finer level, and repaints the tiles of
    coarser levels that lie over it, whatever they hold.
    """
    known: list[TileLevel | None] = list(levels)
    if vendor == "aperio":
        finest = next((i for i, level in enumerate(levels) if level.has_missing), len(levels))
        known[finest:] = [None] * (len(levels) - finest)
    return known
