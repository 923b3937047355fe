"""Holes that are closed while their region goes on: kept in a temporary file, not in memory."""

import tempfile
import weakref
from collections.abc import Iterator
from typing import IO

import numpy as np
import numpy.typing as npt

from wsiseg.vector.rings import gather

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

SPILL_BYTES = 16 << 20
"""Held in memory before a file is made (in TMPDIR); most slides never need one."""

PIECE_VERTICES = 1 << 18
"""Vertices read at once: 2 MiB."""

_BYTES_PER_VERTEX = 8

_ROW = np.dtype(
    [("region", "i4"), ("y", "i4"), ("x", "i4"), ("size", "i4"), ("start", "i8")], align=True
)


class RingSpill:
    """Rings by region, given back in the order of their first vertices."""

    def __init__(self) -> None:
        self._file: IO[bytes] = tempfile.SpooledTemporaryFile(max_size=SPILL_BYTES)  # noqa: SIM115
        weakref.finalize(self, self._file.close)  # polygons may be read after tracing has ended
        self._size = 0
        self._rows = np.empty(0, _ROW)

    def add(self, vertices: Int32, rings: Int64) -> None:
        """Take over rings, rows of (region, first vertex, vertex after the last, ...)."""
        if len(rings) == 0:
            return
        kept, starts = gather(vertices, rings[:, 1], rings[:, 2])
        rows = np.empty(len(rings), _ROW)
        rows["region"] = rings[:, 0]
        rows["x"], rows["y"] = kept[starts[:-1]].T
        rows["size"] = np.diff(starts)
        rows["start"] = self._size + starts[:-1]
        self._file.seek(self._size * _BYTES_PER_VERTEX)
        self._file.write(kept.tobytes())
        self._size += len(kept)
        self._rows = np.concatenate([self._rows, rows])

    def vertices_of_regions(self, num_regions: int) -> Int64:
        """Return how many vertices each region has here, int64 (num_regions,)."""
        counts = np.zeros(num_regions, np.int64)
        np.add.at(counts, self._rows["region"], self._rows["size"])
        return counts

    def renumber(self, new_number: npt.NDArray[np.integer]) -> None:
        """Give the regions the numbers of `new_number` (regions,)."""
        self._rows["region"] = new_number[self._rows["region"]]

    def take(self, regions: npt.NDArray[np.bool_]) -> "npt.NDArray[np.void]":
        """Return and forget the rows of some regions, bool (num_regions,); see `read`."""
        is_wanted = regions[self._rows["region"]]
        rows = self._rows[is_wanted]
        self._rows = self._rows[~is_wanted]
        in_order: npt.NDArray[np.void] = rows[np.lexsort((rows["x"], rows["y"]))]
        return in_order

    def read(self, rows: "npt.NDArray[np.void]") -> Iterator[tuple[Int32, Int64]]:
        """Yield the rings of rows in pieces: vertices int32 (V, 2), and where each ring begins."""
        ends = np.cumsum(rows["size"])
        first = 0
        while first < len(rows):
            before = ends[first - 1] if first else 0
            end = max(first + 1, int(np.searchsorted(ends, before + PIECE_VERTICES, "right")))
            yield self._piece(rows[first:end])
            first = end

    def _piece(self, rows: "npt.NDArray[np.void]") -> tuple[Int32, Int64]:
        starts = rows["start"]
        low, high = int(starts.min()), int((starts + rows["size"]).max())
        if high - low <= 8 * PIECE_VERTICES:
            found = self._at(low, high)
            vertices, offsets = gather(found, starts - low, starts - low + rows["size"])
            return vertices, offsets
        rings = [self._at(int(row["start"]), int(row["start"] + row["size"])) for row in rows]
        return np.concatenate(rings), np.cumsum([0, *rows["size"]], dtype=np.int64)

    def _at(self, first: int, end: int) -> Int32:
        self._file.seek(first * _BYTES_PER_VERTEX)
        data = self._file.read((end - first) * _BYTES_PER_VERTEX)
        return np.frombuffer(data, np.int32).reshape(-1, 2)
