"""Tracing is exact: the polygons are the pixels, whatever the raster and however it is read."""

import tracemalloc

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stnp
from scipy import ndimage

from wsiseg.geometry import Box
from wsiseg.vector.raster import fill_polygon
from wsiseg.vector.trace import trace_array, trace_mask

LABELS = stnp.arrays(
    np.uint8,
    st.tuples(st.integers(1, 14), st.integers(1, 14)),
    elements=st.sampled_from([0, 0, 1, 1, 1, 2, 255]),
    fill=st.nothing(),
)
EXAMPLES = settings(max_examples=200, deadline=None)


def fill(polygons, shape):
    labels = np.zeros(shape, np.uint8)
    for polygon in polygons:
        fill_polygon(labels, [ring.astype(np.float64) for ring in polygon.rings], polygon.label)
    return labels


def shape_of(polygon):
    return shapely.Polygon(polygon.rings[0], polygon.rings[1:])


def facts(polygons):
    return [
        (p.label, p.area_px, p.mean_probability, [r.tolist() for r in p.rings]) for p in polygons
    ]


@EXAMPLES
@given(LABELS)
def test_filling_what_was_traced_gives_the_raster_back(labels):
    known = np.where(labels == 255, 0, labels)
    assert (fill(trace_array(labels), labels.shape) == known).all()


@EXAMPLES
@given(LABELS)
def test_there_is_one_polygon_per_four_connected_region(labels):
    polygons = list(trace_array(labels))
    for label in (1, 2):
        regions, count = ndimage.label(labels == label)
        sizes = sorted(np.bincount(regions.ravel())[1:].tolist())
        found = [p for p in polygons if p.label == label]
        assert sorted(p.area_px for p in found) == sizes
        assert len(found) == count


@EXAMPLES
@given(LABELS)
def test_every_polygon_is_valid_also_on_qupaths_grid_and_as_large_as_its_pixels(labels):
    for polygon in trace_array(labels):
        shape = shape_of(polygon)
        assert shape.is_valid, shapely.is_valid_reason(shape)
        assert shapely.set_precision(shape, 0.01).area == shape.area == polygon.area_px


@EXAMPLES
@given(LABELS)
def test_polygons_overlap_nowhere(labels):
    shapes = [shape_of(p) for p in trace_array(labels)]
    assert shapely.union_all(shapes).area == sum(s.area for s in shapes)


@EXAMPLES
@given(LABELS, st.integers(1, 15))
def test_the_result_does_not_depend_on_how_many_rows_are_read_at_once(labels, block_rows):
    height, width = labels.shape
    probability = (np.arange(labels.size) * 37 % 256).astype(np.uint8).reshape(labels.shape)

    def part_of(values):
        return lambda box: values[box.y : box.bottom, box.x : box.right]

    by_blocks = trace_mask(
        part_of(labels),
        Box(0, 0, width, height),
        read_probability=part_of(probability),
        block_rows=block_rows,
    )
    assert facts(by_blocks) == facts(trace_array(labels, probability))


@EXAMPLES
@given(LABELS)
def test_rings_are_canonical(labels):
    for polygon in trace_array(labels):
        for i, ring in enumerate(polygon.rings):
            assert ring.dtype == np.int32
            assert (ring[0] != ring[-1]).any()
            points = [(y, x) for x, y in ring.tolist()]
            assert points[0] == min(points)
            assert len({*points}) == len(points), "a ring meets itself"
            steps = np.diff(np.concatenate([ring, ring[:1]]), axis=0)
            horizontal = steps[:, 1] == 0
            assert ((steps == 0).sum(axis=1) == 1).all()
            assert (horizontal != np.roll(horizontal, 1)).all(), "three points in a line"
            x, y = ring.T.astype(np.int64)
            doubled = (x * np.roll(y, -1) - np.roll(x, -1) * y).sum()
            assert doubled > 0 if i == 0 else doubled < 0
        starts = [tuple(ring[0, ::-1].tolist()) for ring in polygon.rings[1:]]
        assert starts == sorted(starts)


