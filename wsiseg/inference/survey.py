"""What a finished slide mask holds: the area of each class, and how visible the windows are."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wsiseg.classes import BACKGROUND, IGNORE
from wsiseg.geometry import Box
from wsiseg.grid import TileGrid
from wsiseg.store.masks import SlideMask


@dataclass(frozen=True, slots=True)
class Survey:
    """Figures of one slide mask.

    `area_um2` : area per class name. `seam_score` : mean step of the foreground probability from
    pixel to pixel across the windows' borders, over the mean step everywhere else; 1 means that
    the windows cannot be seen. None without probabilities or without any step.
    """

    area_um2: dict[str, float]
    seam_score: float | None


def survey_mask(mask: SlideMask, windows: TileGrid) -> Survey:
    """Read a mask chunk by chunk and return its figures."""
    counts = np.zeros(256, np.int64)
    steps = _Steps(windows)
    for box in _chunks(mask):
        grown = Box(box.x, box.y, box.width + 1, box.height + 1)  # pairs across chunk borders
        labels = mask.read(grown)
        if (labels == IGNORE).all():
            continue
        counts += np.bincount(labels[: box.height, : box.width].ravel(), minlength=256)
        probability = mask.read_probability(grown)
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
    """Sums of steps between neighbouring pixels, at the windows' borders and elsewhere."""

    def __init__(self, windows: TileGrid) -> None:
        size = windows.tile_size_px
        self._borders = [
            np.unique(np.concatenate([windows.origins[:, axis], windows.origins[:, axis] + size]))
            for axis in (0, 1)
        ]
        self._sums = np.zeros((2, 2))  # [border or not] x [sum of steps, number of steps]

    def add(
        self, box: Box, labels: npt.NDArray[np.uint8], probability: npt.NDArray[np.uint8]
    ) -> None:
        """Count the steps to the right and down from each pixel of `box`; arrays 1 px larger."""
        foreground = np.where(labels == BACKGROUND, 255 - probability, probability).astype(np.int16)
        is_seen = labels != IGNORE
        for axis, start in ((0, box.x), (1, box.y)):
            # Axis 0 is x: columns are brought to the front.
            values, seen = (a.T if axis == 0 else a for a in (foreground, is_seen))
            across = slice(0, (box.height, box.width)[axis])
            both = (seen[1:] & seen[:-1])[:, across]
            step = np.abs(values[1:] - values[:-1])[:, across] * both
            is_border = np.isin(start + 1 + np.arange(len(step)), self._borders[axis])
            for kind, chosen in ((0, is_border), (1, ~is_border)):
                self._sums[kind] += step[chosen].sum(), both[chosen].sum()

    def score(self) -> float | None:
        """Return the mean step at borders over the mean step elsewhere."""
        (at_border, num_border), (elsewhere, num_elsewhere) = self._sums
        if num_border == 0 or elsewhere == 0:
            return None
        return float(round((at_border / num_border) / (elsewhere / num_elsewhere), 3))
