"""Filling and filtering polygons."""

import numpy as np
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stnp

from wsiseg.vector.batch import drop_small, each_polygon
from wsiseg.vector.raster import fill_polygon
from wsiseg.vector.trace import source_of_array, trace_array

LABELS = stnp.arrays(
    np.uint8,
    st.tuples(st.integers(1, 14), st.integers(1, 14)),
    elements=st.sampled_from([0, 0, 1, 1, 2, 255]),
    fill=st.nothing(),
)


def shape_of(polygon):
    return shapely.Polygon(polygon.rings[0], polygon.rings[1:])


def filled(shape, *rings):
    labels = np.zeros(shape, np.uint8)
    fill_polygon(labels, [np.array(ring, np.float64) for ring in rings], 1)
    return labels


@settings(max_examples=100, deadline=None)
@given(stnp.arrays(np.float64, (2, 4, 2), elements=st.floats(-20, 30).map(lambda v: round(v, 3))))
def test_a_pixel_is_filled_if_its_centre_lies_inside_by_the_even_odd_rule(rings):
    found = filled((12, 13), *rings)
    # Edges count as inside on their upper and left side only; centres on an edge prove nothing.
    centres = shapely.points(*(np.indices((12, 13))[::-1] + 0.5))
    expected = np.zeros((12, 13), bool)
    on_edge = np.zeros((12, 13), bool)
    for ring in rings:
        x, y = ring.T
        px, py = np.indices((12, 13))[::-1] + 0.5
        for i in range(4):
            j = (i + 1) % 4
            straddles = (y[i] <= py) != (y[j] <= py)
            with np.errstate(divide="ignore", invalid="ignore"):
                at = x[i] + (py - y[i]) * (x[j] - x[i]) / (y[j] - y[i])
            expected ^= straddles & (px >= at)
        on_edge |= shapely.dwithin(centres, shapely.LinearRing(ring), 1e-9)
    assert ((found == 1) == expected)[~on_edge].all()


def test_an_open_ring_fills_like_a_closed_one():
    ring = [[1, 1], [7, 2], [5, 9]]
    assert (filled((10, 10), ring) == filled((10, 10), [*ring, ring[0]])).all()
    assert filled((10, 10), ring).sum() > 10


def test_a_polygon_beyond_the_array_fills_what_lies_inside():
    assert filled((5, 6), [[-1e8, -1e8], [1e8, -1e8], [1e8, 1e8], [-1e8, 1e8]]).all()
    assert not filled((5, 6), [[6, 0], [9, 0], [9, 5], [6, 5]]).any()
    assert not filled((5, 6), [[-9, -9], [-2, -9], [-2, 5]]).any()


def test_neighbours_that_share_a_slanted_edge_share_no_pixel_and_leave_none():
    left = filled((20, 20), [[0, 0], [7.3, 0], [13.1, 20], [0, 20]])
    right = filled((20, 20), [[7.3, 0], [20, 0], [20, 20], [13.1, 20]])
    assert (left + right == 1).all()


@settings(max_examples=100, deadline=None)
@given(LABELS, st.integers(0, 8), st.integers(0, 8))
def test_small_polygons_are_dropped_and_small_holes_filled(labels, min_area, min_hole):
    polygons = list(trace_array(labels))
    kept = list(
        each_polygon(
            drop_small(source_of_array(labels)(False), min_area_px=min_area, min_hole_px=min_hole)
        )
    )
    assert [p.area_px for p in kept] == [p.area_px for p in polygons if p.area_px >= min_area]
    for polygon in kept:
        assert shape_of(polygon).is_valid
        assert all(shapely.Polygon(hole).area >= min_hole for hole in polygon.rings[1:])
    if not min_area and not min_hole:
        assert [[r.tolist() for r in p.rings] for p in kept] == [
            [r.tolist() for r in p.rings] for p in polygons
        ]
