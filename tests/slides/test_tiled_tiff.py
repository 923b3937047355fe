"""Direct decoding gives OpenSlide's pixels, bit for bit, and declines what it does not know."""

import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from wsiseg.geometry import Box
from wsiseg.slides.tiled_tiff import TiledTiff
from wsiseg.synthetic import SyntheticTissue, write_slide


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    path = tmp_path_factory.mktemp("jpeg") / "slide.tiff"
    write_slide(path, SyntheticTissue(width_px=1100, height_px=700, seed=5))
    return path


def both(path, level, box):
    with openslide.OpenSlide(path) as slide:
        fast = TiledTiff.open(path, slide.level_dimensions)
        assert fast is not None
        scale = slide.level_downsamples[level]
        place = (round(box.x * scale), round(box.y * scale))
        theirs = slide.read_region(place, level, (box.width, box.height)).convert("RGB")
        ours = fast.read(level, box)
        fast.close()
    return ours, np.asarray(theirs)


@given(x=st.integers(0, 2219), y=st.integers(0, 2966), size=st.integers(1, 500))
@settings(max_examples=15, deadline=None)
def test_a_real_slide_gives_openslides_pixels(real_slide, x, y, size):
    box = Box(x, y, size, size).intersection(Box(0, 0, 2220, 2967))
    np.testing.assert_array_equal(*both(real_slide, 0, box))


@pytest.mark.parametrize("level", [0, 1])
def test_every_level_gives_openslides_pixels(synthetic, level):
    width, height = ((1100, 700), (275, 175))[level]
    np.testing.assert_array_equal(*both(synthetic, level, Box(0, 0, width, height)))


@pytest.mark.parametrize(
    "options",
    [{}, {"compression": "deflate"}, {"compression": "lzw", "predictor": True}],
    ids=["raw", "deflate", "lzw"],
)
def test_lossless_tiles_give_openslides_pixels(tmp_path, options):
    stored = np.random.default_rng(1).integers(0, 256, (201, 303, 3), np.uint8)
    path = tmp_path / "x.tiff"
    tifffile.imwrite(path, stored, photometric="rgb", tile=(64, 64), **options)
    ours, theirs = both(path, 0, Box(0, 0, 303, 201))
    np.testing.assert_array_equal(ours, theirs)
    np.testing.assert_array_equal(ours, stored)


@pytest.mark.parametrize(
    "options",
    [
        {"compression": "jpeg"},
        {"compression": "zstd", "tile": (64, 64)},
        {"compression": "jpeg", "tile": (64, 64), "shape": (200, 300)},
    ],
    ids=["strips", "another codec", "grey"],
)
def test_what_is_no_tiled_rgb_tiff_is_left_to_openslide(tmp_path, options):
    shape = options.pop("shape", (200, 300, 3))
    path = tmp_path / "x.tiff"
    photometric = "rgb" if len(shape) == 3 else "minisblack"
    tifffile.imwrite(path, np.zeros(shape, np.uint8), photometric=photometric, **options)
    assert TiledTiff.open(path, [(300, 200)]) is None


def test_a_level_that_is_not_in_the_file_is_left_to_openslide(synthetic):
    assert TiledTiff.open(synthetic, [(1100, 700), (550, 350)]) is None


def test_a_file_that_is_no_tiff_is_left_to_openslide(tmp_path):
    (tmp_path / "x.svs").write_bytes(b"not a tiff")
    assert TiledTiff.open(tmp_path / "x.svs", [(10, 10)]) is None


def test_a_broken_tile_is_an_error_and_not_a_grey_square(synthetic, tmp_path):
    path = tmp_path / "broken.tiff"
    path.write_bytes(synthetic.read_bytes())
    with tifffile.TiffFile(path) as tiff:
        offset, count = tiff.pages[0].dataoffsets[3], tiff.pages[0].databytecounts[3]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\0" * count)
    fast = TiledTiff.open(path, [(1100, 700), (275, 175)])
    assert fast is not None
    with pytest.raises((ValueError, RuntimeError)):
        fast.read(0, Box(800, 0, 10, 10))
    fast.close()
