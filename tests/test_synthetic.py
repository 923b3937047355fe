"""The synthetic slide: any part of it is the same however it is made, and OpenSlide opens it."""

import numpy as np
import openslide
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsiseg.geometry import Box
from wsiseg.synthetic import GLAND, SyntheticTissue, write_slide

TISSUE = SyntheticTissue(width_px=1200, height_px=900, seed=3)


@given(x=st.integers(0, 1100), y=st.integers(0, 800), width=st.integers(1, 90))
@settings(max_examples=15, deadline=None)
def test_a_region_does_not_depend_on_the_box_it_is_made_in(x, y, width):
    image, labels = TISSUE.region(Box(x, y, width, 50))
    inner_image, inner_labels = TISSUE.region(Box(x + width // 2, y + 20, 1, 30))
    np.testing.assert_array_equal(image[20:, width // 2], inner_image[:, 0])
    np.testing.assert_array_equal(labels[20:, width // 2], inner_labels[:, 0])


def test_the_seed_makes_another_slide_of_the_same_kind():
    shares = []
    for seed in range(4):
        tissue = SyntheticTissue(width_px=1200, height_px=900, seed=seed)
        _, labels = tissue.region(Box(0, 0, 1200, 900))
        shares.append((labels == GLAND).mean())
    assert len(set(shares)) == 4
    assert all(0.1 < share < 0.4 for share in shares)


@pytest.fixture(scope="module")
def slide_path(tmp_path_factory):
    path = tmp_path_factory.mktemp("synthetic") / "a" / "slide.tiff"
    write_slide(path, TISSUE)
    return path


def test_openslide_finds_a_pyramid_and_the_resolution(slide_path):
    with openslide.OpenSlide(slide_path) as slide:
        assert slide.level_dimensions == ((1200, 900), (300, 225))
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.5)


def test_the_file_shows_what_the_function_gives(slide_path):
    image, _ = TISSUE.region(Box(300, 200, 512, 512))
    with openslide.OpenSlide(slide_path) as slide:
        stored = np.asarray(slide.read_region((300, 200), 0, (512, 512)).convert("RGB"))
    assert np.abs(stored.astype(int) - image).mean() < 8  # what JPEG changes


def test_the_same_slide_twice_is_the_same_file(slide_path, tmp_path):
    write_slide(tmp_path / "again.tiff", TISSUE)
    assert (tmp_path / "again.tiff").read_bytes() == slide_path.read_bytes()
