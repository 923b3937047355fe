"""The zarr codec `wsiseg.image`: each chunk is one image file, a JPEG or a lossless WebP.

That is how the tiles of a slide are kept as the scanner compressed them. What is written through
the zarr API becomes a JPEG of the configured quality or, without one, WebP, which loses nothing.
"""

import asyncio
from dataclasses import dataclass
from typing import Any, Self

import imagecodecs
import numpy as np
import numpy.typing as npt
from zarr.abc.codec import ArrayBytesCodec
from zarr.core.array_spec import ArraySpec
from zarr.core.buffer import Buffer, NDBuffer

from wsiseg.jpeg import decode_jpeg, encode_jpeg

NAME = "wsiseg.image"
"""What zarr says without wsiseg is "Unknown codec: 'wsiseg.image'": it names what to install."""

UInt8 = npt.NDArray[np.uint8]

_JPEG, _RIFF = b"\xff\xd8", b"RIFF"


def encode_image(pixels: UInt8, quality: int | None) -> bytes:
    """Return uint8 (H, W, 3) as JPEG (4:4:4) of a quality, or as lossless WebP for None."""
    if quality is not None:
        return encode_jpeg(pixels, quality)
    lossless = np.ascontiguousarray(pixels)
    return bytes(imagecodecs.webp_encode(lossless, lossless=True, level=0, method=0))


def decode_image(data: bytes, size_px: int) -> UInt8:
    """Return a chunk as uint8 (size, size, 3); ValueError if it is damaged or no such image."""
    if data[:2] == _JPEG:
        return decode_jpeg(data, width_px=size_px, height_px=size_px)
    if data[:4] != _RIFF:
        msg = "a chunk is neither JPEG nor WebP"
        raise ValueError(msg)
    pixels: UInt8 = imagecodecs.webp_decode(data)
    if pixels.shape != (size_px, size_px, 3):
        msg = f"a chunk decodes to {pixels.shape}, not to {size_px} x {size_px} px of RGB"
        raise ValueError(msg)
    return pixels


@dataclass(frozen=True)
class ImageCodec(ArrayBytesCodec):
    """Chunks uint8 (1, S, S, 3) as image files."""

    is_fixed_size = False
    quality: int | None = None

    @classmethod
    def from_dict(cls, data: dict[str, Any]) -> Self:
        """Parse the entry of `zarr.json`."""
        quality = (data.get("configuration") or {}).get("quality")
        return cls(quality=None if quality is None else int(quality))

    def to_dict(self) -> dict[str, Any]:
        """Return the entry of `zarr.json`."""
        configuration = {} if self.quality is None else {"quality": self.quality}
        return {"name": NAME, "configuration": configuration}

    def compute_encoded_size(self, input_byte_length: int, chunk_spec: ArraySpec) -> int:
        """Refuse: how large an image file becomes depends on the image."""
        raise NotImplementedError

    def _decode_sync(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        pixels = decode_image(chunk_bytes.to_bytes(), chunk_spec.shape[1])
        return chunk_spec.prototype.nd_buffer.from_numpy_array(pixels.reshape(chunk_spec.shape))

    def _encode_sync(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        pixels = chunk_array.as_numpy_array().reshape(chunk_spec.shape[1:])
        return chunk_spec.prototype.buffer.from_bytes(encode_image(pixels, self.quality))

    async def _decode_single(self, chunk_bytes: Buffer, chunk_spec: ArraySpec) -> NDBuffer:
        return await asyncio.to_thread(self._decode_sync, chunk_bytes, chunk_spec)

    async def _encode_single(self, chunk_array: NDBuffer, chunk_spec: ArraySpec) -> Buffer:
        return await asyncio.to_thread(self._encode_sync, chunk_array, chunk_spec)
