"""JPEG as slides hold it: tiles that lack their tables, in RGB or YCbCr, decoded strictly.

A tile of a TIFF leaves its quantisation and Huffman tables to the page and its colour space to a
tag. `TileStreams` puts both into the stream, which then decodes alone to the slide's pixels.
The decoder is libjpeg-turbo's. Like OpenSlide, and unlike most users of that library, it refuses
damaged data instead of painting the rest of the tile grey.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

import numpy as np
import numpy.typing as npt
import simplejpeg

Color = Literal["rgb", "ycbcr", "gray"]

UInt8 = npt.NDArray[np.uint8]

_SOI = b"\xff\xd8"
_EOI = b"\xff\xd9"
_MAX_PADDING_BYTES = 64
"""Some writers fill up tiles behind the end of the stream."""

_START_OF_SCAN = 0xDA
_NOT_PIXELS = frozenset({*range(0xE0, 0xF0), 0xFE})
"""APP0 to APP15 and comments. APP0 means YCbCr, whatever follows, and APP14 says by a number which
it is: the page knows better. The others are text of the scanner's, in which a patient may stand."""

_FRAMES = frozenset({0xC0, 0xC1, 0xC2})
"""Baseline, extended and progressive Huffman frames: what libjpeg-turbo decodes at 8 bits."""

_ADOBE_SEGMENT = b"\xff\xee\x00\x0eAdobe\x00\x64\x00\x00\x00\x00"
"""ITU-T T.872, 6.5.3: an APP14 segment but for its last byte, the colour transform."""


@dataclass(frozen=True, slots=True)
class Frame:
    """What the header of a stream says: size, and sampling factors of each component as (h, v)."""

    width_px: int
    height_px: int
    sampling: tuple[tuple[int, int], ...]

    @property
    def is_mean_when_scaled(self) -> bool:
        """Whether scaled decoding gives the mean of the pixels, to about half a grey level.

        libjpeg's reduced transforms are the means of the full one's outputs (jidctred.c). That
        holds for the colour too where both axes are sampled alike (4:4:4, 4:2:0); with 4:2:2 it
        comes out up to 27 grey levels off.
        """
        first = self.sampling[0]
        others = set(self.sampling[1:])
        return first in ((1, 1), (2, 2)) and others <= {(1, 1)}


class TileStreams:
    """The tiles of a TIFF page as streams that decode alone. Thread-safe.

    Most tiles of a page begin alike, up to the first coded pixel; that part is made once.
    """

    def __init__(self, tables: bytes | None, color: Color) -> None:
        """Keep what the page says.

        Parameters
        ----------
        tables
            The page's JPEGTables: a stream of tables only, or None if each tile has its own.
        color
            What its samples are; without it a decoder guesses from component numbers.
        """
        marker = b"" if color == "gray" else _ADOBE_SEGMENT + bytes([int(color == "ycbcr")])
        shared = b""
        if tables is not None:
            dropped = [(a, b) for kind, a, b in _segments(tables) if kind in _NOT_PIXELS]
            shared = _without(tables, dropped)
            shared = shared[2 : shared.rfind(_EOI)]
        self._lead = _SOI + marker + shared
        self._last = _Head(b"", b"", b"")

    def complete(self, data: bytes) -> bytes:
        """Return a tile, as it lies in the file, as a stream that decodes alone.

        Raises
        ------
        ValueError
            `data` is not a JPEG stream, or is cut off.
        """
        if _EOI not in data[-_MAX_PADDING_BYTES:]:
            msg = "a JPEG stream that is cut off"
            raise ValueError(msg)
        head = self._head(data)
        end = data.rindex(_EOI) + len(_EOI)  # padding may hold anything
        return head.complete + data[len(head.raw) : end]

    def decode(self, data: bytes, *, width_px: int, height_px: int, factor: int = 1) -> UInt8:
        """Decode a tile as it lies in the file; see `decode_jpeg`."""
        head = self._head(data)
        stream = head.complete + data[len(head.raw) :]
        return _decode(stream, head.frame, width_px, height_px, factor)

    def _head(self, data: bytes) -> "_Head":
        last = self._last
        if last.raw and data.startswith(last.raw):
            return last
        frame, dropped, end = _scan_header(data)
        raw = data[:end]
        head = _Head(raw, self._lead + _without(raw, dropped)[len(_SOI) :], frame)
        if data[end - 2 : end] == bytes([0xFF, _START_OF_SCAN]):
            self._last = head
        return head


@dataclass(frozen=True, slots=True)
class _Head:
    """What stands before the first scan: as in the file, completed, and the frame header in it.

    One that is kept ends with the marker of the scan, so no stream with more segments begins so.
    """

    raw: bytes
    complete: bytes
    frame: bytes


