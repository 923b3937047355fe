"""The compiled writer of coordinates: rings to the text of GeoJSON, a hundred million a second.

Coordinates are whole hundredths of a pixel, QuPath's grid, so that no floating point number is
ever printed: `1250` is `12.5`, `1200` is `12`.
"""

import numba
import numpy as np
import numpy.typing as npt

UInt8 = npt.NDArray[np.uint8]
Int64 = npt.NDArray[np.int64]

_MAX_POINT_BYTES = 2 * 21 + 4
"""Two numbers of 64 bits with sign and point, brackets and commas."""


@numba.njit(cache=True, nogil=True)
def to_hundredths(
    vertices: npt.NDArray[np.int32],
    scale_x: float,
    scale_y: float,
    offset_x: float,
    offset_y: float,
) -> Int64:
    """Return vertices (V, 2) in hundredths, int64: 100 * (vertex * scale - offset), rounded."""
    out = np.empty((len(vertices), 2), np.int64)
    for n in range(len(vertices)):
        out[n, 0] = np.int64(np.rint(100 * (vertices[n, 0] * scale_x - offset_x)))
        out[n, 1] = np.int64(np.rint(100 * (vertices[n, 1] * scale_y - offset_y)))
    return out


def rings_text(hundredths: Int64, ring_starts: Int64, polygon_starts: Int64) -> tuple[UInt8, Int64]:
    """Write polygons as "[[x,y],...],[[x,y],...]": each ring closed, the rings without brackets.

    Parameters
    ----------
    hundredths
        int64 (V, 2) of (x, y), rings not closed.
    ring_starts, polygon_starts
        As in `PolygonBatch`.

    Returns
    -------
    text, polygon_offsets
        uint8 (bytes,); int64 (P + 1,), where the text of each polygon begins.
    """
    num_points = len(hundredths) + len(ring_starts) - 1
    largest = int(np.abs(hundredths).max()) if len(hundredths) else 0
    # Sign, point and comma for each number, brackets and a comma for each point and ring.
    bytes_per_point = min(_MAX_POINT_BYTES, 2 * (len(str(largest)) + 3) + 4)
    out = np.empty(bytes_per_point * num_points + 4 * len(ring_starts) + 16, np.uint8)
    offsets = np.empty(len(polygon_starts), np.int64)
    size = _write_rings(hundredths, ring_starts, polygon_starts, out, offsets)
    return out[:size], offsets


@numba.njit(cache=True, nogil=True)
def _write_rings(
    hundredths: Int64, ring_starts: Int64, polygon_starts: Int64, out: UInt8, offsets: Int64
) -> int:
    at = 0
    for p in range(len(polygon_starts) - 1):
        offsets[p] = at
        for r in range(polygon_starts[p], polygon_starts[p + 1]):
            if r > polygon_starts[p]:
                out[at] = 44  # ,
                at += 1
            out[at] = 91  # [
            at += 1
            first = ring_starts[r]
            for n in range(first, ring_starts[r + 1]):
                at = _write_point(hundredths[n, 0], hundredths[n, 1], out, at)
                out[at] = 44
                at += 1
            at = _write_point(hundredths[first, 0], hundredths[first, 1], out, at)
            out[at] = 93  # ]
            at += 1
    offsets[len(polygon_starts) - 1] = at
    return at


@numba.njit(cache=True, nogil=True)
def _write_point(x: int, y: int, out: UInt8, at: int) -> int:
    out[at] = 91
    at = _write_number(x, out, at + 1)
    out[at] = 44
    at = _write_number(y, out, at + 1)
    out[at] = 93
    return at + 1


@numba.njit(cache=True, nogil=True)
def _write_number(hundredths: int, out: UInt8, at: int) -> int:
    if hundredths < 0:
        out[at] = 45  # -
        at += 1
        hundredths = -hundredths
    whole = hundredths // 100
    rest = hundredths - 100 * whole
    size = 1
    limit = 10
    while whole >= limit:
        size += 1
        limit *= 10
    for k in range(at + size - 1, at - 1, -1):
        tens = whole // 10
        out[k] = 48 + whole - 10 * tens
        whole = tens
    at += size
    if rest:
        out[at] = 46  # .
        out[at + 1] = 48 + rest // 10
        at += 2
        if rest % 10:
            out[at] = 48 + rest % 10
            at += 1
    return at
