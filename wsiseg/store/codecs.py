"""The codecs that tiles are stored in, each as zarr names it and as a fast path of our own.

zarr-python spends about a millisecond on each chunk; encoding and decoding here give the same
bytes at the speed of the codec, in any thread. Every codec ends in a checksum. Which of them is
the default, and why, stands with the measurements in docs/tiles.md.
"""

import struct
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import google_crc32c
import numpy as np
import numpy.typing as npt
from numcodecs import Zstd
from zarr.codecs import Crc32cCodec, TransposeCodec, ZstdCodec
from zarr.codecs.numcodecs import Delta
from zarr.registry import register_codec

from wsiseg.errors import ConfigError
from wsiseg.store.image_codec import NAME, ImageCodec, decode_image, encode_image

UInt8 = npt.NDArray[np.uint8]

JPEG_QUALITY = 95
"""With 4:4:4 it keeps 38 dB on the noisiest camera images; a lower one shows in gradients."""

_ZSTD = ZstdCodec(level=1, checksum=True)

register_codec(NAME, ImageCodec)


@dataclass(frozen=True, slots=True)
class TileCodec:
    """`arguments` : what `zarr.create_array` takes. `encode`, `decode` : one chunk of it.

    `decode(data, shape)` returns the array of a chunk without its first axis, and raises ValueError
    or RuntimeError if the data is damaged.
    """

    arguments: dict[str, Any]
    encode: Callable[[UInt8], bytes]
    decode: Callable[[bytes, tuple[int, ...]], UInt8]


def tile_codec(name: str) -> TileCodec:
    """Return a codec of `settings.tile.CODECS`; ConfigError if there is none of that name."""
    if name == "zstd":
        return TileCodec({"compressors": [_ZSTD]}, _encode_zstd, _decode_zstd)
    if name == "delta":
        with quiet_about_delta():
            filters = [TransposeCodec(order=(0, 3, 1, 2)), Delta(dtype="|u1")]
        arguments = {"filters": filters, "compressors": [_ZSTD]}
        return TileCodec(arguments, _encode_delta, _decode_delta)
    if name in ("source", "jpeg"):
        quality = JPEG_QUALITY if name == "jpeg" else None
        serializer = ImageCodec(quality=quality)
        return TileCodec(
            {"serializer": serializer, "compressors": [Crc32cCodec()]},
            lambda pixels: with_checksum(encode_image(pixels, quality)),
            _decode_image,
        )
    msg = f"codec {name!r} is not one of delta, zstd, jpeg, source"
    raise ConfigError(msg)


@contextmanager
def quiet_about_delta() -> Iterator[None]:
    """Drop zarr's warning that other programs than zarr-python may lack numcodecs.delta."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Numcodecs codecs are not in the Zarr")
        yield


def with_checksum(data: bytes) -> bytes:
    """Return data followed by its CRC-32C, as zarr's codec `crc32c` does."""
    return data + struct.pack("<I", google_crc32c.value(data))


def without_checksum(data: bytes) -> bytes:
    """Return data less its CRC-32C at the end; ValueError if that differs."""
    if len(data) < 4 or data[-4:] != struct.pack("<I", google_crc32c.value(data[:-4])):
        msg = "a checksum (crc32c) differs"
        raise ValueError(msg)
    return data[:-4]


def _encode_zstd(pixels: UInt8) -> bytes:
    return bytes(Zstd(level=1, checksum=True).encode(np.ascontiguousarray(pixels)))


def _decode_zstd(data: bytes, shape: tuple[int, ...]) -> UInt8:
    return _inflate(data, shape).reshape(shape)


def _inflate(data: bytes, shape: tuple[int, ...]) -> UInt8:
    out = np.empty(int(np.prod(shape)), np.uint8)
    Zstd().decode(data, out)
    return out


def _encode_delta(pixels: UInt8) -> bytes:
    from wsiseg.store.delta import fill_differences

    differences = np.empty(pixels.size, np.uint8)
    fill_differences(np.ascontiguousarray(pixels), differences)
    return bytes(Zstd(level=1, checksum=True).encode(differences))


def _decode_delta(data: bytes, shape: tuple[int, ...]) -> UInt8:
    from wsiseg.store.delta import fill_sums

    pixels = np.empty(shape, np.uint8)
    fill_sums(_inflate(data, shape), pixels)
    return pixels


def _decode_image(data: bytes, shape: tuple[int, ...]) -> UInt8:
    return decode_image(without_checksum(data), shape[0])