def complete_jpeg(data: bytes, tables: bytes | None, color: Color) -> bytes:
    """Return one tile as a stream that decodes alone; see `TileStreams`."""
    return TileStreams(tables, color).complete(data)


def _without(data: bytes, dropped: list[tuple[int, int]]) -> bytes:
    """Return the bytes but for some ranges, which are in order."""
    kept, place = b"", 0
    for begin, end in dropped:
        kept += data[place:begin]
        place = end
    return kept + data[place:]


def _segments(data: bytes) -> Iterator[tuple[int, int, int]]:
    """Yield (kind, begin, end) of each segment before the first scan."""
    place = 2
    while place + 4 <= len(data) and data[place] == 0xFF and data[place + 1] != _START_OF_SCAN:
        end = place + 2 + int.from_bytes(data[place + 2 : place + 4], "big")
        yield data[place + 1], place, end
        place = end


def read_frame(data: bytes) -> Frame:
    """Return what the header of a stream says; ValueError if it cannot be read."""
    return _parse_frame(_scan_header(data)[0])


def _scan_header(data: bytes) -> tuple[bytes, list[tuple[int, int]], int]:
    """Return the frame header behind its length, the segments without pixels, and the end.

    The end is behind the marker that ends the segments: that of the first scan in a whole stream.
    """
    if data[:2] != _SOI:
        msg = "not a JPEG stream"
        raise ValueError(msg)
    frame, place = None, len(_SOI)
    dropped: list[tuple[int, int]] = []
    for kind, begin, end in _segments(data):
        place = end
        if kind in _NOT_PIXELS:
            dropped.append((begin, end))
        elif kind in _FRAMES:
            frame = data[begin + 4 : end]
    if frame is None:
        msg = "a JPEG stream without a frame of 8 bits"
        raise ValueError(msg)
    return frame, dropped, place + 2


def _parse_frame(segment: bytes) -> Frame:
    """Parse a frame header (ITU-T T.81, B.2.2) behind its length."""
    num = segment[5] if len(segment) > 5 else 0
    if num == 0 or len(segment) < 6 + 3 * num:
        msg = "a JPEG frame header is cut off"
        raise ValueError(msg)
    sampling = tuple((segment[7 + 3 * i] >> 4, segment[7 + 3 * i] & 15) for i in range(num))
    height, width = int.from_bytes(segment[1:3], "big"), int.from_bytes(segment[3:5], "big")
    return Frame(width, height, sampling)


def decode_jpeg(data: bytes, *, width_px: int, height_px: int, factor: int = 1) -> UInt8:
    """Decode a complete stream of a known size to uint8 (height, width, 3) RGB.

    Parameters
    ----------
    factor
        1, 2, 4 or 8: both sides are divided by it while decoding.

    Raises
    ------
    ValueError
        The stream is damaged in any way, or has another size.
    """
    return _decode(data, _scan_header(data)[0], width_px, height_px, factor)


def _decode(stream: bytes, frame: bytes, width_px: int, height_px: int, factor: int) -> UInt8:
    _check_size(frame, width_px, height_px)
    width, height = -(-width_px // factor), -(-height_px // factor)
    pixels: UInt8 = simplejpeg.decode_jpeg(
        stream, colorspace="RGB", min_width=width, min_height=height, min_factor=factor
    )
    if pixels.shape != (height, width, 3):
        msg = f"decoded to {pixels.shape}, not to {height} x {width} px of RGB"
        raise ValueError(msg)
    return pixels


def _check_size(frame: bytes, width_px: int, height_px: int) -> None:
    """Raise ValueError before anything of the size that a stream claims is allocated."""
    height, width = (int.from_bytes(frame[i : i + 2], "big") for i in (1, 3))
    if (width, height) != (width_px, height_px):
        msg = f"a JPEG of {width} x {height} px, not {width_px} x {height_px}"
        raise ValueError(msg)


def check_jpeg(data: bytes, *, width_px: int, height_px: int) -> None:
    """Raise ValueError exactly if `decode_jpeg` would; takes half its time.

    Damage shows while the entropy code is read, which is done for all coefficients here too. What
    is left out is the arithmetic behind it: the transform of all but each block's mean, colour.
    """
    _check_size(_scan_header(data)[0], width_px, height_px)
    simplejpeg.decode_jpeg(data, colorspace="GRAY", min_width=1, min_height=1, min_factor=8)


def encode_jpeg(pixels: UInt8, quality: int) -> bytes:
    """Encode uint8 (H, W, 3) RGB as JPEG without subsampling of colour (4:4:4)."""
    encoded: bytes = simplejpeg.encode_jpeg(
        np.ascontiguousarray(pixels), quality=quality, colorspace="RGB", colorsubsampling="444"
    )
    return encoded
