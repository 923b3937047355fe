"""Label raster to polygons along pixel edges, exactly, line by line.

The raster is swept from top to bottom. On each lattice line between two rows of pixels the corners
of every region are found, and linked into rings by what is open above (vertical edges) and to the
left (horizontal edges). Nothing depends on how the raster is cut into blocks, so there are no
seams to join. What is kept in memory is one row of runs and the outlines that are still open;
holes that are closed inside an open region wait in a temporary file.

Regions are 4-connected. Each edge has its region on the right hand (y pointing down), so outer
rings run clockwise on the screen and holes the other way round. Every ring is simple: one that
meets itself in a point is cut there.
"""

from collections.abc import Callable, Iterator

import numpy as np
import numpy.typing as npt

from wsiseg.geometry import Box
from wsiseg.vector.batch import LargePolygon, PolygonBatch, Traced, TracedPolygon, each_polygon
from wsiseg.vector.rings import compact, gather, take_closed
from wsiseg.vector.spill import RingSpill
from wsiseg.vector.sweep import NODES, REGIONS, RUNS, sweep_rows

UInt8 = npt.NDArray[np.uint8]
Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]

BLOCK_ROWS = 512
"""Rows read at once."""

LARGE_VERTICES = 1 << 18
"""A polygon with more vertices than this in closed holes is a `LargePolygon`."""

_START_CAPACITY = 1 << 14


def trace_array(labels: UInt8, probability: UInt8 | None = None) -> Iterator[TracedPolygon]:
    """Yield the polygons of a whole array uint8 (H, W), one by one; see `trace_batches`."""
    return each_polygon(source_of_array(labels, probability)(False))


def source_of_array(
    labels: UInt8, probability: UInt8 | None = None
) -> Callable[[bool], Iterator[Traced]]:
    """Return a function that traces a whole array; its argument is `with_junctions`."""
    height, width = labels.shape
    read, read_probability = _part_of(labels), None
    if probability is not None:
        read_probability = _part_of(probability)
    return lambda with_junctions: trace_batches(
        read,
        Box(0, 0, width, height),
        read_probability=read_probability,
        with_junctions=with_junctions,
    )


def _part_of(values: UInt8) -> Callable[[Box], UInt8]:
    return lambda box: values[box.y : box.bottom, box.x : box.right]


def trace_mask(
    read_labels: Callable[[Box], UInt8],
    box: Box,
    *,
    read_probability: Callable[[Box], UInt8] | None = None,
    block_rows: int = BLOCK_ROWS,
) -> Iterator[TracedPolygon]:
    """Yield the polygons of a raster one by one; see `trace_batches`."""
    return each_polygon(
        trace_batches(read_labels, box, read_probability=read_probability, block_rows=block_rows)
    )


def trace_batches(
    read_labels: Callable[[Box], UInt8],
    box: Box,
    *,
    read_probability: Callable[[Box], UInt8] | None = None,
    block_rows: int = BLOCK_ROWS,
    large_vertices: int = LARGE_VERTICES,
    with_junctions: bool = False,
) -> Iterator[Traced]:
    """Yield the polygons of a raster, each as soon as its last row is passed.

    By their last row, then by their first vertex in reading order.

    Parameters
    ----------
    read_labels
        Gives uint8 (h, w) of a box; 0 (background) and 255 (not predicted) are no regions.
    box
        What to trace; polygons are in the frame of the box's own origin.
    read_probability
        Gives uint8 (h, w), 255 times the probability.
    block_rows
        Rows read at once; does not change the polygons, nor their order.
    large_vertices
        Polygons with more vertices in closed holes come as a `LargePolygon`.
    with_junctions
        Also put a vertex on a straight edge where two other regions (or one and the background)
        part, so that neighbours have the same vertices along the border that they share.
    """
    sweep = _Sweep(box.width, large_vertices, with_junctions=with_junctions)
    for top in range(0, box.height, block_rows):
        part = Box(box.x, box.y + top, box.width, min(block_rows, box.height - top))
        probability = None if read_probability is None else read_probability(part)
        sweep.add(read_labels(part), probability)
        yield from sweep.finished()
    sweep.add(np.zeros((1, box.width), np.uint8), None)  # closes what touches the lower edge
    yield from sweep.finished()


