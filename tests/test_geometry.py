"""Frames and units."""

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from wsiseg.geometry import Box, Raster, integer_downsample, is_same_mpp

downsamples = st.floats(0.25, 64.0)
sizes = st.integers(1, 100_000)


def raster(downsample=2.0, width=1000, height=800, mpp=0.5):
    return Raster(width, height, mpp, mpp, downsample, downsample)


def test_box_refuses_a_negative_size():
    with pytest.raises(ValueError, match=r"width and height must be >= 0, got -1 x 5"):
        Box(0, 0, -1, 5)


boxes = st.builds(
    Box, st.integers(-50, 50), st.integers(-50, 50), st.integers(0, 60), st.integers(0, 60)
)


@given(boxes, boxes)
def test_box_intersection_holds_exactly_the_common_pixels(first, second):
    common = first.intersection(second)
    columns = set(range(first.x, first.right)) & set(range(second.x, second.right))
    rows = set(range(first.y, first.bottom)) & set(range(second.y, second.bottom))
    assert (common.width, common.height) == (len(columns), len(rows))
    if columns:
        assert common.x == min(columns)
    if rows:
        assert common.y == min(rows)


@pytest.mark.parametrize("value", [0.0, -0.5, math.nan, math.inf])
def test_raster_refuses_a_resolution_that_is_no_positive_number(value):
    with pytest.raises(ValueError, match=r"mpp_x must be finite and > 0"):
        Raster(10, 10, value, 0.5, 1.0, 1.0)


@given(downsamples, st.floats(0, 1e5), st.floats(0, 1e5))
def test_a_point_survives_the_round_trip_through_level_0(downsample, x, y):
    r = raster(downsample)
    back = r.raster_from_l0(*r.l0_from_raster(x, y))
    assert back == pytest.approx((x, y), rel=1e-12, abs=1e-9)


@given(downsamples, boxes)
def test_the_level_0_box_covers_the_raster_box_and_not_a_pixel_more(downsample, box):
    r = raster(downsample)
    cover = r.box_l0_from_raster(box)
    assert cover.x <= box.x * downsample + 1e-6
    assert cover.x > box.x * downsample - 1 - 1e-6
    assert cover.right >= box.right * downsample - 1e-5
    assert cover.right < box.right * downsample + 1 + 1e-6


@given(sizes, st.integers(1, 64))
def test_a_downsample_is_a_whole_number_when_the_writer_only_rounded(level_px, factor):
    for size_l0_px in {level_px * factor, level_px * factor + factor - 1}:
        if level_px > 2 * factor:
            assert integer_downsample(size_l0_px, level_px) == factor


def test_an_odd_downsample_is_kept():
    assert integer_downsample(3970, 1000) == pytest.approx(3.97)


@pytest.mark.parametrize(
    ("first", "second", "same"),
    [(0.499, 0.5, True), (0.5, 0.5, True), (0.4901, 0.5, True), (0.45, 0.5, False)],
)
def test_resolutions_within_two_percent_are_the_same(first, second, same):
    assert is_same_mpp(first, second) is same


def test_area_in_pixels_is_area_in_um2_over_the_area_of_a_pixel():
    assert raster(mpp=0.5).area_px_from_um2(100.0) == pytest.approx(400.0)
