"""Area averaging against plain interval arithmetic, and the share of labels against counting."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsiseg.slides.resample import WEIGHT_BITS, apply_taps, area_taps, block_means

scales = st.one_of(
    st.floats(0.2, 9, allow_nan=False), st.sampled_from([0.5, 1.0, 2.0, 3.0, 3.97, 4.0, 8.0])
)


def dense(taps, size):
    """The weights as a matrix (targets, size)."""
    matrix = np.zeros((taps.num_targets, size), int)
    for i in range(taps.num_targets):
        for j in range(taps.starts[i], taps.starts[i + 1]):
            matrix[i, taps.first + taps.columns[j]] += taps.weights[j]
    return matrix


@given(scale=scales, size=st.integers(1, 60), data=st.data())
@settings(max_examples=80, deadline=None)
def test_weights_are_what_each_pixel_covers(scale, size, data):
    targets = max(1, int(np.ceil(size / scale - 1e-9)))
    start = data.draw(st.integers(0, targets - 1))
    stop = data.draw(st.integers(start + 1, targets))
    taps = area_taps(start, stop, scale=scale, size=size)
    weights = dense(taps, size)
    assert (weights.sum(axis=1) == 1 << WEIGHT_BITS).all()
    assert 0 <= taps.first < taps.last <= size
    for row, i in zip(weights, range(start, stop), strict=True):
        low, high = i * scale, (i + 1) * scale
        covered = np.clip(np.minimum(high, np.arange(size) + 1) - np.maximum(low, np.arange(size)),
                          0, None)  # fmt: skip
        covered[-1] += max(0.0, high - max(low, size))  # the border goes on
        assert np.abs(row / (1 << WEIGHT_BITS) - covered / scale).max() <= 1.01 / (1 << WEIGHT_BITS)


@given(scale=scales, seed=st.integers(0, 99), height=st.integers(1, 40), width=st.integers(1, 40))
@settings(max_examples=60, deadline=None)
def test_pixels_are_weighted_means(scale, seed, height, width):
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), np.uint8)
    taps_y = area_taps(0, max(1, int(height / scale)), scale=scale, size=height)
    taps_x = area_taps(0, max(1, int(width / scale)), scale=scale, size=width)
    part = pixels[taps_y.first : taps_y.last, taps_x.first : taps_x.last]
    one = 1 << WEIGHT_BITS
    down, across = dense(taps_y, height) / one, dense(taps_x, width) / one
    wanted = np.einsum("ij,jkc,lk->ilc", down, pixels.astype(float), across)
    assert np.abs(apply_taps(part, taps_y, taps_x) - wanted).max() <= 0.5 + 1e-9


@given(scale=scales, data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_pixel_is_the_same_in_every_box(scale, data):
    pixels = np.random.default_rng(1).integers(0, 256, (30, 50, 3), np.uint8)
    count = max(2, int(50 / scale))
    down = area_taps(0, 1, scale=1, size=30)
    whole = area_taps(0, count, scale=scale, size=50)
    all_of_it = apply_taps(pixels[:1, whole.first : whole.last], down, whole)
    start = data.draw(st.integers(0, count - 1))
    part = area_taps(start, count, scale=scale, size=50)
    alone = apply_taps(pixels[:1, part.first : part.last], down, part)
    np.testing.assert_array_equal(alone, all_of_it[:, start:])


def test_white_stays_white_and_black_black():
    for value in (0, 255):
        pixels = np.full((37, 53, 3), value, np.uint8)
        taps_y, taps_x = (area_taps(0, 9, scale=3.7, size=n) for n in (37, 53))
        part = pixels[taps_y.first : taps_y.last, taps_x.first : taps_x.last]
        assert (apply_taps(part, taps_y, taps_x) == value).all()


@pytest.mark.parametrize("factor", [2, 4, 8])
@pytest.mark.parametrize(("height", "width"), [(16, 24), (17, 23), (1, 1)])
def test_block_means_repeat_the_border(factor, height, width):
    pixels = np.random.default_rng(2).integers(0, 256, (height, width, 3), np.uint8)
    padded = np.pad(pixels, ((0, -height % factor), (0, -width % factor), (0, 0)), mode="edge")
    blocks = padded.reshape(padded.shape[0] // factor, factor, padded.shape[1] // factor, factor, 3)
    sums = blocks.sum(axis=(1, 3), dtype=int)
    wanted = (sums + factor**2 // 2) // factor**2
    np.testing.assert_array_equal(block_means(pixels, factor), wanted)
