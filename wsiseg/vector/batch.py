"""Many traced polygons in a few flat arrays, so that nothing is done polygon by polygon in Python.

Frame: lattice points of the raster, integers; pixel (i, j) has its corners at i, i+1 and j, j+1.
"""

import itertools
import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property

import numpy as np
import numpy.typing as npt
import shapely

from wsiseg.vector.rings import doubled_area, gather

Ring = npt.NDArray[np.int32]
"""int32 (n, 2) lattice points (x, y), the first not repeated, the uppermost leftmost first; no
three in a line."""

Int32 = npt.NDArray[np.int32]
Int64 = npt.NDArray[np.int64]
Bool = npt.NDArray[np.bool_]


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


@dataclass(frozen=True)
class PolygonBatch:
    """Polygons, each an outer ring and its holes.

    Parameters
    ----------
    vertices
        int32 (V, 2) of (x, y), ring after ring, each a `Ring`.
    ring_starts
        int64 (R + 1,): where each ring begins in `vertices`; the last entry is V.
    polygon_starts
        int64 (P + 1,): where each polygon begins among the rings; the last entry is R.
    labels
        int64 (P,).
    areas_px
        int64 (P,): pixels of each polygon.
    probabilities
        float64 (P,): mean probability of the pixels in 0..1; NaN where there was none to read.
    """

    vertices: Int32
    ring_starts: Int64
    polygon_starts: Int64
    labels: Int64
    areas_px: Int64
    probabilities: npt.NDArray[np.float64]

    def __len__(self) -> int:
        return len(self.labels)

    @property
    def num_vertices(self) -> int:
        """Vertices, the first of each ring counted once more at its end, as files hold them."""
        return len(self.vertices) + len(self.ring_starts) - 1

    @cached_property
    def ring_areas(self) -> npt.NDArray[np.float64]:
        """Area of each ring in pixels, float64 (R,), not negative."""
        x, y = self.vertices[:, 0].astype(np.int64), self.vertices[:, 1].astype(np.int64)
        after = np.arange(1, len(x) + 1)
        after[self.ring_starts[1:] - 1] = self.ring_starts[:-1]
        cross = x * y[after] - x[after] * y
        return np.abs(np.add.reduceat(cross, self.ring_starts[:-1])) / 2

    def polygons(self) -> Iterator[TracedPolygon]:
        """Yield the polygons one by one."""
        for i in range(len(self)):
            first, end = self.polygon_starts[i], self.polygon_starts[i + 1]
            starts = self.ring_starts[first : end + 1]
            rings = tuple(self.vertices[a:b].copy() for a, b in itertools.pairwise(starts))
            mean = float(self.probabilities[i])
            known = None if math.isnan(mean) else mean
            yield TracedPolygon(int(self.labels[i]), rings, int(self.areas_px[i]), known)

    def selected(self, keep: Bool, keep_ring: Bool | None = None) -> "PolygonBatch":
        """Return the polygons of `keep` bool (P,), of their rings those of `keep_ring` (R,)."""
        counts = np.diff(self.polygon_starts)
        rings = np.repeat(keep, counts)
        if keep_ring is not None:
            rings &= keep_ring
        chosen = np.flatnonzero(rings)
        vertices, starts = gather(
            self.vertices, self.ring_starts[chosen], self.ring_starts[chosen + 1]
        )
        kept_counts = np.diff(np.concatenate([[0], np.cumsum(rings)])[self.polygon_starts])[keep]
        return PolygonBatch(
            vertices,
            starts,
            np.concatenate([[0], np.cumsum(kept_counts)]).astype(np.int64),
            self.labels[keep],
            self.areas_px[keep],
            self.probabilities[keep],
        )

    def part(self, first: int, end: int) -> "PolygonBatch":
        """Return the polygons [first, end)."""
        rings = self.polygon_starts[first : end + 1]
        vertices = self.ring_starts[rings[0] : rings[-1] + 1]
        return PolygonBatch(
            self.vertices[vertices[0] : vertices[-1]],
            vertices - vertices[0],
            rings - rings[0],
            self.labels[first:end],
            self.areas_px[first:end],
            self.probabilities[first:end],
        )

    def to_shapely(self) -> npt.NDArray[np.object_]:
        """Return shapely polygons in the frame of the raster."""
        closed, starts = closed_rings(self.vertices.astype(np.float64), self.ring_starts)
        polygons: npt.NDArray[np.object_] = shapely.from_ragged_array(
            shapely.GeometryType.POLYGON, closed, (starts, self.polygon_starts)
        )
        return polygons


