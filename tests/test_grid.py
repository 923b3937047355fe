"""Where tiles lie."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsiseg.geometry import Raster
from wsiseg.grid import TileGrid, axis_origins


def raster(width, height):
    return Raster(width, height, 0.5, 0.5, 2.0, 2.0)


@given(st.integers(1, 500), st.integers(1, 64), st.data())
def test_every_pixel_of_an_axis_is_covered_and_no_tile_leaves_it(length, tile, data):
    stride = data.draw(st.integers(1, tile))
    origins = axis_origins(length, tile, stride)
    covered = np.zeros(max(length, tile), bool)
    for origin in origins:
        covered[origin : origin + tile] = True
    assert covered[:length].all()
    assert (np.diff(origins) > 0).all()
    assert origins[-1] + tile <= max(length, tile)


def test_grid_covers_the_right_edge_when_the_width_is_not_a_multiple():
    assert axis_origins(10, 4, 4).tolist() == [0, 4, 6]


@pytest.mark.parametrize(("tile", "stride"), [(0, 1), (4, 0), (4, 5)])
def test_a_stride_that_would_leave_gaps_is_refused(tile, stride):
    with pytest.raises(ValueError, match="1 <= stride <= tile_size"):
        axis_origins(10, tile, stride)


@given(st.integers(1, 300), st.integers(1, 300), st.integers(8, 64), st.integers(0, 7))
def test_origins_are_unique_and_sorted_by_row_then_column(width, height, tile, overlap):
    grid = TileGrid.covering(raster(width, height), tile_size_px=tile, overlap_px=overlap)
    keys = [(int(y), int(x)) for x, y in grid.origins]
    assert keys == sorted(set(keys))
    assert len(grid) == len(keys)


def test_origins_at_level_0_are_scaled_by_the_downsample():
    grid = TileGrid.covering(raster(512, 256), tile_size_px=256)
    assert grid.origins_l0.tolist() == [[0, 0], [512, 0]]


def test_selecting_keeps_the_order():
    grid = TileGrid.covering(raster(512, 512), tile_size_px=256)
    kept = grid.select(np.array([False, True, False, True]))
    assert kept.origins.tolist() == [[256, 0], [256, 256]]
    assert kept.box(0).right == 512
