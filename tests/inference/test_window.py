"""Blending: exactly the weighted mean, in any order, in any part, in a band of bounded size."""

import tracemalloc

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsiseg.geometry import Box, Raster
from wsiseg.grid import TileGrid, axis_origins
from wsiseg.inference.blend import PROBABILITY_ONE
from wsiseg.inference.window import (
    BAND_BYTES,
    MAX_WEIGHT,
    Band,
    Piece,
    blend_weights,
    strip_chunks,
    window_rows,
)


def grid_of(width, height, size, overlap, keep_seed=None):
    raster = Raster(width, height, 0.5, 0.5, 1.0, 1.0)
    grid = TileGrid.covering(raster, tile_size_px=size, overlap_px=overlap)
    if keep_seed is None:
        return grid
    keep = np.random.default_rng(keep_seed).random(len(grid)) < 0.6
    keep[0] = True
    return grid.select(keep)


def window_of(x, y, size, num_labels):
    """Random probabilities that depend on the place only, as int32 (num_labels - 1, S, S)."""
    rng = np.random.default_rng(1000 * y + x)
    p = rng.dirichlet(np.full(num_labels, 0.4), (size, size)).transpose(2, 0, 1)[1:]
    return np.rint(p * PROBABILITY_ONE).astype(np.int32)


