"""Direct decoding gives OpenSlide's pixels, bit for bit, and declines what it does not know."""

import logging
import os
import threading
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import imagecodecs
import numpy as np
import openslide
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st

from wsiseg.errors import SlideReadError
from wsiseg.geometry import Box
from wsiseg.jpeg import decode_jpeg
from wsiseg.slides.reader import open_slide
from wsiseg.slides.sources import OpenSlideSource
from wsiseg.slides.tile_decoders import Jpeg2000Tiles
from wsiseg.slides.tiled_tiff import TiledTiff
from wsiseg.synthetic import SyntheticTissue, write_slide

APERIO = "Aperio Image Library v11.2.1 \r\n%d x %d (128x128) Q=30|AppMag = 20|MPP = 0.4990"
TISSUE = SyntheticTissue(width_px=1100, height_px=700, seed=5)

KINDS: dict[str, dict[str, Any]] = {
    "jpeg rgb": {"compression": "jpeg", "compressionargs": {"outcolorspace": "rgb"}},
    "jpeg 4:4:4": {"compression": "jpeg", "subsampling": (1, 1)},
    "jpeg 4:2:2": {"compression": "jpeg", "subsampling": (2, 1)},
    "jpeg 4:2:0": {"compression": "jpeg", "subsampling": (2, 2)},
    "aperio jpeg": {"compression": "jpeg", "subsampling": (2, 2), "aperio": True},
    "aperio jpeg 2000": {"compression": 33005, "aperio": True, "compressionargs": {"level": 40}},
    "aperio jpeg 2000 ycbcr": {"compression": 33003, "photometric": "ycbcr", "aperio": True},
    "deflate": {"compression": "deflate"},
}


def write_levels(path, *, aperio=False, photometric="rgb", num_levels=2, **options):
    """Write TISSUE as levels at 1, 1/2, ... with tiles of 128 px, which reach over the border."""
    full, _ = TISSUE.region(Box(0, 0, 1100, 700))
    with tifffile.TiffWriter(path) as tiff:
        for level in range(num_levels):
            pixels = np.ascontiguousarray(full[:: 2**level, :: 2**level])
            size = pixels.shape[1::-1]
            tiff.write(
                pixels, photometric=photometric, tile=(128, 128), resolution=(2e4, 2e4),
                resolutionunit="CENTIMETER", subfiletype=int(level > 0 and not aperio),
                description=APERIO % size if aperio else None, metadata=None, **options,
            )  # fmt: skip
    return path


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """One file of each kind, open in OpenSlide and in ours."""
    folder = tmp_path_factory.mktemp("kinds")
    found = {}
    for number, (kind, options) in enumerate(KINDS.items()):
        path = write_levels(folder / f"{number}.svs", **options)
        theirs = openslide.OpenSlide(path)
        vendor = theirs.properties["openslide.vendor"]
        ours = TiledTiff.open(path, theirs.level_dimensions, vendor=vendor)
        assert ours is not None
        found[kind] = theirs, ours
    yield found
    for theirs, ours in found.values():
        theirs.close()
        ours.close()