class _Sweep:
    """The state between two blocks of rows."""

    def __init__(self, width: int, large_vertices: int, *, with_junctions: bool) -> None:
        self._width = width
        self._large_vertices = large_vertices
        self._with_junctions = with_junctions
        self._y = 0
        self._has_probability = False
        self._above = np.zeros((width + 4, 3), np.int32)  # see `sweep` for these tables
        self._falling = np.zeros(width + 2, np.int32)
        self._rising = np.zeros(width + 2, np.int32)
        self._counts = np.zeros(3, np.int64)
        self._counts[RUNS] = 1  # a row of background
        self._nodes = np.empty((_START_CAPACITY, 5), np.int32)
        self._regions = np.empty((_START_CAPACITY, 5), np.int64)
        self._spill = RingSpill()

    def add(self, labels: UInt8, probability: UInt8 | None) -> None:
        """Sweep over more rows."""
        self._has_probability |= probability is not None
        if probability is None:
            probability = np.empty((0, 0), np.uint8)
        done = 0
        while done < len(labels):
            self._reserve()
            done = sweep_rows(
                labels, probability, done, self._y, self._with_junctions,
                self._above, self._falling, self._rising,
                self._counts, self._nodes, self._regions,
            )  # fmt: skip
        self._y += len(labels)

    def _reserve(self) -> None:
        """Have room for the worst row there can be: a chequerboard."""
        for name, count in (("_nodes", self._counts[NODES]), ("_regions", self._counts[REGIONS])):
            table = getattr(self, name)
            needed = int(count) + 4 * (self._width + 2)
            if len(table) < needed:
                grown = np.empty((max(2 * len(table), needed), table.shape[1]), table.dtype)
                grown[:count] = table[:count]
                setattr(self, name, grown)

    def finished(self) -> Iterator[Traced]:
        """Yield and forget the regions that do not reach the last row, in their order.

        It does not depend on when this is called.
        """
        vertices, rings, root_of, is_open = take_closed(
            self._above, self._rising, self._counts, self._nodes, self._regions
        )
        facts = self._regions[: len(root_of)].copy()
        new_number = compact(
            root_of, is_open, self._above, self._falling, self._rising,
            self._counts, self._nodes, self._regions,
        )  # fmt: skip
        self._spill.renumber(root_of)
        spilled = self._spill.vertices_of_regions(len(root_of))
        is_finished = ~is_open & (root_of == np.arange(len(root_of)))
        is_large = is_finished & (spilled > self._large_vertices)
        to_spill = is_open[rings[:, 0]] | (is_large[rings[:, 0]] & (rings[:, 3] < 0))
        self._spill.add(vertices, rings[to_spill])
        rings = rings[~to_spill]
        if is_finished.any():
            wanted = is_finished & (spilled > 0) & ~is_large
            if wanted.any():
                vertices, rings = self._with_spilled(vertices, rings, wanted)
            yield from self._in_order(vertices, rings, facts, is_large)
        self._spill.renumber(new_number)

    def _with_spilled(
        self, vertices: Int32, rings: Int64, regions: npt.NDArray[np.bool_]
    ) -> tuple[Int32, Int64]:
        """Add the holes of some regions that were spilled."""
        rows = self._spill.take(regions)
        parts, more = [vertices], [rings]
        at, done = len(vertices), 0
        for piece, starts in self._spill.read(rows):
            added = np.full((len(starts) - 1, 4), -1, np.int64)
            added[:, 0] = rows["region"][done : done + len(added)]
            added[:, 1], added[:, 2] = at + starts[:-1], at + starts[1:]
            done, at = done + len(added), at + len(piece)
            parts.append(piece)
            more.append(added)
        return np.concatenate(parts), np.concatenate(more)

    def _in_order(
        self, vertices: Int32, rings: Int64, facts: Int64, is_large: npt.NDArray[np.bool_]
    ) -> Iterator[Traced]:
        """Yield the finished regions as batches, and the large ones between them."""
        region, is_hole = rings[:, 0], rings[:, 3] < 0
        x, y = vertices[rings[:, 1]].T
        outer = np.flatnonzero(~is_hole)
        outer = outer[np.lexsort((x[outer], y[outer], facts[region[outer], 4]))]
        order = region[outer]
        rank = np.empty(len(facts), np.int64)
        rank[order] = np.arange(len(order))
        rings = rings[np.lexsort((x, y, is_hole, rank[region]))]
        gathered, ring_starts = gather(vertices, rings[:, 1], rings[:, 2])
        batch = PolygonBatch(
            gathered,
            ring_starts,
            np.searchsorted(rank[rings[:, 0]], np.arange(len(order) + 1)),
            facts[order, 1],
            facts[order, 2],
            facts[order, 3] / (255 * facts[order, 2])
            if self._has_probability
            else np.full(len(order), np.nan),
        )
        done = 0
        for i in np.flatnonzero(is_large[order]).tolist():
            if i > done:
                yield batch.part(done, i)
            yield self._large(batch.part(i, i + 1), int(order[i]), len(facts))
            done = i + 1
        if done < len(batch):
            yield batch.part(done, len(batch))

    def _large(self, outline: PolygonBatch, region: int, num_regions: int) -> LargePolygon:
        rows = self._spill.take(np.arange(num_regions) == region)
        spill = self._spill

        def pieces() -> Iterator[tuple[Int32, Int64]]:
            yield outline.vertices, outline.ring_starts
            yield from spill.read(rows)

        mean = float(outline.probabilities[0])
        return LargePolygon(
            int(outline.labels[0]),
            int(outline.areas_px[0]),
            mean if self._has_probability else None,
            pieces,
        )