def dense(grid, num_labels):
    """The definition, with the whole slide in memory and exact Python-sized integers."""
    raster, size = grid.raster, grid.tile_size_px
    shape = (max(raster.height_px, size), max(raster.width_px, size))
    sums, weight = np.zeros((num_labels, *shape), np.int64), np.zeros(shape, np.int64)
    for x, y in grid.origins.tolist():
        p = window_of(x, y, size, num_labels).astype(np.int64)
        p = np.concatenate([PROBABILITY_ONE - p.sum(0, keepdims=True), p])
        sums[:, y : y + size, x : x + size] += p * blend_weights(size)
        weight[y : y + size, x : x + size] += blend_weights(size)
    labels = np.where(weight > 0, sums.argmax(0), 255)
    total = np.maximum(weight, 1) * PROBABILITY_ONE
    probability = np.where(weight > 0, (255 * sums.max(0) + total // 2) // total, 0)
    part = np.s_[: raster.height_px, : raster.width_px]
    return labels[part].astype(np.uint8), probability[part].astype(np.uint8)


def through_band(grid, num_labels, *, top=0, columns=None, block_px=16):
    """Give the labels and probability of a part of the raster, as they come out of a band."""
    raster, size = grid.raster, grid.tile_size_px
    left, right = columns or (0, raster.width_px)
    box = Box(left, top, right - left, raster.height_px - top)
    band = Band(box, window_px=size, num_labels=num_labels, block_px=block_px)
    labels = np.full((raster.height_px, raster.width_px), 255, np.uint8)
    probability = np.zeros_like(labels)
    times_written = np.zeros(labels.shape, int)

    def keep(pieces):
        for piece in pieces:
            part = np.s_[piece.y : piece.y + len(piece.labels),
                         piece.x : piece.x + piece.labels.shape[1]]  # fmt: skip
            labels[part], probability[part] = piece.labels, piece.probability
            times_written[part] += 1

    for row in window_rows(grid):
        keep(band.finish(row.y))
        for x in row.xs:
            band.add(x, row.y, window_of(x, row.y, size, num_labels))
    keep(band.finish(raster.height_px))
    assert times_written.max(initial=0) <= 1
    part = np.s_[top:, left:right]
    return labels[part], probability[part]


grids = st.tuples(
    st.integers(1, 60), st.integers(1, 60), st.sampled_from([4, 8, 13]), st.sampled_from([0, 1, 3])
)


@given(
    shape=grids,
    num_labels=st.integers(2, 6),
    keep=st.none() | st.integers(0, 99),
    block_px=st.integers(1, 70),
)
@settings(max_examples=60, deadline=None)
def test_the_band_gives_exactly_what_the_whole_slide_in_memory_would(
    shape, num_labels, keep, block_px
):
    width, height, size, overlap = shape
    grid = grid_of(width, height, size, overlap, keep)
    got = through_band(grid, num_labels, block_px=block_px)
    for ours, wanted in zip(got, dense(grid, num_labels), strict=True):
        np.testing.assert_array_equal(ours, wanted)


@given(
    shape=grids,
    top=st.integers(0, 59),
    left=st.integers(0, 59),
    width=st.integers(1, 60),
    keep=st.none() | st.integers(0, 99),
)
@settings(max_examples=60, deadline=None)
def test_a_part_of_the_slide_is_the_same_alone(shape, top, left, width, keep):
    width, height, size, overlap = shape
    grid = grid_of(width, height, size, overlap, keep)
    top = min(top, grid.raster.height_px - 1)
    left = min(left, grid.raster.width_px - 1)
    right = min(left + width, grid.raster.width_px)
    got = through_band(grid, 3, top=top, columns=(left, right))
    for ours, wanted in zip(got, dense(grid, 3), strict=True):
        np.testing.assert_array_equal(ours, wanted[top:, left:right])


@pytest.mark.parametrize("size", [1, 2, 16, 255, 256])
def test_weights_are_positive_symmetric_and_bounded(size):
    weights = blend_weights(size)
    assert weights.min() >= 1
    assert weights.max() <= MAX_WEIGHT
    np.testing.assert_array_equal(weights, weights.T)
    np.testing.assert_array_equal(weights, weights[::-1, ::-1])


@pytest.mark.parametrize("size", [1, 2, 7, 16, 64, 255, 256, 1024])
@pytest.mark.parametrize("overlap", [0.0, 0.25, 0.6, 0.75])
def test_no_sum_of_weights_overflows(size, overlap):
    stride = size - int(size * overlap)
    worst = 0
    for length in {size, size + 1, *(5 * size + size * i // 9 for i in range(9))}:
        sums = np.zeros(length, np.int64)
        # Along one axis, in units of the square root of the largest weight.
        axis = np.sqrt(blend_weights(size).diagonal().astype(float))
        for x in axis_origins(length, size, stride):
            sums[x : x + size] += np.ceil(axis).astype(np.int64)
        worst = max(worst, int(sums.max()))
    assert worst**2 * PROBABILITY_ONE < 2**31


def test_the_border_of_a_window_cannot_be_seen():
    weights = blend_weights(256)
    overlap = 64
    # Where a window ends, its neighbour is `overlap` pixels inside.
    assert weights[128, 0] / (weights[128, 0] + weights[128, overlap]) < 1e-3


def test_a_constant_prediction_stays_constant_whatever_the_overlap():
    grid = grid_of(50, 40, 16, 12)
    band = Band(grid.raster.box, window_px=16, num_labels=2, block_px=20)
    values = np.full((1, 16, 16), round(0.8 * PROBABILITY_ONE), np.int32)
    pieces: list[Piece] = []
    for row in window_rows(grid):
        pieces += band.finish(row.y)
        for x in row.xs:
            band.add(x, row.y, values)
    pieces += band.finish(40)
    assert sum(p.labels.size for p in pieces) == 50 * 40
    assert all((p.labels == 1).all() and (p.probability == 204).all() for p in pieces)


@pytest.mark.parametrize(("foreground", "label"), [
    ((0.5,), 0), ((0.2, 0.2), 0), ((0.4, 0.4), 1), ((0.1, 0.6), 2), ((1 / 3, 1 / 3), 0),
])  # fmt: skip
def test_the_lowest_label_wins_a_tie(foreground, label):
    values = np.array([int(p * 65536) for p in foreground], np.int32)
    values = np.minimum(values, PROBABILITY_ONE // 2 if len(values) == 1 else PROBABILITY_ONE)
    band = Band(Box(0, 0, 4, 4), window_px=4, num_labels=len(values) + 1, block_px=4)
    band.add(0, 0, np.tile(values[:, None, None], (1, 4, 4)))
    (piece,) = band.finish(4)
    assert (piece.labels == label).all()


def test_a_window_that_does_not_fit_the_band_is_refused():
    band = Band(Box(0, 0, 50, 40), window_px=16, num_labels=2, block_px=16)
    with pytest.raises(ValueError, match="y=17 does not fit the band at 0"):
        band.add(0, 17, np.zeros((1, 16, 16), np.int32))


def test_memory_is_held_only_where_windows_reach():
    tracemalloc.start()
    try:
        band = Band(Box(0, 0, 1_000_000, 5000), window_px=256, num_labels=6, block_px=1024)
        values = np.ones((5, 256, 256), np.int32)
        for x in range(500_000, 504_000, 192):
            band.add(x, 0, values)
        band_bytes = tracemalloc.get_traced_memory()[0]
        assert sum(p.labels.size for p in band.finish(5000)) == 5 * 1024 * 256
        rest_bytes = tracemalloc.get_traced_memory()[0]
    finally:
        tracemalloc.stop()
    assert 5 * 6 * 256 * 1024 * 4 < band_bytes < 40e6
    assert rest_bytes < 4e6


@pytest.mark.parametrize(("labels", "window_px", "strips"), [
    (2, 256, 1), (6, 256, 2), (2, 1024, 2), (6, 2048, 10), (255, 8192, 98),
])  # fmt: skip
def test_a_very_wide_slide_is_cut_into_strips_whose_band_fits(labels, window_px, strips):
    columns = -(-100_000 // 1024)
    firsts = strip_chunks(columns, chunk_px=1024, window_px=window_px, num_labels=labels)
    assert len(firsts) == strips
    band_bytes = 4 * labels * window_px * 1024 * firsts.step
    assert firsts.step == 1 or band_bytes <= BAND_BYTES
