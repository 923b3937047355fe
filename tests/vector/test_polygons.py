"""Filling, filtering and simplifying polygons."""

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stnp
from scipy import ndimage

from wsiseg.vector.raster import fill_polygon
from wsiseg.vector.simplify import drop_small, simplify_shared
from wsiseg.vector.trace import trace_array

LABELS = stnp.arrays(
    np.uint8,
    st.tuples(st.integers(1, 14), st.integers(1, 14)),
    elements=st.sampled_from([0, 0, 1, 1, 2, 255]),
    fill=st.nothing(),
)


def blobs(size=200, seed=0):
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal((size, size)), 5)
    return np.digitize(noise, np.quantile(noise, [0.4, 0.7])).astype(np.uint8)


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
    kept = list(drop_small(polygons, min_area_px=min_area, min_hole_px=min_hole))
    assert [p.area_px for p in kept] == [p.area_px for p in polygons if p.area_px >= min_area]
    for polygon in kept:
        assert shape_of(polygon).is_valid
        assert all(shapely.Polygon(hole).area >= min_hole for hole in polygon.rings[1:])
    if not min_area and not min_hole:
        assert kept == polygons


@settings(max_examples=60, deadline=None)
@given(LABELS, st.sampled_from([1, 3]), st.sampled_from([0.5, 1.0, 2.0, 5.0]))
def test_simplified_polygons_are_valid_and_do_not_overlap(labels, zoom, tolerance):
    labels = np.kron(labels, np.ones((zoom, zoom), np.uint8))
    shapes = [shape_of(p) for p in simplify_shared(trace_array(labels), tolerance)]
    assert all(s.is_valid for s in shapes)
    rim = 2e-3 * sum(s.length for s in shapes)  # the grid of 0.001 px
    assert sum(s.area for s in shapes) <= shapely.union_all(shapes).area + rim


def test_simplifying_leaves_no_gap_between_neighbours():
    labels = blobs() + 1  # every pixel has a class: any gap is a mistake
    polygons = list(trace_array(labels))
    simple = list(simplify_shared(polygons, 2.0))
    total = shapely.union_all([shape_of(p) for p in simple])
    assert total.area == pytest.approx(labels.size, rel=1e-4)
    num_before = sum(len(r) for p in polygons for r in p.rings)
    num_after = sum(len(r) for p in simple for r in p.rings)
    assert num_after < num_before / 3


def test_simplifying_stays_near_the_outline_and_keeps_what_was_measured():
    polygons = list(trace_array(blobs(), np.full((200, 200), 128, np.uint8)))
    large = [p for p in polygons if p.area_px > 200]
    simple = {(p.label, p.area_px): p for p in simplify_shared(polygons, 1.0)}
    for polygon in large:
        found = simple[polygon.label, polygon.area_px]
        assert found.mean_probability == polygon.mean_probability
        assert shapely.hausdorff_distance(shape_of(found), shape_of(polygon)) < 3


def test_no_polygons_simplify_to_none():
    assert list(simplify_shared([], 1.0)) == []
