"""What a finished slide mask holds: the area of each class, and how visible the windows are."""

from collections.abc import Iterator
from dataclasses import dataclass

import numba
import numpy as np
import numpy.typing as npt

from wsiseg.classes import BACKGROUND, IGNORE
from wsiseg.geometry import Box
from wsiseg.grid import TileGrid
from wsiseg.store.masks import SlideMask

NEAR_PX = 2
FAR_PX = 8
"""Steps between these distances from a window's border are what the one at the border is held
against: the same tissue, and the border's own blur (see `Survey`) left out."""

UInt8 = npt.NDArray[np.uint8]

_BORDER, _BESIDE, _OTHER = 0, 1, 2


@dataclass(frozen=True, slots=True)
class Survey:
    """Figures of one slide mask.

    `area_um2` : area per class name.

    `seam_score` : how visible the windows are. Let p be the probability of foreground of a pixel
    and a step |p(i) - p(i + 1)| between neighbours. The score is the mean step across a window's
    border over the mean step 2 to 8 px beside it, over all borders in the tissue. 1: nobody can
    see where windows end. Windows that disagree and are not blended give 1.5 and much more. None
    without probabilities, or where the prediction is so flat that nothing can be compared.
    """

    area_um2: dict[str, float]
    seam_score: float | None


def survey_mask(mask: SlideMask, windows: TileGrid) -> Survey:
    """Read a mask once, chunk by chunk, and return its figures; the chunks do not matter."""
    counts = np.zeros(256, np.int64)
    steps = _Steps(mask, windows)
    for box in _chunks(mask):
        labels = mask.read(box)
        probability = mask.read_probability(box)
        if (labels != IGNORE).any():
            counts += np.bincount(labels.ravel(), minlength=256)
        if probability is not None:
            steps.add(box, labels, probability)
    pixel_um2 = mask.raster.pixel_area_um2
    area = {c.name: float(counts[c.label]) * pixel_um2 for c in mask.classes.classes}
    return Survey(area, steps.score())


def _chunks(mask: SlideMask) -> Iterator[Box]:
    side = mask.chunk_px
    for y in range(0, mask.raster.height_px, side):
        for x in range(0, mask.raster.width_px, side):
            yield Box(x, y, side, side).intersection(mask.raster.box)


class _Steps:
    """Sums of steps between neighbouring pixels, at the windows' borders and beside them."""

    def __init__(self, mask: SlideMask, windows: TileGrid) -> None:
        raster = mask.raster
        self._kinds = [
            _kinds_of_steps(windows.origins[:, axis], windows.tile_size_px, length)
            for axis, length in ((0, raster.width_px), (1, raster.height_px))
        ]
        self._sums = np.zeros((3, 2), np.int64)  # [kind] x [sum of steps, number of steps]
        # The last line of the chunks above and the last column of the one on the left.
        self._above = np.full(raster.width_px, -1, np.int16)
        self._left = np.full(mask.chunk_px, -1, np.int16)

    def add(self, box: Box, labels: UInt8, probability: UInt8) -> None:
        """Count the steps inside a chunk and from the chunks above and on the left to it."""
        values = foreground(labels, probability)
        if box.x == 0:
            self._left[:] = -1
        columns = slice(box.x, box.right)
        _count_steps(
            values,
            self._above[columns],
            self._left[: box.height],
            self._kinds[0][columns],
            self._kinds[1][box.y : box.bottom],
            self._sums,
        )
        self._above[columns] = values[-1]
        self._left[: box.height] = values[:, -1]

    def score(self) -> float | None:
        """Return the mean step at borders over the mean step beside them."""
        (at_border, num_border), (beside, num_beside) = self._sums[[_BORDER, _BESIDE]].tolist()
        if num_border == 0 or beside == 0:
            return None
        return round(float(at_border / num_border) / float(beside / num_beside), 3)


def foreground(labels: UInt8, probability: UInt8) -> npt.NDArray[np.int16]:
    """Return the probability of foreground in 255ths, int16; -1 where nothing was predicted."""
    values = np.where(labels == BACKGROUND, 255 - probability, probability).astype(np.int16)
    values[labels == IGNORE] = -1
    return values


def _kinds_of_steps(origins: npt.NDArray[np.int64], size_px: int, length_px: int) -> UInt8:
    """Return for each pixel of an axis what kind of step leads to it: uint8 (length_px,)."""
    borders = np.unique(np.concatenate([origins, origins + size_px]))
    borders = borders[(borders > 0) & (borders < length_px)]
    kinds = np.full(length_px, _OTHER, np.uint8)
    for kind, near, far in ((_BESIDE, NEAR_PX, FAR_PX), (_OTHER, 1, NEAR_PX - 1), (_BORDER, 0, 0)):
        for distance in {*range(near, far + 1), *range(-far, -near + 1)}:
            places = borders + distance
            kinds[places[(places > 0) & (places < length_px)]] = kind
    return kinds


@numba.njit(cache=True, nogil=True)
def _count_steps(
    values: npt.NDArray[np.int16],
    above: npt.NDArray[np.int16],
    left: npt.NDArray[np.int16],
    column_kinds: UInt8,
    row_kinds: UInt8,
    sums: npt.NDArray[np.int64],
) -> None:
    height, width = values.shape
    for row in range(height):
        for column in range(width):
            value = values[row, column]
            if value < 0:
                continue
            before = values[row, column - 1] if column > 0 else left[row]
            if before >= 0:
                sums[column_kinds[column], 0] += abs(value - before)
                sums[column_kinds[column], 1] += 1
            before = values[row - 1, column] if row > 0 else above[column]
            if before >= 0:
                sums[row_kinds[row], 0] += abs(value - before)
                sums[row_kinds[row], 1] += 1
