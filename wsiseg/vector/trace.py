"""Label raster to polygons along pixel edges, exactly, line by line.

The raster is swept from top to bottom. On each lattice line between two rows of pixels the corners
of every region are found, and linked into rings by what is open above (vertical edges) and to the
left (horizontal edges). Nothing depends on how the raster is cut into blocks, so there are no
seams to join. What is kept is one row of pixels and the regions that reach it.

Frame: lattice points of the raster, integers; pixel (i, j) has its corners at i, i+1 and j, j+1.
Regions are 4-connected. Each edge has its region on the right hand (y pointing down), so outer
rings run clockwise on the screen and holes the other way round. Every ring is simple: one that
meets itself in a point is cut there.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from wsiseg.geometry import Box
from wsiseg.vector.sweep import sweep_rows, take_finished

UInt8 = npt.NDArray[np.uint8]
Ring = npt.NDArray[np.int32]
"""int32 (n, 2) lattice points (x, y), the first not repeated, the uppermost leftmost first; no
three in a line."""

BLOCK_ROWS = 512
"""Rows read at once."""

_START_CAPACITY = 1 << 14


@dataclass(frozen=True, slots=True)
class TracedPolygon:
    """One region: its label, its outer ring and then its holes, and what lies inside.

    `area_px` counts its pixels. `mean_probability` is the mean of its pixels' probability in
    0..1, None if there was none to read.
    """

    label: int
    rings: tuple[Ring, ...]
    area_px: int
    mean_probability: float | None


def trace_array(labels: UInt8, probability: UInt8 | None = None) -> Iterator[TracedPolygon]:
    """Yield the polygons of a whole array uint8 (H, W); see `trace_mask`."""
    height, width = labels.shape

    def part_of(values: UInt8) -> Callable[[Box], UInt8]:
        return lambda box: values[box.y : box.bottom, box.x : box.right]

    read_probability = None if probability is None else part_of(probability)
    return trace_mask(part_of(labels), Box(0, 0, width, height), read_probability=read_probability)


def trace_mask(
    read_labels: Callable[[Box], UInt8],
    box: Box,
    *,
    read_probability: Callable[[Box], UInt8] | None = None,
    block_rows: int = BLOCK_ROWS,
) -> Iterator[TracedPolygon]:
    """Yield the polygons of a raster, each as soon as its last row is passed.

    Parameters
    ----------
    read_labels
        Gives uint8 (h, w) of a box; 0 (background) and 255 (not predicted) are no regions.
    box
        What to trace; polygons are in the frame of the box's own origin.
    read_probability
        Gives uint8 (h, w), 255 times the probability.
    block_rows
        Rows read at once; does not change the result.
    """
    sweep = _Sweep(box.width)
    for top in range(0, box.height, block_rows):
        part = Box(box.x, box.y + top, box.width, min(block_rows, box.height - top))
        probability = None if read_probability is None else read_probability(part)
        sweep.add(read_labels(part), probability)
        yield from sweep.finished()
    sweep.add(np.zeros((1, box.width), np.uint8), None)  # closes what touches the lower edge
    yield from sweep.finished()


class _Sweep:
    """The state between two blocks of rows."""

    def __init__(self, width: int) -> None:
        self._width = width
        self._y = 0
        self._has_probability = False
        self._above = np.zeros(width + 2, np.uint8)  # one pixel of background at either end
        self._region_above = np.zeros(width + 2, np.int32)
        self._falling = np.zeros(width + 1, np.int32)  # upper node of each open right edge
        self._rising = np.zeros(width + 1, np.int32)  # upper node of each open left edge
        self._counts = np.zeros(2, np.int64)  # nodes, regions
        # Nodes: x, y, next node, region, whether two regions' corners meet here.
        self._nodes = np.empty((_START_CAPACITY, 5), np.int32)
        # Regions: parent (union-find), label, pixels, sum of probability, last row.
        self._regions = np.empty((_START_CAPACITY, 5), np.int64)

    def add(self, labels: UInt8, probability: UInt8 | None) -> None:
        """Sweep over more rows."""
        self._has_probability |= probability is not None
        done = 0
        while done < len(labels):
            self._reserve()
            done = sweep_rows(
                labels, labels if probability is None else probability, done, self._y,
                self._above, self._region_above, self._falling, self._rising,
                self._counts, self._nodes, self._regions,
            )  # fmt: skip
        self._y += len(labels)

    def _reserve(self) -> None:
        """Have room for the worst row there can be: a chequerboard."""
        for name, count in (("_nodes", self._counts[0]), ("_regions", self._counts[1])):
            table = getattr(self, name)
            needed = int(count) + 4 * (self._width + 2)
            if len(table) < needed:
                grown = np.empty((max(2 * len(table), needed), table.shape[1]), table.dtype)
                grown[:count] = table[:count]
                setattr(self, name, grown)

    def finished(self) -> Iterator[TracedPolygon]:
        """Yield and forget the regions that do not reach the last row.

        By their last row, then by their first vertex in reading order: an order that does not
        depend on when this is called.
        """
        vertices, rings = take_finished(
            self._above, self._region_above, self._falling, self._rising,
            self._counts, self._nodes, self._regions,
        )  # fmt: skip
        order = np.lexsort((np.arange(len(rings)), rings[:, 0]))
        groups: list[list[npt.NDArray[np.int64]]] = []
        for i in order:
            if groups and groups[-1][0][0] == rings[i, 0]:
                groups[-1].append(rings[i])
            else:
                groups.append([rings[i]])
        groups.sort(key=lambda g: (g[0][4], *vertices[g[0][5]][::-1].tolist()))
        for group in groups:
            yield self._polygon(group, vertices)

    def _polygon(
        self, group: list[npt.NDArray[np.int64]], vertices: npt.NDArray[np.int32]
    ) -> TracedPolygon:
        outer: list[Ring] = []
        holes: list[Ring] = []
        for _, _, _, _, _, first, end, meets_itself, doubled_area in (r.tolist() for r in group):
            points = vertices[first:end]
            if not meets_itself:
                (outer if doubled_area > 0 else holes).append(points.copy())
                continue
            for part in _cut_at_meetings(points):
                (outer if _doubled_area(part) > 0 else holes).append(part)
        holes.sort(key=lambda hole: (int(hole[0, 1]), int(hole[0, 0])))
        _, label, area_px, total = group[0][:4].tolist()
        mean = total / (255 * area_px) if self._has_probability else None
        return TracedPolygon(label, (*outer, *holes), area_px, mean)


def _doubled_area(ring: Ring) -> int:
    """Return twice the signed area; positive for outer rings."""
    x, y = ring[:, 0].astype(np.int64), ring[:, 1].astype(np.int64)
    return int((x[:-1] * y[1:] - x[1:] * y[:-1]).sum() + x[-1] * y[0] - x[0] * y[-1])


def _cut_at_meetings(points: Ring) -> list[Ring]:
    """Cut a ring that passes a point twice into simple rings, each starting at its first point."""
    rings: list[Ring] = []
    path: list[tuple[int, int]] = []
    place: dict[tuple[int, int], int] = {}
    for x, y in points.tolist():
        if (x, y) in place:
            start = place[x, y]
            loop = path[start:]
            for vertex in loop:
                del place[vertex]
            del path[start:]
            rings.append(_from_first(loop))
        place[x, y] = len(path)
        path.append((x, y))
    return [_from_first(path), *rings]


def _from_first(loop: list[tuple[int, int]]) -> Ring:
    first = min(range(len(loop)), key=lambda i: (loop[i][1], loop[i][0]))
    return np.array(loop[first:] + loop[:first], np.int32)
