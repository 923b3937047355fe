"""A label mask of any size for the export benchmark, each pixel a pure function of its place.

Nearly half of the square is tissue; two classes of slide-size regions (1 stroma, 2 tumour) share
it, with ragged borders, and nuclei (3) lie scattered in both, so that each region has thousands
of holes: about 44,000 objects and 5 million vertices per 20,000 x 20,000 px.
"""

import numba
import numpy as np
import numpy.typing as npt

from wsiseg.geometry import Box
from wsiseg.synthetic import _noise, _random

NUCLEUS_CELL_PX = 62
NUCLEUS_RADIUS_PX = 10.6

_STEP = 4
"""The smooth fields are computed at every fourth pixel and interpolated between."""

_SEED = 0


class LabelMask:
    """The mask of a square of `side` pixels; `read` gives any part of it."""

    def __init__(self, side: int) -> None:
        self.side = side

    def read(self, box: Box) -> npt.NDArray[np.uint8]:
        """Return labels uint8 (box.height, box.width)."""
        labels = np.empty((box.height, box.width), np.uint8)
        shape = (box.height // _STEP + 3, box.width // _STEP + 3)
        tissue, tumour = np.empty(shape, np.float32), np.empty(shape, np.float32)
        corner = (box.x // _STEP, box.y // _STEP)
        _fields(tissue, tumour, *corner, float(self.side))
        _fill(labels, tissue, tumour, box.x, box.y)
        _paint_nuclei(labels, box.x, box.y)
        return labels


@numba.njit(cache=True)
def _ragged(x: float, y: float, side: float, channel: int) -> float:
    """Return a value around 0: slide-size shapes, their borders ragged at 220 and 30 px."""
    return float(
        _noise(2.2 * x / side, 2.2 * y / side, _SEED, channel)
        + 0.02 * (_noise(x / 220, y / 220, _SEED, channel + 1) - 0.5)
        + 0.012 * (_noise(x / 30, y / 30, _SEED, channel + 2) - 0.5)
        - 0.5
    )


@numba.njit(cache=True)
def _fields(
    tissue: npt.NDArray[np.float32],
    tumour: npt.NDArray[np.float32],
    left: int,
    top: int,
    side: float,
) -> None:
    for row in range(tissue.shape[0]):
        for column in range(tissue.shape[1]):
            x, y = (left + column) * _STEP + 0.0, (top + row) * _STEP + 0.0
            away = (2 * x / side - 1) ** 2 + (2 * y / side - 1) ** 2
            tissue[row, column] = 0.64 - away - 0.5 * _ragged(x, y, side, 50)
            tumour[row, column] = _ragged(x, y, side, 60)


@numba.njit(cache=True)
def _fill(
    labels: npt.NDArray[np.uint8],
    tissue: npt.NDArray[np.float32],
    tumour: npt.NDArray[np.float32],
    left: int,
    top: int,
) -> None:
    for row in range(labels.shape[0]):
        i = (top + row) // _STEP - top // _STEP
        v = np.float32(((top + row) % _STEP) / _STEP)
        for column in range(labels.shape[1]):
            j = (left + column) // _STEP - left // _STEP
            u = np.float32(((left + column) % _STEP) / _STEP)
            is_tissue = (1 - v) * ((1 - u) * tissue[i, j] + u * tissue[i, j + 1]) + v * (
                (1 - u) * tissue[i + 1, j] + u * tissue[i + 1, j + 1]
            ) > 0
            is_tumour = (1 - v) * ((1 - u) * tumour[i, j] + u * tumour[i, j + 1]) + v * (
                (1 - u) * tumour[i + 1, j] + u * tumour[i + 1, j + 1]
            ) > 0
            labels[row, column] = (1 + is_tumour) if is_tissue else 0


@numba.njit(cache=True)
def _paint_nuclei(labels: npt.NDArray[np.uint8], left: int, top: int) -> None:
    """Paint an ellipse per cell of a jittered grid where there is tissue."""
    height, width = labels.shape
    reach = int(1.25 * NUCLEUS_RADIUS_PX) + 2
    for iy in range((top - reach) // NUCLEUS_CELL_PX - 1, (top + height) // NUCLEUS_CELL_PX + 1):
        for ix in range(
            (left - reach) // NUCLEUS_CELL_PX - 1, (left + width) // NUCLEUS_CELL_PX + 1
        ):
            x = (ix + _random(ix, iy, _SEED, 71)) * NUCLEUS_CELL_PX - left
            y = (iy + _random(ix, iy, _SEED, 72)) * NUCLEUS_CELL_PX - top
            turn = 3.1415927 * _random(ix, iy, _SEED, 73)
            cos, sin = np.cos(turn), np.sin(turn)
            for row in range(max(0, int(y) - reach), min(height, int(y) + reach + 1)):
                for column in range(max(0, int(x) - reach), min(width, int(x) + reach + 1)):
                    dx, dy = column + 0.5 - x, row + 0.5 - y
                    along = (dx * cos + dy * sin) / (1.25 * NUCLEUS_RADIUS_PX)
                    across = (dy * cos - dx * sin) / (0.8 * NUCLEUS_RADIUS_PX)
                    if along * along + across * across < 1 and labels[row, column] != 0:
                        labels[row, column] = 3
