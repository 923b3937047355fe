"""Fewer vertices: borders that regions share move together, so that no gap opens between them."""

from collections.abc import Iterable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import shapely

from wsiseg.vector.trace import TracedPolygon


def drop_small(
    polygons: Iterable[TracedPolygon], *, min_area_px: float, min_hole_px: float
) -> Iterator[TracedPolygon]:
    """Leave out polygons smaller than `min_area_px` and fill holes smaller than `min_hole_px`.

    A polygon is judged by its pixels, its holes not counted; what is measured inside it stays.
    """
    for polygon in polygons:
        if polygon.area_px < min_area_px:
            continue
        outer, *holes = polygon.rings
        kept = [hole for hole in holes if shapely.Polygon(hole).area >= min_hole_px]
        yield polygon if len(kept) == len(holes) else replace(polygon, rings=(outer, *kept))


def simplify_shared(
    polygons: Iterable[TracedPolygon], tolerance_px: float
) -> Iterator[TracedPolygon]:
    """Simplify outlines (Visvalingam-Whyatt over the whole coverage) by about `tolerance_px`.

    Holds all polygons in memory. The rings become float64 (n, 2). Measurements stay those of the
    pixels. A polygon that the tolerance swallows is left out.
    """
    kept = list(polygons)
    # A border is shared only if both sides have the same vertices: one at every pixel corner.
    shapes = shapely.segmentize([shapely.Polygon(p.rings[0], p.rings[1:]) for p in kept], 1.0)
    simple = shapely.coverage_simplify(shapes, tolerance_px)
    for polygon, shape in zip(kept, shapely.set_precision(simple, 1e-3), strict=True):
        for part in shapely.get_parts(shape):
            if part.area > 0:
                rings = [part.exterior, *part.interiors]
                yield replace(polygon, rings=tuple(_open(ring) for ring in rings))


def _open(ring: shapely.LinearRing) -> Any:  # noqa: ANN401 - a Ring, but of float64
    return np.asarray(shapely.normalize(ring).coords)[:-1]
