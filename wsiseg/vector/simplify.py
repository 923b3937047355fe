"""Fewer vertices: borders that regions share move together, so that no gap opens between them."""

import numpy as np
import shapely

from wsiseg.vector.batch import PolygonBatch


def simplify_shared(batch: PolygonBatch, tolerance_px: float) -> PolygonBatch:
    """Simplify outlines (Visvalingam-Whyatt over the whole coverage) by about `tolerance_px`.

    Parameters
    ----------
    batch
        All polygons of a raster, traced `with_junctions`: a border counts as shared if both
        sides have the same vertices.

    Returns
    -------
    PolygonBatch
        Its vertices are some of those given, so they still are lattice points. Measurements stay
        those of the pixels. A polygon that the tolerance swallows is left out.
    """
    if len(batch) == 0:
        return batch
    simple = shapely.coverage_simplify(batch.to_shapely(), tolerance_px)
    parts, source = shapely.get_parts(simple, return_index=True)
    is_kept = shapely.area(parts) > 0
    parts, source = parts[is_kept], source[is_kept]
    _, coordinates, (ring_ends, polygon_starts) = shapely.to_ragged_array(parts)
    closed = np.rint(coordinates).astype(np.int32)
    vertices = np.delete(closed, ring_ends[1:] - 1, axis=0)
    ring_starts = ring_ends - np.arange(len(ring_ends))
    return PolygonBatch(
        vertices,
        ring_starts.astype(np.int64),
        polygon_starts.astype(np.int64),
        batch.labels[source],
        batch.areas_px[source],
        batch.probabilities[source],
    )
