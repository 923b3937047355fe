"""Blending: exactly the weighted mean, in any order, from any line on, in a band of bounded size."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsiseg.geometry import Raster
from wsiseg.grid import TileGrid
from wsiseg.inference.window import (
    MAX_WEIGHT,
    PROBABILITY_ONE,
    Band,
    blend_weights,
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


def through_band(grid, num_labels, top=0):
    raster, size = grid.raster, grid.tile_size_px
    band = Band(raster, window_px=size, num_labels=num_labels, top=top)
    parts = []
    for row in window_rows(grid):
        if row.y + size <= top:
            continue
        parts += band.finish(row.y)
        for x in row.xs:
            band.add(x, row.y, window_of(x, row.y, size, num_labels))
    parts += band.finish(raster.height_px)
    assert [p.y for p in parts] == [top + n for n in np.cumsum([0, *(len(p.labels) for p in parts)])[:-1]]  # fmt: skip # noqa: E501
    return np.concatenate([p.labels for p in parts]), np.concatenate([p.probability for p in parts])


grids = st.tuples(
    st.integers(1, 60), st.integers(1, 60), st.sampled_from([4, 8, 13]), st.sampled_from([0, 1, 3])
)


@given(shape=grids, num_labels=st.integers(2, 4), keep=st.none() | st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_the_band_gives_exactly_what_the_whole_slide_in_memory_would(shape, num_labels, keep):
    grid = grid_of(*shape, keep_seed=keep)
    for got, wanted in zip(through_band(grid, num_labels), dense(grid, num_labels), strict=True):
        np.testing.assert_array_equal(got, wanted)


@given(shape=grids, top=st.integers(0, 59), keep=st.none() | st.integers(0, 99))
@settings(max_examples=40, deadline=None)
def test_beginning_further_down_changes_no_line(shape, top, keep):
    grid = grid_of(*shape, keep_seed=keep)
    top = min(top, grid.raster.height_px - 1)
    labels, _ = dense(grid, 3)
    np.testing.assert_array_equal(through_band(grid, 3, top)[0], labels[top:])


@pytest.mark.parametrize("size", [1, 2, 16, 255, 256])
def test_weights_are_positive_symmetric_and_bounded(size):
    weights = blend_weights(size)
    assert weights.min() >= 1
    assert weights.max() <= MAX_WEIGHT**2
    np.testing.assert_array_equal(weights, weights.T)
    np.testing.assert_array_equal(weights, weights[::-1, ::-1])


def test_sums_cannot_overflow_with_the_largest_overlap():
    assert 25 * MAX_WEIGHT**2 * PROBABILITY_ONE < 2**31


def test_a_constant_prediction_stays_constant_whatever_the_overlap():
    grid = grid_of(50, 40, 16, 12)
    band = Band(grid.raster, window_px=16, num_labels=2)
    values = np.full((1, 16, 16), round(0.8 * PROBABILITY_ONE), np.int32)
    parts = []
    for row in window_rows(grid):
        parts += band.finish(row.y)
        for x in row.xs:
            band.add(x, row.y, values)
    parts += band.finish(40)
    assert all((p.labels == 1).all() and (p.probability == 204).all() for p in parts)


def test_a_window_that_does_not_fit_the_band_is_refused():
    band = Band(grid_of(50, 40, 16, 0).raster, window_px=16, num_labels=2)
    with pytest.raises(ValueError, match="y=17 does not fit the band at 0"):
        band.add(0, 17, np.zeros((1, 16, 16), np.int32))