@dataclass(frozen=True, slots=True)
class LargePolygon:
    """One polygon with so many rings that they are given piece by piece; otherwise like a batch.

    `pieces` yields (vertices, ring_starts) as in `PolygonBatch`, the outer ring first. It may be
    called again.
    """

    label: int
    area_px: int
    mean_probability: float | None
    pieces: Callable[[], Iterator[tuple[Int32, Int64]]]

    def loaded(self) -> PolygonBatch:
        """Return the polygon in memory."""
        vertices, starts = zip(*self.pieces(), strict=True)
        offsets = np.cumsum([0, *(len(v) for v in vertices)])
        parts = [s[:-1] + o for s, o in zip(starts, offsets[:-1], strict=True)]
        ring_starts = np.concatenate([*parts, offsets[-1:]])
        mean = math.nan if self.mean_probability is None else self.mean_probability
        return PolygonBatch(
            np.concatenate(vertices),
            ring_starts,
            np.array([0, len(ring_starts) - 1]),
            np.array([self.label]),
            np.array([self.area_px]),
            np.array([mean]),
        )


Traced = PolygonBatch | LargePolygon
"""What tracing yields; both in the same order in which the polygons alone would come."""


def each_polygon(traced: Iterable[Traced]) -> Iterator[TracedPolygon]:
    """Yield the polygons one by one."""
    for item in traced:
        batch = item.loaded() if isinstance(item, LargePolygon) else item
        yield from batch.polygons()


def batch_of(polygons: Iterable[TracedPolygon]) -> PolygonBatch:
    """Return polygons as one batch."""
    kept = list(polygons)
    rings = [ring for polygon in kept for ring in polygon.rings]
    means = [math.nan if p.mean_probability is None else p.mean_probability for p in kept]
    return PolygonBatch(
        np.concatenate([*rings, np.empty((0, 2), np.int32)]).astype(np.int32),
        np.cumsum([0, *(len(ring) for ring in rings)], dtype=np.int64),
        np.cumsum([0, *(len(polygon.rings) for polygon in kept)], dtype=np.int64),
        np.array([p.label for p in kept], np.int64),
        np.array([p.area_px for p in kept], np.int64),
        np.array(means, np.float64),
    )


def joined(traced: Iterable[Traced]) -> PolygonBatch:
    """Return all polygons in one batch, in memory."""
    batches = [t.loaded() if isinstance(t, LargePolygon) else t for t in traced]
    if not batches:
        return batch_of([])
    vertices = np.cumsum([0, *(len(b.vertices) for b in batches)])
    rings = np.cumsum([0, *(len(b.ring_starts) - 1 for b in batches)])
    ring_starts = [b.ring_starts[:-1] + v for b, v in zip(batches, vertices[:-1], strict=True)]
    polygon_starts = [b.polygon_starts[:-1] + r for b, r in zip(batches, rings[:-1], strict=True)]
    return PolygonBatch(
        np.concatenate([b.vertices for b in batches]),
        np.concatenate([*ring_starts, vertices[-1:]]),
        np.concatenate([*polygon_starts, rings[-1:]]),
        np.concatenate([b.labels for b in batches]),
        np.concatenate([b.areas_px for b in batches]),
        np.concatenate([b.probabilities for b in batches]),
    )


def closed_rings(
    vertices: npt.NDArray[np.float64], ring_starts: Int64
) -> tuple[npt.NDArray[np.float64], Int64]:
    """Repeat the first vertex of each ring at its end; return the vertices and where rings begin.

    `vertices` : float64 (V, 2).
    """
    closed = np.insert(vertices, ring_starts[1:], vertices[ring_starts[:-1]], axis=0)
    return closed, ring_starts + np.arange(len(ring_starts))


def drop_small(
    traced: Iterable[Traced], *, min_area_px: float, min_hole_px: float
) -> Iterator[Traced]:
    """Leave out polygons smaller than `min_area_px` and fill holes smaller than `min_hole_px`.

    A polygon is judged by its pixels, its holes not counted; what is measured inside it stays.
    """
    for item in traced:
        if isinstance(item, LargePolygon):
            if item.area_px >= min_area_px:
                yield replace(item, pieces=_without_small_holes(item, min_hole_px))
            continue
        keep = item.areas_px >= min_area_px
        keep_ring = item.ring_areas >= min_hole_px
        keep_ring[item.polygon_starts[:-1]] = True
        if keep.all() and keep_ring.all():
            yield item
        elif keep.any():
            yield item.selected(keep, keep_ring)


def _without_small_holes(
    polygon: LargePolygon, min_hole_px: float
) -> Callable[[], Iterator[tuple[Int32, Int64]]]:
    def pieces() -> Iterator[tuple[Int32, Int64]]:
        is_first = True
        for vertices, starts in polygon.pieces():
            areas = [abs(doubled_area(vertices, a, b)) / 2 for a, b in itertools.pairwise(starts)]
            keep = np.array(areas) >= min_hole_px
            keep[0] |= is_first  # the outer ring
            is_first = False
            if keep.any():
                yield gather(vertices, starts[:-1][keep], starts[1:][keep])

    return pieces