@EXAMPLES
@given(LABELS)
def test_polygons_come_by_their_last_row_and_then_by_their_first_vertex(labels):
    keys = [(p.rings[0][:, 1].max(), *p.rings[0][0, ::-1].tolist()) for p in trace_array(labels)]
    assert keys == sorted(keys)
    assert len({*keys}) == len(keys)


@settings(max_examples=40, deadline=None)
@given(LABELS, st.integers(0, 2**32 - 1))
def test_the_mean_probability_is_that_of_the_pixels(labels, seed):
    probability = np.random.default_rng(seed).integers(0, 256, labels.shape, dtype=np.uint8)
    for polygon in trace_array(labels, probability):
        pixels = fill([polygon], labels.shape) > 0
        assert polygon.mean_probability == pytest.approx(probability[pixels].mean() / 255)
    assert all(p.mean_probability is None for p in trace_array(labels))


def test_corners_that_touch_do_not_connect():
    diagonal = np.array([[1, 0], [0, 1]], np.uint8)
    assert [p.area_px for p in trace_array(diagonal)] == [1, 1]


def test_a_ring_that_meets_itself_is_cut_into_simple_ones():
    pinched = np.array([[1, 1, 1], [1, 0, 1], [1, 1, 0]], np.uint8)
    (polygon,) = trace_array(pinched)
    assert [len(ring) for ring in polygon.rings] == [6, 4]
    assert shape_of(polygon).is_valid


def test_regions_nest_to_any_depth():
    labels = np.zeros((40, 40), np.uint8)
    for depth in range(20):
        labels[depth : 40 - depth, depth : 40 - depth] = (depth + 1) % 3
    polygons = list(trace_array(labels))
    assert (fill(polygons, labels.shape) == labels).all()
    assert {len(p.rings) for p in polygons} == {1, 2}


def test_background_and_what_is_not_predicted_have_no_polygons():
    assert list(trace_array(np.zeros((3, 4), np.uint8))) == []
    assert list(trace_array(np.full((3, 4), 255, np.uint8))) == []


def test_all_254_labels_are_traced():
    labels = np.arange(256, dtype=np.uint8).reshape(16, 16)
    assert sorted(p.label for p in trace_array(labels)) == list(range(1, 255))


def test_a_box_is_traced_in_its_own_frame():
    labels = np.zeros((9, 9), np.uint8)
    labels[4:6, 5:8] = 1
    (polygon,) = trace_mask(
        lambda box: labels[box.y : box.bottom, box.x : box.right], Box(4, 3, 5, 5)
    )
    assert polygon.rings[0].tolist() == [[1, 1], [4, 1], [4, 3], [1, 3]]


def test_a_chequerboard_does_not_overflow_the_tables():
    board = (np.indices((300, 301)).sum(axis=0) % 2).astype(np.uint8)
    assert sum(1 for _ in trace_array(board)) == board.sum()
    assert (fill(trace_array(board + 1), board.shape) == board + 1).all()


def test_a_spiral_across_all_blocks_is_one_polygon():
    size = 101
    spiral = np.zeros((size, size), np.uint8)
    x, y, dx, dy, length = 0, 0, 1, 0, size
    for turn in range(2 * (size // 4)):
        for _ in range(length - 1):
            spiral[y, x] = 1
            x, y = x + dx, y + dy
        dx, dy = -dy, dx
        if turn % 2 == 0 and turn > 0:
            length -= 2
    (polygon,) = trace_mask(
        lambda box: spiral[box.y : box.bottom], Box(0, 0, size, size), block_rows=7
    )
    assert polygon.area_px == spiral.sum()
    assert (fill([polygon], spiral.shape) == spiral).all()


def test_memory_does_not_grow_with_the_height():
    rows, width = 64, 600

    def peak_bytes(num_blocks):
        def read(box):
            labels = np.zeros((box.height, box.width), np.uint8)
            labels[1::3, 1::3] = 1
            return labels

        tracemalloc.start()
        box = Box(0, 0, width, rows * num_blocks)
        count = sum(p.area_px for p in trace_mask(read, box, block_rows=rows))
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        assert count == num_blocks * 21 * 200
        return peak

    peak_bytes(1)
    assert peak_bytes(8) < 1.1 * peak_bytes(2)
