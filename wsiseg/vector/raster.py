"""Polygons to pixels: a pixel belongs to a polygon if its centre does (even-odd rule).

The exact inverse of `wsiseg.vector.trace`: tracing and filling again changes no pixel.
"""

from collections.abc import Sequence

import numba
import numpy as np
import numpy.typing as npt


def fill_polygon(
    labels: npt.NDArray[np.uint8], rings: Sequence[npt.NDArray[np.float64]], value: int
) -> None:
    """Set the pixels of a polygon in `labels` uint8 (H, W) to `value`.

    Parameters
    ----------
    rings
        float64 (n, 2) of (x, y) in pixels of the array, pixel (0, 0) covering [0, 1) x [0, 1);
        holes are rings like any other. Open or closed.
    """
    height, width = labels.shape
    points = np.concatenate(rings)
    x0, y0 = np.floor(points.min(axis=0))
    x1, y1 = np.ceil(points.max(axis=0))
    left, top = int(max(0, x0)), int(max(0, y0))
    right, bottom = int(min(width, x1)), int(min(height, y1))
    if left >= right or top >= bottom:
        return
    parity = np.zeros((bottom - top, right - left + 1), np.uint8)
    corner = np.array([left, top], np.float64)
    for ring in rings:
        _flip_crossings(np.ascontiguousarray(ring - corner, np.float64), parity)
    inside = np.bitwise_xor.accumulate(parity[:, :-1], axis=1).astype(bool)
    labels[top:bottom, left:right][inside] = value


@numba.njit(cache=True)
def _flip_crossings(ring: npt.NDArray[np.float64], parity: npt.NDArray[np.uint8]) -> None:
    """Flip, in each row, the first pixel whose centre lies right of each crossing edge."""
    height, width = parity.shape
    for i in range(len(ring)):
        xa, ya = ring[i, 0], ring[i, 1]
        j = i + 1 if i + 1 < len(ring) else 0
        xb, yb = ring[j, 0], ring[j, 1]
        if ya == yb:
            continue
        if ya > yb:
            xa, ya, xb, yb = xb, yb, xa, ya
        # Rows whose centre line y + 0.5 lies in [ya, yb): each end belongs to one edge only.
        first = max(0, int(np.ceil(ya - 0.5)))
        last = min(height, int(np.ceil(yb - 0.5)))
        for row in range(first, last):
            x = xa + (row + 0.5 - ya) * (xb - xa) / (yb - ya)
            column = min(max(0, int(np.ceil(x - 0.5))), width - 1)
            parity[row, column] ^= 1
