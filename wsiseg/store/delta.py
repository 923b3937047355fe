"""numcodecs.delta over the planes of an image, compiled; imported late, as numba takes a while."""

import numba
import numpy as np
import numpy.typing as npt

UInt8 = npt.NDArray[np.uint8]


@numba.njit(cache=True, nogil=True)
def fill_differences(pixels: UInt8, out: UInt8) -> None:
    """Fill `out` with the planes of uint8 (H, W, C), each value less the one before, modulo 256."""
    height, width, channels = pixels.shape
    place = 0
    last = np.uint8(0)
    for c in range(channels):
        for y in range(height):
            for x in range(width):
                value = pixels[y, x, c]
                out[place] = value - last
                last = value
                place += 1


@numba.njit(cache=True, nogil=True)
def fill_sums(differences: UInt8, out: UInt8) -> None:
    """Undo `fill_differences`: fill `out` uint8 (H, W, C)."""
    height, width, channels = out.shape
    place = 0
    last = np.uint8(0)
    for c in range(channels):
        for y in range(height):
            for x in range(width):
                last = np.uint8(last + differences[place])
                out[y, x, c] = last
                place += 1
