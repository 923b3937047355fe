"""Polygons on QuPath's grid of 0.01 px, and still valid there."""

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import shapely

from wsiseg.vector.batch import PolygonBatch, closed_rings
from wsiseg.vector.text import to_hundredths

GRID_PX = 0.01
"""QuPath rounds every coordinate to this, and refuses a file in which that breaks a polygon."""

Int64 = npt.NDArray[np.int64]
Float = npt.NDArray[np.float64]


@dataclass(frozen=True, slots=True)
class Frame:
    """Maps lattice points of a raster to coordinates of a file: `point * scale - offset`."""

    scale_x: float
    scale_y: float
    offset_x: float
    offset_y: float

    @property
    def keeps_the_lattice(self) -> bool:
        """Whether lattice lines stay apart after rounding, and right angles so stay valid."""
        return min(self.scale_x, self.scale_y) >= 2 * GRID_PX


@dataclass(frozen=True, slots=True)
class GridPolygons:
    """Polygons in hundredths of a pixel, int64 (V, 2), rings not closed; see `PolygonBatch`.

    `source` int64 (P,) : the polygon of the batch that each came of.
    """

    hundredths: Int64
    ring_starts: Int64
    polygon_starts: Int64
    source: Int64

    @property
    def num_vertices(self) -> int:
        """Vertices as the file holds them, rings closed."""
        return len(self.hundredths) + len(self.ring_starts) - 1


def on_grid(batch: PolygonBatch, frame: Frame, *, has_right_angles: bool) -> GridPolygons:
    """Round polygons to the grid; those that this would break are repaired, or split.

    Neighbours stay neighbours: a lattice point always goes to the same point of the grid.

    Parameters
    ----------
    has_right_angles
        Whether all edges lie on lattice lines: then nothing can break, and nothing is checked.
    """
    rounded = to_hundredths(
        batch.vertices, frame.scale_x, frame.scale_y, frame.offset_x, frame.offset_y
    )
    whole = GridPolygons(
        rounded, batch.ring_starts, batch.polygon_starts, np.arange(len(batch), dtype=np.int64)
    )
    if (has_right_angles and frame.keeps_the_lattice) or len(batch) == 0:
        return whole
    shapes = _shapes(rounded.astype(np.float64), batch)
    is_broken = ~shapely.is_valid(shapes) | (shapely.area(shapes) == 0)
    if not is_broken.any():
        return whole
    scale = np.array([frame.scale_x, frame.scale_y])
    offset = np.array([frame.offset_x, frame.offset_y])
    exact = _shapes(100 * (batch.vertices * scale - offset), batch)
    shapes[is_broken] = [_repaired(shape) for shape in exact[is_broken]]
    return _from_shapes(shapes)


def _shapes(vertices: Float, batch: PolygonBatch) -> npt.NDArray[np.object_]:
    closed, starts = closed_rings(vertices, batch.ring_starts)
    shapes: npt.NDArray[np.object_] = shapely.from_ragged_array(
        shapely.GeometryType.POLYGON, closed, (starts, batch.polygon_starts)
    )
    return shapes


def _repaired(shape: shapely.Polygon) -> shapely.Geometry:
    valid = shape if shape.is_valid else shapely.make_valid(shape)
    return shapely.set_precision(valid, 1.0)


def _from_shapes(shapes: npt.NDArray[np.object_]) -> GridPolygons:
    parts, source = shapely.get_parts(shapes, return_index=True)
    inner, index = shapely.get_parts(parts, return_index=True)  # of collections
    source = source[index]
    is_kept = (shapely.get_type_id(inner) == shapely.GeometryType.POLYGON) & (
        shapely.area(inner) > 0
    )
    if not is_kept.any():
        empty = np.zeros(1, np.int64)
        return GridPolygons(np.empty((0, 2), np.int64), empty, empty, np.empty(0, np.int64))
    _, coordinates, (ring_ends, polygon_starts) = shapely.to_ragged_array(inner[is_kept])
    closed = np.rint(coordinates).astype(np.int64)
    return GridPolygons(
        np.delete(closed, ring_ends[1:] - 1, axis=0),
        (ring_ends - np.arange(len(ring_ends))).astype(np.int64),
        polygon_starts.astype(np.int64),
        source[is_kept].astype(np.int64),
    )
