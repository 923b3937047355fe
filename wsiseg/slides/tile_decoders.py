"""The compressed tiles of a TIFF page, decoded exactly as OpenSlide decodes them.

One decoder per kind of compression; each takes a tile as it lies in the file.
"""

import struct
from dataclasses import dataclass
from typing import Protocol

import numpy as np
import numpy.typing as npt
import tifffile

from wsiseg.jpeg import Color, TileStreams, read_frame

UInt8 = npt.NDArray[np.uint8]

SCALED_FACTORS = (8, 4, 2)
"""Divisors of both sides that a JPEG decodes to directly; sides of TIFF tiles are whole 16ths."""

_JPEG2000_YCBCR = 33003
_JPEG2000_RGB = 33005
_LOSSLESS = (
    tifffile.COMPRESSION.NONE,
    tifffile.COMPRESSION.LZW,
    tifffile.COMPRESSION.ADOBE_DEFLATE,
    tifffile.COMPRESSION.DEFLATE,
)


class TileDecoder(Protocol):
    """Decodes the tiles of one page."""

    @property
    def factors(self) -> tuple[int, ...]:
        """What `decode` accepts besides 1, largest first."""

    def decode(self, data: bytes, index: int, factor: int) -> UInt8:
        """Return tile `index` as uint8 (h, w, 3) RGB, both sides divided by `factor`.

        What lies beyond the page's border may be left out.

        Raises ValueError, RuntimeError or OSError for damaged data.
        """


@dataclass(frozen=True, slots=True)
class JpegTiles:
    """JPEG by libjpeg-turbo."""

    width_px: int
    height_px: int
    streams: TileStreams
    factors: tuple[int, ...]

    def complete(self, data: bytes) -> bytes:
        """Return a tile as a JPEG that decodes alone to the slide's pixels."""
        return self.streams.complete(data)

    def decode(self, data: bytes, index: int, factor: int) -> UInt8:
        """See TileDecoder."""
        return self.streams.decode(
            data, width_px=self.width_px, height_px=self.height_px, factor=factor
        )


@dataclass(frozen=True, slots=True)
class Jpeg2000Tiles:
    """JPEG 2000 by OpenJPEG, as in Aperio's files, with OpenSlide's conversion from YCbCr."""

    width_px: int
    height_px: int
    is_ycbcr: bool
    factors: tuple[int, ...] = ()

    def decode(self, data: bytes, index: int, factor: int) -> UInt8:
        """See TileDecoder."""
        import imagecodecs

        self._check_header(data)
        samples = imagecodecs.jpeg2k_decode(data)
        if samples.shape != (self.height_px, self.width_px, 3) or samples.dtype != np.uint8:
            msg = f"a JPEG 2000 tile of {samples.dtype} {samples.shape}"
            raise ValueError(msg)
        return _rgb_from_ycbcr(samples) if self.is_ycbcr else samples

    def _check_header(self, data: bytes) -> None:
        """Raise ValueError unless the tile claims its size: what it claims would be allocated.

        How a codestream begins: ISO/IEC 15444-1, A.5.1. Size and origin of the image are at bytes 8
        to 23, the number of components at 40.
        """
        if len(data) < 42 or data[:4] != b"\xff\x4f\xff\x51":
            msg = "a JPEG 2000 tile without a header"
            raise ValueError(msg)
        right, bottom, left, top = struct.unpack_from(">4I", data, 8)
        (components,) = struct.unpack_from(">H", data, 40)
        if (right - left, bottom - top, components) != (self.width_px, self.height_px, 3):
            msg = f"a JPEG 2000 tile of {right - left} x {bottom - top} px x {components}"
            raise ValueError(msg)


@dataclass(frozen=True, slots=True)
class LosslessTiles:
    """Raw, LZW and deflate by tifffile."""

    page: tifffile.TiffPage
    factors: tuple[int, ...] = ()

    def decode(self, data: bytes, index: int, factor: int) -> UInt8:
        """See TileDecoder."""
        decoded, _, _ = self.page.decode(data, index)
        if decoded is None or decoded.shape[-1] != 3 or decoded.dtype != np.uint8:
            msg = f"tile {index} is not an RGB image"
            raise ValueError(msg)
        tile: UInt8 = decoded.reshape(decoded.shape[-3:])
        return tile


def decoder_of(page: tifffile.TiffPage, first_tile: bytes) -> TileDecoder | None:
    """Return the decoder of a page, None if its tiles are of no kind that is known to be exact.

    Parameters
    ----------
    first_tile
        Any tile of the page, as it lies in the file; its header tells how colour is sampled.
    """
    if page.compression in _LOSSLESS:
        return LosslessTiles(page) if page.photometric == tifffile.PHOTOMETRIC.RGB else None
    if page.compression in (_JPEG2000_YCBCR, _JPEG2000_RGB):
        is_ycbcr = page.compression == _JPEG2000_YCBCR
        return Jpeg2000Tiles(page.tilewidth, page.tilelength, is_ycbcr)
    if page.compression != tifffile.COMPRESSION.JPEG:
        return None
    colors: dict[int, Color] = {
        tifffile.PHOTOMETRIC.RGB: "rgb",
        tifffile.PHOTOMETRIC.YCBCR: "ycbcr",
    }
    color = colors.get(page.photometric)
    if color is None:
        return None
    frame = read_frame(first_tile)
    if len(frame.sampling) != 3:
        return None
    factors = SCALED_FACTORS if frame.is_mean_when_scaled else ()
    streams = TileStreams(page.jpegtables, color)
    return JpegTiles(page.tilewidth, page.tilelength, streams, factors)


def _rgb_from_ycbcr(samples: UInt8) -> UInt8:
    """Convert by JFIF's matrix, rounded as OpenSlide does: green in 16-bit fixed point."""
    chroma = np.arange(-128, 128)
    red_of_cr, blue_of_cb = np.rint(1.402 * chroma), np.rint(1.772 * chroma)
    green_of_cb = np.rint(65536 * (0.5 - 0.34414 * chroma)).astype(np.int32)
    green_of_cr = np.rint(-65536 * 0.71414 * chroma).astype(np.int32)
    luma, cb, cr = (samples[..., i] for i in range(3))
    green = (green_of_cb[cb] + green_of_cr[cr]) >> 16
    parts = (red_of_cr.astype(np.int16)[cr], green, blue_of_cb.astype(np.int16)[cb])
    rgb = np.stack([luma.astype(np.int16) + part for part in parts], axis=-1)
    clipped: UInt8 = np.clip(rgb, 0, 255).astype(np.uint8)
    return clipped
