"""Sliding windows and their exact blending in bounded memory.

Windows come row by row. A band as high as a window and as wide as the slide holds what is still
expected to grow; when a row of windows is complete, the lines that no later window reaches are
final and leave the band. Memory follows the slide's width, never its area.

All sums are of integers (probabilities in 65535ths, small whole weights), hence exact: the result
does not depend on the order, on the batches, or on where a killed run was taken up again.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wsiseg.classes import IGNORE
from wsiseg.geometry import Raster
from wsiseg.grid import TileGrid

PROBABILITY_ONE = 65535
"""The probability 1 as an integer."""

MAX_WEIGHT = 11
"""Weight in the middle of one axis. At most (1 / (1 - 0.75) + 1)^2 = 25 windows meet in a pixel:
25 * 11^2 * 65535 = 2.0e8, far inside int32."""


BLOCK_PX = 4096
"""Columns that are turned into labels at once: bounds the 64 bit copies of the sums."""


def blend_weights(size_px: int) -> npt.NDArray[np.int32]:
    """Return the weights of a window: int32 (size, size), >= 1 everywhere, highest in the middle.

    The network knows less about what lies at a window's border, where it sees one side only.
    """
    centre = (size_px - 1) / 2
    nearness = 1 - np.abs(np.arange(size_px) - centre) / (centre + 1)
    axis = np.maximum(1, np.rint(MAX_WEIGHT * np.sin(np.pi / 2 * nearness) ** 2)).astype(np.int32)
    weights: npt.NDArray[np.int32] = axis[:, None] * axis[None, :]
    return weights


@dataclass(frozen=True, slots=True)
class WindowRow:
    """The windows of one height: the y they share and each one's x, in raster pixels."""

    y: int
    xs: tuple[int, ...]


def window_rows(grid: TileGrid) -> list[WindowRow]:
    """Return the windows of a grid row by row, from top to bottom."""
    rows: dict[int, list[int]] = {}
    for x, y in grid.origins.tolist():
        rows.setdefault(y, []).append(x)
    return [WindowRow(y, tuple(sorted(xs))) for y, xs in sorted(rows.items())]


@dataclass(frozen=True, slots=True)
class Lines:
    """Finished lines of the slide: labels and probability uint8 (n, width), first at `y`."""

    y: int
    labels: npt.NDArray[np.uint8]
    probability: npt.NDArray[np.uint8]


class Band:
    """Sums of the windows over the lines that are not finished yet.

    The sum of the background's probability is not kept: it is what the others leave.
    """

    def __init__(self, raster: Raster, *, window_px: int, num_labels: int, top: int = 0) -> None:
        """Begin with the line `top`; lines above it are taken for done."""
        self._raster = raster
        self._window_px = window_px
        self._weights = blend_weights(window_px)
        self._top = top
        # A window may be larger than the slide, and reaches over its edge then.
        width = max(raster.width_px, window_px)
        self._sums = np.zeros((num_labels - 1, window_px, width), np.int32)
        self._weight = np.zeros((window_px, width), np.int32)
        self._touched_px = 0  # height of the part that any window has touched

    def add(self, x: int, y: int, probabilities: npt.NDArray[np.int32]) -> None:
        """Add a window's foreground probabilities: int32 (num_labels - 1, S, S), in 65535ths.

        `y` must lie within a window's height below the band's top; lines above the top are cut.
        """
        cut = max(0, self._top - y)
        row, size = y + cut - self._top, self._window_px
        if not 0 <= row <= row + size - cut <= size:
            msg = f"window at y={y} does not fit the band at {self._top}"
            raise ValueError(msg)
        place = (slice(row, row + size - cut), slice(x, x + size))
        weights = self._weights[cut:]
        self._sums[(slice(None), *place)] += probabilities[:, cut:] * weights
        self._weight[place] += weights
        self._touched_px = max(self._touched_px, row + size - cut)

    def finish(self, until: int) -> Iterator[Lines]:
        """Yield the lines from the top to `until`, which become the top; a few at a time."""
        until = min(until, self._raster.height_px)
        while self._top < until:
            count = min(until - self._top, self._window_px)
            yield self._resolve(count)
            self._shift(count)
            self._top += count

    def _resolve(self, count: int) -> Lines:
        """Turn the first `count` lines into labels and probabilities."""
        labels = np.full((count, self._raster.width_px), IGNORE, np.uint8)
        probability = np.zeros_like(labels)
        touched = min(count, self._touched_px)
        for left in range(0, self._raster.width_px, BLOCK_PX):
            part = np.s_[:touched, left : min(left + BLOCK_PX, self._raster.width_px)]
            weight = self._weight[part]
            is_seen = weight > 0
            if not is_seen.any():
                continue
            total = PROBABILITY_ONE * np.maximum(weight, 1).astype(np.int64)
            sums = self._sums[(slice(None), *part)].astype(np.int64)
            scores = np.concatenate([(total - sums.sum(axis=0))[None], sums])
            best = scores.argmax(axis=0)  # the lowest label wins a tie
            top = np.take_along_axis(scores, best[None], axis=0)[0]
            labels[part] = np.where(is_seen, best, IGNORE)
            probability[part] = np.where(is_seen, (255 * top + total // 2) // total, 0)
        return Lines(self._top, labels, probability)

    def _shift(self, count: int) -> None:
        left = max(0, self._touched_px - count)
        for array in (self._sums, self._weight):
            array[..., :left, :] = array[..., count : count + left, :].copy()
            array[..., left : self._touched_px, :] = 0
        self._touched_px = left
