"""The synthetic slide: any part of it is the same however it is made, and OpenSlide opens it."""

import numpy as np
import openslide
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from wsiseg import synthetic
from wsiseg.geometry import Box
from wsiseg.slides.reader import open_slide
from wsiseg.synthetic import GLAND, SyntheticTissue, write_large_slide, write_slide

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


def test_a_large_slide_is_half_tissue_and_its_levels_show_the_same(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "PIECE_PX", 1024)  # a twentieth of the work
    write_large_slide(tmp_path / "large.tiff", side_px=9500)
    with open_slide(tmp_path / "large.tiff") as slide:
        assert slide.meta.mpp_x == 0.25
        assert slide.meta.level_sizes == ((9500, 9500), (2375, 2375), (594, 594))
        small = slide.thumbnail(594)
        is_tissue = small.max(axis=2) - small.min(axis=2) > 20
        assert 0.4 < is_tissue.mean() < 0.6
        middle = Box(4000, 4600, 800, 800)
        full = slide.read(slide.meta.raster(0.25), middle).astype(float)
        quarter = slide.read(slide.meta.raster(1.0), Box(1000, 1150, 200, 200)).astype(float)
        means = full.reshape(200, 4, 200, 4, 3).mean(axis=(1, 3))
        here = np.abs(means - quarter)[:-1].mean()
        one_pixel_off = np.abs(means[:-1] - quarter[1:]).mean()
        assert here < 7  # both were compressed
        assert here < 0.8 * one_pixel_off


def test_a_large_slide_is_the_same_for_the_same_seed(tmp_path, monkeypatch):
    monkeypatch.setattr(synthetic, "PIECE_PX", 1024)
    for name, seed in (("a", 0), ("b", 0), ("c", 1)):
        write_large_slide(tmp_path / name, side_px=2000, seed=seed)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    assert (tmp_path / "a").read_bytes() != (tmp_path / "c").read_bytes()
