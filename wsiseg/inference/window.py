"""Sliding windows and their exact blending in bounded memory.

Windows come row by row. A band as high as a window holds what is still expected to grow; when a
row of windows is complete, the lines that no later window reaches are final and leave the band.
The band consists of blocks of columns, which exist only while windows reach into them: memory
follows the width of the tissue, never the slide's area, and a slide so wide that even this is too
much is cut into strips (`strip_chunks`).

All sums are of integers (probabilities in 65535ths, whole weights), hence exact: the result
does not depend on the order, on the batches, or on where a killed run was taken up again.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wsiseg.geometry import Box
from wsiseg.grid import TileGrid
from wsiseg.inference.blend import accumulate, resolve

MAX_WEIGHT = 3500
"""Weight in the middle of a window. With the largest overlap, 3/4, the weights that meet in a pixel
sum up to 2 along one axis, in units of the largest, and to 3 where the last window was moved back
to the slide's border: 3.03^2 * 3500 * 65535 = 2.11e9, just inside int32."""

BAND_BYTES = 512 << 20
"""What a band may take. A 100,000 px wide raster that is all tissue needs 205 MB with one class
and 256 px windows, and 614 MB with five: two strips then."""


def blend_weights(size_px: int) -> npt.NDArray[np.int32]:
    """Return the weights of a window: int32 (size, size), >= 1 everywhere, highest in the middle.

    The product of two squared sines (Hann windows). The network knows less about what lies at a
    window's border, where it sees one side only, and a border whose weight is 1 in 3500 cannot be
    seen. Rounded as a product: rounding the axes would leave a border more than 1 in 60.
    """
    centre = (size_px - 1) / 2
    nearness = 1 - np.abs(np.arange(size_px) - centre) / (centre + 1)
    axis = np.sin(np.pi / 2 * nearness) ** 2
    products = np.rint(MAX_WEIGHT * axis[:, None] * axis[None, :])
    weights: npt.NDArray[np.int32] = np.maximum(1, products).astype(np.int32)
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


def strip_chunks(num_columns: int, *, chunk_px: int, window_px: int, num_labels: int) -> range:
    """Return the first chunk column of each strip a raster is cut into, so that a band fits.

    A window across the border between two strips is predicted for both: with the defaults one
    window in a hundred or less. Most slides are one strip.
    """
    bytes_per_column = 4 * window_px * num_labels * chunk_px
    return range(0, num_columns, max(1, BAND_BYTES // bytes_per_column))


@dataclass(frozen=True, slots=True)
class Piece:
    """Finished pixels: labels and probability uint8 (h, w), the first at (x, y) of the raster."""

    x: int
    y: int
    labels: npt.NDArray[np.uint8]
    probability: npt.NDArray[np.uint8]


class _Block:
    """Sums over some columns of the band, and down to which of its lines windows have reached."""

    def __init__(self, num_classes: int, height_px: int, width_px: int) -> None:
        self.sums = np.zeros((num_classes, height_px, width_px), np.int32)
        self.weight = np.zeros((height_px, width_px), np.int32)
        self.touched_px = 0

    def shift(self, count: int) -> None:
        """Drop the first `count` lines and move the others up."""
        left = max(0, self.touched_px - count)
        for array in (self.sums, self.weight):
            array[..., :left, :] = array[..., count : count + left, :].copy()
            array[..., left : self.touched_px, :] = 0
        self.touched_px = left


class Band:
    """Sums of the windows over the lines of `box` that are not finished yet."""

    def __init__(self, box: Box, *, window_px: int, num_labels: int, block_px: int) -> None:
        """Begin with the first line of `box`, in raster pixels; what lies outside is dropped.

        Parameters
        ----------
        block_px
            Width of a block of columns, counted from the left of `box`.
        """
        self._box = box
        self._window_px = window_px
        self._num_classes = num_labels - 1
        self._block_px = block_px
        self._weights = blend_weights(window_px)
        self._top = box.y
        self._blocks: dict[int, _Block] = {}

    def add(self, x: int, y: int, probabilities: npt.NDArray[np.int32]) -> None:
        """Add a window's foreground probabilities: int32 (num_labels - 1, S, S), in 65535ths.

        `y` must not lie below the band's top; lines above it and columns outside the box are cut.
        """
        size = self._window_px
        if y > self._top:
            msg = f"window at y={y} does not fit the band at {self._top}"
            raise ValueError(msg)
        window = Box(x, y, size, size)
        rows = Box(self._box.x, self._top, self._box.width, self._box.bottom - self._top)
        seen = window.intersection(rows)
        if seen.is_empty:
            return
        first = (seen.x - self._box.x) // self._block_px
        last = (seen.right - 1 - self._box.x) // self._block_px
        for index in range(first, last + 1):
            self._add_to_block(index, window, seen, probabilities)

    def _add_to_block(
        self, index: int, window: Box, seen: Box, probabilities: npt.NDArray[np.int32]
    ) -> None:
        place = self._columns(index)
        part = seen.intersection(Box(place.x, seen.y, place.width, seen.height))
        block = self._blocks.get(index)
        if block is None:
            block = _Block(self._num_classes, self._window_px, place.width)
            self._blocks[index] = block
        target = np.s_[..., part.y - self._top : part.bottom - self._top,
                       part.x - place.x : part.right - place.x]  # fmt: skip
        rows = slice(part.y - window.y, part.bottom - window.y)
        columns = slice(part.x - window.x, part.right - window.x)
        accumulate(
            block.sums[target],
            block.weight[target],
            probabilities[:, rows, columns],
            self._weights[rows, columns],
        )
        block.touched_px = max(block.touched_px, part.bottom - self._top)

    def _columns(self, index: int) -> Box:
        """Return the part of the box that a block of columns covers."""
        side = self._block_px
        return Box(self._box.x + index * side, self._box.y, side, self._box.height).intersection(
            self._box
        )

    def finish(self, until: int) -> Iterator[Piece]:
        """Yield what windows have touched from the top to `until`, which becomes the top.

        What is not yielded was touched by none. Pieces come from top to bottom in each block.
        """
        count = min(until, self._box.bottom) - self._top
        if count <= 0:
            return
        for index in sorted(self._blocks):
            block = self._blocks[index]
            height = min(count, block.touched_px)
            labels = np.empty((height, block.weight.shape[1]), np.uint8)
            probability = np.empty_like(labels)
            resolve(block.sums[:, :height], block.weight[:height], labels, probability)
            yield Piece(self._columns(index).x, self._top, labels, probability)
            block.shift(count)
            if block.touched_px == 0:
                del self._blocks[index]
        self._top += count
