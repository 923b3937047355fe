"""Area averaging on a fixed grid: a pixel's value does not depend on the box it is read in.

The weights of a pixel follow from its own index alone and all sums are of integers, hence exact;
an image library's resize, whose coordinates begin at the crop, gives neighbouring tiles slightly
different pixels where they overlap.
"""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

WEIGHT_BITS = 11
"""Weights along one axis add up to 2^11: 255 * 2^22 fits in int32, and 1/2048 of a grey level is
far below one."""


@dataclass(frozen=True, slots=True)
class Taps:
    """Which source pixels make each target pixel along one axis.

    `first`, `last` : range of source pixels needed. Target i is the sum of `weights[j]` times
    source pixel `first + columns[j]` for `starts[i]` <= j < `starts[i + 1]`; all int32.
    """

    first: int
    last: int
    starts: npt.NDArray[np.int32]
    columns: npt.NDArray[np.int32]
    weights: npt.NDArray[np.int32]

    @property
    def num_targets(self) -> int:
        """Number of target pixels."""
        return len(self.starts) - 1


def area_taps(start: int, stop: int, *, scale: float, size: int) -> Taps:
    """Return the taps of target pixels `start` <= i < `stop`, where i covers [i, i+1) * scale.

    Parameters
    ----------
    scale
        Source pixels per target pixel; below 1 the source is enlarged.
    size
        Number of source pixels; what would lie beyond repeats the last one.
    """
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
    starts = np.concatenate([[0], used.sum(axis=1).cumsum()]).astype(np.int32)
    return Taps(begin, end, starts, (columns[used] - begin).astype(np.int32), shares[used])


def apply_taps(pixels: npt.NDArray[np.uint8], taps_y: Taps, taps_x: Taps) -> npt.NDArray[np.uint8]:
    """Return uint8 (targets y, targets x, 3) of the source pixels uint8 (h, w, 3) of the taps."""
    from wsiseg.slides.kernels import average  # numba: what reads stored levels only needs none

    out = np.empty((taps_y.num_targets, taps_x.num_targets, 3), np.uint8)
    average(
        np.ascontiguousarray(pixels), out,
        taps_y.starts, taps_y.columns, taps_y.weights,
        taps_x.starts, taps_x.columns, taps_x.weights,
    )  # fmt: skip
    return out


def block_means(pixels: npt.NDArray[np.uint8], factor: int) -> npt.NDArray[np.uint8]:
    """Return uint8 (ceil(h / factor), ceil(w / factor), 3); beyond the border its pixels repeat."""
    height, width = pixels.shape[:2]
    across = area_taps(0, -(-width // factor), scale=factor, size=width)
    down = area_taps(0, -(-height // factor), scale=factor, size=height)
    return apply_taps(pixels, down, across)
