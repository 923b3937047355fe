"""Tissue masks: found where it is, none on glass, areas that add up on any raster."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from wsiseg.errors import NoTissueError
from wsiseg.geometry import Box, Raster
from wsiseg.grid import TileGrid
from wsiseg.settings.tile import TissueConfig
from wsiseg.slides.reader import open_slide
from wsiseg.slides.tissue import TissueMask, is_stained, make_tissue_mask
from wsiseg.synthetic import SyntheticTissue

TISSUE = SyntheticTissue(width_px=1600, height_px=1200, mpp=1.0, seed=2)
GLASS = (243, 241, 244)


@pytest.fixture(scope="module")
def image(tmp_path_factory):
    pixels, _ = TISSUE.region(Box(0, 0, 1600, 1200))
    path = tmp_path_factory.mktemp("tissue") / "s1.png"
    Image.fromarray(pixels).save(path)
    return path, pixels


def mask_of(path, **config):
    with open_slide(path, slide_mpp=1.0) as slide:
        return make_tissue_mask(slide, TissueConfig(**config))


def test_the_default_finds_the_tissue_and_leaves_the_glass(image):
    path, _ = image
    tissue = mask_of(path)
    with open_slide(path, slide_mpp=1.0) as slide:
        shown = slide.read(tissue.raster, tissue.raster.box).astype(int)
    is_glass = (shown.max(axis=-1) - shown.min(axis=-1)) < 8
    assert tissue.mask[~is_glass].mean() > 0.95
    assert tissue.mask[is_glass].mean() < 0.1


@pytest.mark.parametrize("tint", [(255, 255, 255), GLASS, (225, 225, 225), (244, 244, 238)])
def test_glass_of_any_tint_is_no_tissue(tmp_path, tint):
    noise = np.random.default_rng(0).integers(-3, 4, (600, 800, 3))
    Image.fromarray((np.array(tint) + noise).clip(0, 255).astype(np.uint8)).save(tmp_path / "w.png")
    with pytest.raises(NoTissueError, match=r"slide 'w': no tissue.*--tissue none"):
        mask_of(tmp_path / "w.png")


def test_a_view_full_of_tissue_is_all_tissue(image):
    _, pixels = image
    inside = pixels[400:800, 500:1000]
    assert is_stained(np.ascontiguousarray(inside[::8, ::8])).mean() > 0.9


def test_ink_is_no_tissue(tmp_path):
    pixels = np.full((800, 800, 3), GLASS, np.uint8)
    pixels[100:700, 100:300] = (40, 160, 70)
    pixels[100:700, 500:700] = (20, 20, 22)
    Image.fromarray(pixels).save(tmp_path / "ink.png")
    with pytest.raises(NoTissueError, match="no tissue"):
        mask_of(tmp_path / "ink.png")


def test_crumbs_are_dropped_and_holes_filled_by_their_area_in_um2(tmp_path):
    pixels = np.full((1200, 1200, 3), GLASS, np.uint8)
    pixels[100:900, 100:900] = (200, 120, 170)
    pixels[300:380, 300:380] = GLASS  # 6,400 um2
    pixels[500:800, 500:800] = GLASS  # 90,000 um2
    pixels[1000:1060, 1000:1060] = (200, 120, 170)  # 3,600 um2
    Image.fromarray(pixels).save(tmp_path / "s.png")
    tissue = mask_of(tmp_path / "s.png", mpp=4.0)
    raster = Raster(1200, 1200, 1.0, 1.0, 1.0, 1.0)
    assert tissue.fraction(Box(310, 310, 60, 60), raster) == 1
    assert tissue.fraction(Box(550, 550, 200, 200), raster) == 0
    assert tissue.fraction(Box(990, 990, 80, 80), raster) == 0


def test_none_takes_the_whole_slide(image):
    assert mask_of(image[0], method="none").mask.all()


def test_an_outline_is_tissue_and_its_hole_is_not(image):
    path, _ = image
    config = TissueConfig(method="annotation", mpp=4.0)
    ring = np.array([[200.0, 200], [1000, 200], [1000, 1000], [200, 1000]])
    hole = np.array([[400.0, 400], [600, 400], [600, 600], [400, 600]])
    with open_slide(path, slide_mpp=1.0) as slide:
        tissue = make_tissue_mask(slide, config, outline=[[ring, hole]])
        with pytest.raises(NoTissueError, match="method 'annotation'"):
            make_tissue_mask(slide, config, outline=[])
    area = tissue.mask.sum() * tissue.raster.pixel_area_um2
    assert area == pytest.approx(800**2 - 200**2, rel=0.01)
    raster = Raster(1600, 1200, 1.0, 1.0, 1.0, 1.0)
    assert tissue.fraction(Box(420, 420, 160, 160), raster) == 0
    assert tissue.fraction(Box(700, 700, 200, 200), raster) == 1


rasters = st.builds(
    lambda down: Raster(int(96 / down) + 1, int(64 / down) + 1, down, down, down, down),
    st.sampled_from([1.0, 1.7, 2.0, 3.3, 5.0]),
)


@given(seed=st.integers(0, 99), raster=rasters, size=st.integers(1, 30), data=st.data())
@settings(max_examples=60, deadline=None)
def test_the_share_of_a_tile_is_that_of_the_pixels_under_it(seed, raster, size, data):
    mask = np.random.default_rng(seed).random((16, 24)) < 0.4
    tissue = TissueMask(mask, Raster(24, 16, 4.0, 4.0, 4.0, 4.0))
    x = data.draw(st.integers(-5, raster.width_px))
    y = data.draw(st.integers(-5, raster.height_px))
    fine = np.kron(mask, np.ones((40, 40)))  # a tenth of a level-0 pixel
    down = raster.downsample_x
    left, top = (round(10 * max(0.0, v * down)) for v in (x, y))
    right, bottom = (round(10 * max(0.0, (v + size) * down)) for v in (x, y))
    wanted = fine[top:bottom, left:right].sum() / (10 * size * down) ** 2
    assert tissue.fraction(Box(x, y, size, size), raster) == pytest.approx(wanted, abs=0.02)


@given(seed=st.integers(0, 50), size=st.sampled_from([3, 8, 17]))
@settings(max_examples=25, deadline=None)
def test_the_tissue_of_all_tiles_is_that_of_the_slide(seed, size):
    mask = np.random.default_rng(seed).random((20, 30)) < 0.3
    tissue = TissueMask(mask, Raster(30, 20, 8.0, 8.0, 8.0, 8.0))
    raster = Raster(240, 160, 1.0, 1.0, 1.0, 1.0)
    xs, ys = np.meshgrid(np.arange(0, 240, size), np.arange(0, 160, size))
    grid = TileGrid(raster, size, size, np.stack([xs.ravel(), ys.ravel()], axis=1))
    area = tissue.fractions(grid).sum() * size**2
    assert area == pytest.approx(mask.sum() * 64, abs=1e-6)


def test_a_mask_on_a_finer_raster_has_the_same_area_and_no_staircase():
    y, x = np.mgrid[:60, :60]
    tissue = TissueMask((x - 30) ** 2 + (y - 30) ** 2 < 400, Raster(60, 60, 8.0, 8.0, 8.0, 8.0))
    fine = Raster(480, 480, 1.0, 1.0, 1.0, 1.0)
    inside = tissue.at(fine, fine.box)
    assert inside.sum() / 64 == pytest.approx(tissue.mask.sum(), rel=0.01)
    np.testing.assert_array_equal(tissue.at(fine, Box(100, 90, 50, 40)), inside[90:130, 100:150])


def test_a_grown_mask_has_the_margin_all_round():
    mask = np.zeros((41, 41), bool)
    mask[20, 20] = True
    grown = TissueMask(mask, Raster(41, 41, 4.0, 4.0, 4.0, 4.0)).grown(18.0)
    assert grown.mask[20, 15]
    assert grown.mask[15, 20]
    assert not grown.mask[20, 14]
