"""Area averaging on a fixed grid: a pixel's value does not depend on the box it is read in.

The weights of a pixel follow from its own index alone and all sums are of integers, hence exact;
an image library's resize, whose coordinates begin at the crop, gives neighbouring tiles slightly
different pixels where they overlap.
"""

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

if TYPE_CHECKING:
    from scipy import sparse

WEIGHT_BITS = 11
"""Weights along one axis add up to 2^11: 255 * 2^22 fits in int32, and 1/2048 of a grey level is
far below one."""


@dataclass(frozen=True, slots=True)
class Taps:
    """Which source pixels make each target pixel along one axis.

    `first`, `last` : range of source pixels needed. `matrix` : int32 (targets, last - first).
    """

    first: int
    last: int
    matrix: "sparse.csr_array"


def area_taps(start: int, stop: int, *, scale: float, size: int) -> Taps:
    """Return the taps of target pixels `start` <= i < `stop`, where i covers [i, i+1) * scale.

    Parameters
    ----------
    scale
        Source pixels per target pixel; below 1 the source is enlarged.
    size
        Number of source pixels; what would lie beyond repeats the last one.
    """
    from scipy import sparse  # half a second that a probe of stored levels need not pay

    one = 1 << WEIGHT_BITS
    targets = np.arange(start, stop, dtype=np.float64)[:, np.newaxis]
    low, high = targets * scale, (targets + 1) * scale
    first = np.floor(low)
    longest = max(1, int((np.ceil(high) - first).max()))
    edges = np.clip(first + np.arange(longest + 1), low, high)
    # Rounding the running sum, not each weight, makes them add up to exactly one.
    shares = np.diff(np.rint((edges - low) / (high - low) * one), axis=1).astype(np.int32)
    columns = np.minimum(first.astype(np.int64) + np.arange(longest), size - 1)
    used = shares > 0
    begin, end = int(columns[used].min()), int(columns[used].max()) + 1
    ends_of_rows = np.concatenate([[0], used.sum(axis=1).cumsum()])
    matrix = sparse.csr_array(
        (shares[used], columns[used] - begin, ends_of_rows), shape=(stop - start, end - begin)
    )
    return Taps(begin, end, matrix)


def apply_taps(pixels: npt.NDArray[np.uint8], taps_y: Taps, taps_x: Taps) -> npt.NDArray[np.uint8]:
    """Return uint8 (targets y, targets x, C) of the source pixels uint8 (h, w, C) of the taps."""
    height, width, channels = pixels.shape
    down = taps_y.matrix @ pixels.reshape(height, width * channels).astype(np.int32)
    down = down.reshape(-1, width, channels).transpose(1, 0, 2).reshape(width, -1)
    both = (taps_x.matrix @ np.ascontiguousarray(down)).reshape(
        taps_x.matrix.shape[0], -1, channels
    )
    half = 1 << (2 * WEIGHT_BITS - 1)
    result: npt.NDArray[np.uint8] = ((both + half) >> (2 * WEIGHT_BITS)).astype(np.uint8)
    return np.ascontiguousarray(result.transpose(1, 0, 2))