@pytest.mark.parametrize("kind", KINDS)
@given(data=st.data())
@settings(max_examples=20, deadline=None)
def test_any_box_of_any_level_has_openslides_pixels(files, kind, data):
    theirs, ours = files[kind]
    level = data.draw(st.integers(0, 1))
    width, height = theirs.level_dimensions[level]
    x, y = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    x, y = (data.draw(st.sampled_from([v, v // 128 * 128])) for v in (x, y))
    size = st.one_of(st.integers(1, 400), st.sampled_from([128, 256]))
    box = Box(x, y, data.draw(size), data.draw(size)).intersection(Box(0, 0, width, height))
    place = round(x * theirs.level_downsamples[level]), round(y * theirs.level_downsamples[level])
    shown = theirs.read_region(place, level, (box.width, box.height)).convert("RGB")
    np.testing.assert_array_equal(ours.read(level, box), np.asarray(shown))


@given(x=st.integers(0, 2219), y=st.integers(0, 2966), size=st.integers(1, 500))
@settings(max_examples=25, deadline=None)
def test_a_real_slide_gives_openslides_pixels(real_slide, x, y, size):
    box = Box(x, y, size, size).intersection(Box(0, 0, 2220, 2967))
    np.testing.assert_array_equal(*both(real_slide, 0, box))


@pytest.fixture(scope="module")
def synthetic(tmp_path_factory):
    path = tmp_path_factory.mktemp("jpeg") / "slide.tiff"
    write_slide(path, TISSUE)
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


@pytest.mark.parametrize("level", [0, 1])
def test_every_level_gives_openslides_pixels(synthetic, level):
    width, height = ((1100, 700), (275, 175))[level]
    np.testing.assert_array_equal(*both(synthetic, level, Box(0, 0, width, height)))


@pytest.mark.parametrize("kind", ["jpeg 4:4:4", "jpeg 4:2:0", "jpeg rgb"])
@pytest.mark.parametrize("factor", [2, 4, 8])
def test_a_shrunk_level_is_the_mean_of_its_blocks_up_to_the_border(files, kind, factor):
    _, ours = files[kind]
    whole = ours.read(0, Box(0, 0, 1100, 700)).astype(float)
    padded = np.pad(whole, ((0, -700 % factor), (0, -1100 % factor), (0, 0)), mode="edge")
    height, width = padded.shape[0] // factor, padded.shape[1] // factor
    means = padded.reshape(height, factor, width, factor, 3).mean(axis=(1, 3))
    error = ours.read(0, Box(0, 0, width, height), factor) - means
    assert np.sqrt(np.mean(error**2)) < 2
    assert np.abs(error).mean() < 0.75
    assert np.abs(error[:, -1]).max() < 4
    assert np.abs(error[-1]).max() < 4


@given(data=st.data())
@settings(max_examples=30, deadline=None)
def test_a_shrunk_pixel_does_not_depend_on_the_box(files, data):
    _, ours = files["jpeg 4:2:0"]
    factor = data.draw(st.sampled_from([2, 4, 8]))
    width, height = -(-1100 // factor), -(-700 // factor)
    whole = ours.read(0, Box(0, 0, width, height), factor)
    x, y = data.draw(st.integers(0, width - 1)), data.draw(st.integers(0, height - 1))
    size = data.draw(st.integers(1, 150))
    box = Box(x, y, size, size).intersection(Box(0, 0, width, height))
    part = whole[box.y : box.bottom, box.x : box.right]
    np.testing.assert_array_equal(ours.read(0, box, factor), part)


@pytest.mark.parametrize("kind", ["jpeg rgb", "jpeg 4:2:0", "aperio jpeg"])
def test_a_tiles_own_jpeg_decodes_to_what_is_read(files, kind):
    _, ours = files[kind]
    box = Box(256, 384, 128, 128)
    data = ours.jpeg_tile(0, box)
    np.testing.assert_array_equal(decode_jpeg(data, width_px=128, height_px=128), ours.read(0, box))


@pytest.mark.parametrize(
    "box",
    [Box(1, 0, 128, 128), Box(0, 0, 256, 128), Box(0, 0, 64, 64), Box(1024, 0, 128, 128)],
    ids=["shifted", "two", "part", "over the border"],
)
def test_a_box_that_is_no_tile_has_no_jpeg(files, box):
    assert files["jpeg 4:2:0"][1].jpeg_tile(0, box) is None
    assert files["aperio jpeg 2000"][1].jpeg_tile(0, Box(0, 0, 128, 128)) is None


def test_threads_decode_each_tile_once(synthetic, monkeypatch):
    fast = TiledTiff.open(synthetic, [(1100, 700), (275, 175)])
    assert fast is not None
    read, lock = [], threading.Lock()

    def pread(file, size, offset, original=os.pread):
        with lock:
            read.append(offset)
        return original(file, size, offset)

    monkeypatch.setattr(os, "pread", pread)
    boxes = [Box(x, y, 60, 60) for y in range(0, 640, 50) for x in range(0, 1040, 50)]
    with ThreadPoolExecutor(6) as pool:
        list(pool.map(lambda box: fast.read(0, box), boxes))
    fast.close()
    assert len(read) == len(set(read)) == 15


def test_the_cache_stays_within_its_size(synthetic, monkeypatch):
    monkeypatch.setattr("wsiseg.slides.tiled_tiff.MAX_CACHE_BYTES", 3 * 256 * 256 * 3)
    fast = TiledTiff.open(synthetic, [(1100, 700), (275, 175)])
    assert fast is not None
    whole = Box(0, 0, 1100, 700)
    first = fast.read(0, whole)
    assert len(fast._cache) == 3
    np.testing.assert_array_equal(fast.read(0, whole), first)
    fast.close()


# What is missing, damaged or not what it seems


def edit_count(path, page, tile, count):
    """Change how many bytes a tile is said to have."""
    with tifffile.TiffFile(path) as tiff:
        tag = tiff.pages[page].tags["TileByteCounts"]
    size = {3: 2, 4: 4, 16: 8}[tag.dtype]
    with path.open("r+b") as file:
        file.seek(tag.valueoffset + tile * size)
        file.write(count.to_bytes(size, "little"))


@pytest.mark.parametrize("aperio", [False, True], ids=["generic", "aperio"])
@pytest.mark.parametrize("page", [0, 1])
def test_missing_tiles_look_as_in_openslide(tmp_path, aperio, page):
    path = write_levels(tmp_path / "x.svs", compression="jpeg", aperio=aperio, num_levels=3)
    edit_count(path, page, 7, 0)
    with open_slide(path) as slide, openslide.OpenSlide(path) as theirs:
        for level, (width, height) in enumerate(theirs.level_dimensions):
            image = theirs.read_region((0, 0), level, (width, height))
            shown = np.asarray(image).astype(int)
            on_white = (shown[..., :3] * shown[..., 3:] + 255 * (255 - shown[..., 3:]) + 127) // 255
            raster = slide.meta.level_raster(level)
            np.testing.assert_array_equal(slide.read(raster, raster.box), on_white)
            assert not (on_white == 0).all(axis=-1).any()


def test_what_is_not_scanned_is_the_background(tmp_path):
    path = write_levels(tmp_path / "x.tiff", compression="jpeg")
    edit_count(path, 0, 10, 0)
    with open_slide(path) as slide:
        raster = slide.meta.level_raster(0)
        assert (slide.read(raster, Box(128, 128, 128, 128)) == 255).all()
        assert slide.jpeg_tile(raster, Box(128, 128, 128, 128)) is None
        assert slide.jpeg_tile(raster, Box(256, 128, 128, 128)) is not None


@pytest.mark.parametrize("kind", ["jpeg 4:2:0", "aperio jpeg"])
def test_a_tile_cut_short_is_an_error_that_names_slide_and_place(tmp_path, kind):
    path = write_levels(tmp_path / "torn.svs", **KINDS[kind])
    with tifffile.TiffFile(path) as tiff:
        count = tiff.pages[0].databytecounts[10]
    edit_count(path, 0, 10, count // 2)
    with open_slide(path) as slide:
        raster = slide.meta.level_raster(0)
        slide.read(raster, Box(0, 0, 128, 128))
        with pytest.raises(SlideReadError, match=r"slide 'torn'.* x=128 y=128 .*damaged"):
            slide.read(raster, Box(128, 128, 128, 128))
        with pytest.raises(SlideReadError, match=r"slide 'torn'.* x=128 y=128 .*damaged"):
            slide.jpeg_tile(raster, Box(128, 128, 128, 128))


def test_a_mismatch_with_openslide_is_a_warning_and_openslides_pixels(tmp_path, caplog):
    """The first page of level 1's size is another picture, which is no level to OpenSlide."""
    path = tmp_path / "two.tiff"
    full, _ = TISSUE.region(Box(0, 0, 1024, 640))
    half = np.ascontiguousarray(full[::2, ::2])
    options: dict[str, Any] = {
        "photometric": "rgb",
        "tile": (128, 128),
        "compression": "jpeg",
        "metadata": None,
    }
    with tifffile.TiffWriter(path) as tiff:
        tiff.write(full, resolution=(2e4, 2e4), resolutionunit="CENTIMETER", **options)
        tiff.write(255 - half, subfiletype=0, **options)
        tiff.write(half, subfiletype=1, **options)
    with caplog.at_level(logging.WARNING), open_slide(path) as slide:
        raster = slide.meta.level_raster(1)
        read = slide.read(raster, raster.box)
    assert "slide 'two': the tiles of level 1 decode to other pixels" in caplog.text
    assert np.abs(read.astype(int) - half).mean() < 5


def test_a_healthy_slide_is_opened_without_a_word(real_slide, caplog):
    with caplog.at_level(logging.DEBUG):
        source = OpenSlideSource(real_slide, place="slide 'x'")
    assert source.factors(0) == (8, 4, 2)
    assert caplog.text == ""
    source.close()


def test_formats_that_place_tiles_freely_are_left_to_openslide(synthetic):
    sizes = [(1100, 700), (275, 175)]
    assert TiledTiff.open(synthetic, sizes, vendor="ventana") is None
    assert TiledTiff.open(synthetic, sizes, vendor="leica") is None


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


def test_a_jpeg_2000_tile_that_claims_another_size_is_refused_before_it_is_decoded():
    image = np.full((64, 64, 3), 90, np.uint8)
    tile = bytes(imagecodecs.jpeg2k_encode(image, codecformat="j2k"))
    decoder = Jpeg2000Tiles(64, 64, is_ycbcr=False)
    assert (decoder.decode(tile, 0, 1) == 90).all()
    claim = bytearray(tile)
    claim[8:12] = (1 << 30).to_bytes(4, "big")  # 206 GB of pixels
    with pytest.raises(ValueError, match="a JPEG 2000 tile of 1073741824 x 64 px x 3"):
        decoder.decode(bytes(claim), 0, 1)
    with pytest.raises(ValueError, match="a JPEG 2000 tile without a header"):
        decoder.decode(tile[:20], 0, 1)
