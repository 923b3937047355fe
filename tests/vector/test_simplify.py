"""Simplified borders move together: no gap, no overlap, near where they were."""

import itertools

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stnp
from scipy import ndimage

from wsiseg.vector.batch import joined
from wsiseg.vector.raster import fill_polygon
from wsiseg.vector.rounding import Frame, on_grid
from wsiseg.vector.simplify import simplify_shared
from wsiseg.vector.trace import source_of_array

LABELS = stnp.arrays(
    np.uint8,
    st.tuples(st.integers(1, 14), st.integers(1, 14)),
    elements=st.sampled_from([0, 0, 1, 1, 2, 255]),
    fill=st.nothing(),
)


def blobs(size=200, seed=0):
    noise = ndimage.gaussian_filter(np.random.default_rng(seed).standard_normal((size, size)), 5)
    return np.digitize(noise, np.quantile(noise, [0.4, 0.7])).astype(np.uint8)


def simplified(labels, tolerance, probability=None):
    return simplify_shared(joined(source_of_array(labels, probability)(True)), tolerance)


def filled(batch, shape):
    labels = np.zeros(shape, np.uint8)
    for polygon in batch.polygons():
        fill_polygon(labels, [ring.astype(np.float64) for ring in polygon.rings], polygon.label)
    return labels


@settings(max_examples=100, deadline=None)
@given(LABELS)
def test_with_junctions_neighbours_have_the_same_vertices_along_their_border(labels):
    batch = joined(source_of_array(labels)(True))
    assert shapely.coverage_is_valid(batch.to_shapely())
    exact = joined(source_of_array(labels)(False))
    assert (batch.areas_px == exact.areas_px).all()
    assert shapely.equals(batch.to_shapely(), exact.to_shapely()).all()


@settings(max_examples=60, deadline=None)
@given(LABELS, st.sampled_from([1, 3]), st.sampled_from([0.5, 1.0, 2.0, 5.0]))
def test_simplified_polygons_are_valid_share_their_borders_and_overlap_nowhere(
    labels, zoom, tolerance
):
    labels = np.kron(labels, np.ones((zoom, zoom), np.uint8))
    shapes = simplified(labels, tolerance).to_shapely()
    assert shapely.is_valid(shapes).all()
    assert shapely.coverage_is_valid(shapes)
    assert shapely.union_all(shapes).area == pytest.approx(shapely.area(shapes).sum(), rel=1e-12)


@settings(max_examples=20, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([1.0, 2.0, 4.0]))
def test_simplifying_leaves_no_gap_between_neighbours(seed, tolerance):
    labels = blobs(120, seed) + 1  # every pixel has a class: any gap is a mistake
    shapes = simplified(labels, tolerance).to_shapely()
    whole = shapely.union_all(shapes)
    assert len(shapely.get_parts(whole)) == 1
    assert shapely.get_num_interior_rings(whole) == 0
    assert shapely.area(shapes).sum() == pytest.approx(whole.area, rel=1e-12)
    assert whole.area == pytest.approx(labels.size, abs=4 * tolerance**2)  # corners of the frame


def test_shared_borders_stay_shared_after_rounding_to_the_file():
    batch = simplified(blobs() + 1, 2.0)
    polygons = on_grid(batch, Frame(4.0012, 3.7777, 0, 0), has_right_angles=False)
    closed = polygons.hundredths.astype(np.float64)
    starts = polygons.ring_starts
    rings = [closed[a:b] for a, b in itertools.pairwise(starts)]
    shapes = [
        shapely.Polygon(rings[a], rings[a + 1 : b])
        for a, b in zip(polygons.polygon_starts[:-1], polygons.polygon_starts[1:], strict=True)
    ]
    assert shapely.is_valid(shapes).all()
    assert shapely.coverage_is_valid(shapes)
    assert shapely.get_num_interior_rings(shapely.union_all(shapes)) == 0


def test_there_are_far_fewer_vertices_and_they_lie_on_the_lattice():
    exact = joined(source_of_array(blobs())(False))
    simple = simplified(blobs(), 2.0)
    assert simple.num_vertices < exact.num_vertices / 3
    assert {*map(tuple, simple.vertices.tolist())} <= {
        *map(tuple, joined(source_of_array(blobs())(True)).vertices.tolist())
    }


def test_simplifying_stays_near_the_outline_and_keeps_what_was_measured():
    probability = np.full((200, 200), 128, np.uint8)
    exact = joined(source_of_array(blobs(), probability)(True))
    simple = simplified(blobs(), 1.0, probability)
    shapes = dict(zip(simple.areas_px.tolist(), simple.to_shapely(), strict=True))
    assert {*simple.probabilities.tolist()} == {128 / 255}
    large = exact.selected(exact.areas_px > 200)
    assert len(large) > 5
    for area, shape in zip(large.areas_px.tolist(), large.to_shapely(), strict=True):
        assert shapely.hausdorff_distance(shapes[area], shape) < 3


@settings(max_examples=30, deadline=None)
@given(st.integers(0, 2**32 - 1))
def test_a_tolerance_of_half_a_pixel_keeps_99_percent_of_each_class(seed):
    labels = blobs(100, seed)
    found = filled(simplified(labels, 0.5), labels.shape)
    for label in (1, 2):
        both = (labels == label) & (found == label)
        either = (labels == label) | (found == label)
        assert both.sum() >= 0.99 * either.sum()


def test_no_polygons_simplify_to_none():
    assert len(simplified(np.zeros((4, 4), np.uint8), 1.0)) == 0
