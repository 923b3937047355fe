"""BlockReader: a level read through blocks on a fixed grid, the last ones kept."""

import threading
from collections import OrderedDict
from collections.abc import Callable

import numpy as np
import numpy.typing as npt

from wsiseg.geometry import Box

UInt8 = npt.NDArray[np.uint8]

BLOCK_PX = 1024
BLOCK_CACHE = 48
"""48 blocks of 3 MiB."""


class BlockReader:
    """Gives any box of a level from blocks that are always asked for at the same places.

    Some libraries take places in whole level-0 pixels. Where a level's downsample is a fraction,
    such a place lies between two pixels of the level and the region is interpolated, differently
    for each place: the same pixel would depend on the box it is read in. Thread-safe.
    """

    def __init__(
        self, level_sizes: tuple[tuple[int, int], ...], read: Callable[[int, Box], UInt8]
    ) -> None:
        """`read` gives a box inside a level as uint8 (h, w, 3)."""
        self._level_sizes = level_sizes
        self._read = read
        self._blocks: OrderedDict[tuple[int, int, int], UInt8] = OrderedDict()
        self._lock = threading.Lock()

    def read(self, level: int, box: Box) -> UInt8:
        """Return a box inside a level as uint8 (box.height, box.width, 3)."""
        out = np.empty((box.height, box.width, 3), np.uint8)
        whole = Box(0, 0, *self._level_sizes[level])
        for row in range(box.y // BLOCK_PX, (box.bottom - 1) // BLOCK_PX + 1):
            for column in range(box.x // BLOCK_PX, (box.right - 1) // BLOCK_PX + 1):
                place = Box(column * BLOCK_PX, row * BLOCK_PX, BLOCK_PX, BLOCK_PX)
                place = place.intersection(whole)
                block = self._block((level, row, column), place)
                part = place.intersection(box)
                inner = part.translated(-place.x, -place.y)
                outer = part.translated(-box.x, -box.y)
                out[outer.y : outer.bottom, outer.x : outer.right] = block[
                    inner.y : inner.bottom, inner.x : inner.right
                ]
        return out

    def _block(self, key: tuple[int, int, int], place: Box) -> UInt8:
        with self._lock:
            if key in self._blocks:
                self._blocks.move_to_end(key)
                return self._blocks[key]
        block = self._read(key[0], place)
        with self._lock:
            self._blocks[key] = block
            while len(self._blocks) > BLOCK_CACHE:
                self._blocks.popitem(last=False)
        return block
