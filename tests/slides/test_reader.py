"""A slide is read on a raster: true pixels, independent of the box, in the right place."""

import os
import pickle
import struct
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
import tifffile
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from wsiseg.errors import MissingMppError, SlideOpenError, SlideReadError
from wsiseg.geometry import Box, Raster
from wsiseg.slides import reader
from wsiseg.slides.reader import default_slide_id, open_slide

SHAPES = {
    "direct": ("deflate", 641, 385),
    "openslide": ("zstd", 640, 384),
    "openslide in blocks": ("zstd", 2301, 401),
}


@pytest.fixture(scope="module", params=[*SHAPES, "image", "real"])
def slide(request, tmp_path_factory, write_pyramid, real_slide):
    """One slide of each way in which pixels are read."""
    folder = tmp_path_factory.mktemp("slides")
    if request.param == "real":
        path = real_slide
    elif request.param == "image":
        path = folder / "image.png"
        noise = np.random.default_rng(0).integers(0, 256, (301, 403, 3), np.uint8)
        Image.fromarray(noise).save(path)
    else:
        codec, width, height = SHAPES[request.param]
        path = folder / "slide.tiff"
        write_pyramid(path, width, height, codec=codec)
    with open_slide(path, slide_mpp=0.5) as opened:
        yield opened


def level_raster(slide, level):
    """The raster that is a stored level."""
    return slide.meta.level_raster(level)


def read_whole(slide, raster):
    return slide.read(raster, raster.box)


@given(data=st.data(), mpp=st.sampled_from([0.3, 0.5, 0.77, 1.0, 1.37, 3.3, 20.0]))
@settings(max_examples=40, deadline=None)
def test_a_pixel_does_not_depend_on_the_box_it_is_read_in(slide, data, mpp):
    raster = slide.meta.raster(mpp)
    x = data.draw(st.integers(-40, raster.width_px))
    y = data.draw(st.integers(-40, raster.height_px))
    big = Box(x, y, data.draw(st.integers(1, 300)), data.draw(st.integers(1, 300)))
    left = data.draw(st.integers(0, big.width - 1))
    top = data.draw(st.integers(0, big.height - 1))
    width = data.draw(st.integers(1, big.width - left))
    height = data.draw(st.integers(1, big.height - top))
    alone = slide.read(raster, Box(x + left, y + top, width, height))
    within = slide.read(raster, big)[top : top + height, left : left + width]
    np.testing.assert_array_equal(alone, within)


@pytest.mark.parametrize(
    ("codec", "width", "height"), [("deflate", 2301, 1401), ("zstd", 640, 384)]
)
def test_the_pixels_of_a_level_are_the_stored_ones(tmp_path, write_pyramid, codec, width, height):
    levels = write_pyramid(tmp_path / "s.tiff", width, height, codec=codec)
    with open_slide(tmp_path / "s.tiff") as slide:
        for level, stored in enumerate(levels):
            raster = slide.meta.raster(0.5 * 2**level)
            assert slide.meta.snapped_level(raster) == level
            np.testing.assert_array_equal(read_whole(slide, raster), stored)


def test_openslide_moves_a_fractional_level_by_less_than_a_pixel(tmp_path, write_pyramid):
    stored = write_pyramid(tmp_path / "s.tiff", 2301, 401, codec="zstd")[1]
    with open_slide(tmp_path / "s.tiff") as slide:
        read = read_whole(slide, slide.meta.raster(1.0)).astype(int)
    # Red counts level-0 columns; one level pixel is two of them. Wrap-arounds at 256 are left out.
    moved = np.abs(read[..., 0] - stored[..., 0])[:, stored[0, :, 0] % 250 > 4]
    assert moved.max() < 2


def footprint_weights(count, downsample, size):
    """Share of each source pixel in each target pixel, by plain interval arithmetic."""
    weights = np.zeros((count, size))
    for i in range(count):
        low, high = i * downsample, min((i + 1) * downsample, size)
        for j in range(int(low), min(size, int(np.ceil(high)))):
            weights[i, j] = max(0.0, min(high, j + 1) - max(low, j))
    return weights / weights.sum(axis=1, keepdims=True)


@pytest.mark.parametrize("mpp", [0.3, 0.65, 0.8, 1.9])
def test_a_coarser_raster_is_the_mean_of_what_its_pixels_cover(tmp_path, mpp):
    stored = np.random.default_rng(3).integers(0, 256, (90, 130, 3), np.uint8)
    Image.fromarray(stored).save(tmp_path / "x.png")
    with open_slide(tmp_path / "x.png", slide_mpp=0.5) as slide:
        raster = slide.meta.raster(mpp)
        read = read_whole(slide, raster)
    down = footprint_weights(raster.height_px, raster.downsample_y, 90)
    across = footprint_weights(raster.width_px, raster.downsample_x, 130)
    wanted = np.einsum("ij,jkc,lk->ilc", down, stored.astype(float), across)
    # The last row and column reach beyond the slide, where its edge goes on.
    assert np.abs(read - wanted)[:-1, :-1].max() <= 0.75


def test_a_whole_downsample_is_the_rounded_mean_of_blocks(tmp_path):
    stored = np.random.default_rng(4).integers(0, 256, (64, 96, 3), np.uint8)
    Image.fromarray(stored).save(tmp_path / "x.png")
    with open_slide(tmp_path / "x.png", slide_mpp=0.5) as slide:
        read = read_whole(slide, slide.meta.raster(2.0))
    sums = stored.reshape(16, 4, 24, 4, 3).sum(axis=(1, 3), dtype=int)
    np.testing.assert_array_equal(read, (sums + 8) // 16)


def test_large_boxes_are_read_in_parts_that_do_not_show(real_slide, monkeypatch):
    with open_slide(real_slide) as slide:
        raster = slide.meta.raster(7.3)
        whole = read_whole(slide, raster)
        monkeypatch.setattr(reader, "STRIP_BYTES", 20_000)  # less than one line of pixels
        np.testing.assert_array_equal(read_whole(slide, raster), whole)


def test_outside_the_slide_is_background(slide):
    raster = level_raster(slide, 0)
    read = slide.read(raster, Box(-3, -2, 10, 10))
    assert (read[:2] == slide.meta.background).all()
    assert (read[:, :3] == slide.meta.background).all()
    np.testing.assert_array_equal(read[2:, 3:], slide.read(raster, Box(0, 0, 7, 8)))
    far = slide.read(raster, Box(raster.width_px + 5, 0, 4, 4))
    assert (far == slide.meta.background).all()


def test_threads_read_what_one_thread_reads(slide):
    rng = np.random.default_rng(5)
    rasters = [slide.meta.raster(mpp) for mpp in (0.5, 0.9)]
    jobs = [
        (raster, Box(int(rng.integers(0, 200)), int(rng.integers(0, 150)), 70, 60))
        for _ in range(30)
        for raster in rasters
    ]
    alone = [slide.read(*job) for job in jobs]
    with ThreadPoolExecutor(4) as pool:
        together = list(pool.map(lambda job: slide.read(*job), jobs))
    for one, other in zip(alone, together, strict=True):
        np.testing.assert_array_equal(one, other)


def test_what_was_read_may_be_changed(slide):
    raster = level_raster(slide, 0)
    first = slide.read(raster, raster.box)
    before = first.copy()
    first[:] = 7
    np.testing.assert_array_equal(slide.read(raster, raster.box), before)


def test_an_open_slide_is_not_sent_to_a_process(slide):
    with pytest.raises(TypeError, match="send its path"):
        pickle.dumps(slide)


def test_a_thumbnail_keeps_the_shape_and_the_limit(real_slide):
    with open_slide(real_slide) as slide:
        assert slide.thumbnail(200).shape == (200, 149, 3)
        assert slide.thumbnail(10_000).shape == (2967, 2220, 3)
        assert slide.thumbnail(1).shape == (1, 1, 3)


def test_the_real_slide_is_described(real_slide):
    with open_slide(real_slide) as slide:
        assert slide.meta.to_dict() == {
            "slide_id": "cmu-1-small-region", "width_px_l0": 2220, "height_px_l0": 2967,
            "mpp_x": 0.499, "mpp_y": 0.499, "mpp_source": "slide", "level_sizes": [[2220, 2967]],
            "level_downsamples": [[1.0, 1.0]], "bounds": None, "background": [255, 255, 255],
            "reader": "openslide:aperio",
        }  # fmt: skip


def test_a_level_close_to_the_wanted_resolution_is_taken_as_it_is(real_slide):
    with open_slide(real_slide) as slide:
        close = slide.meta.raster(0.505)
        assert close == Raster(2220, 2967, 0.499, 0.499, 1.0, 1.0)
        between = slide.meta.raster(0.8)
        assert slide.meta.snapped_level(between) is None
        down = 0.8 / 0.499
        assert between == Raster(1385, 1851, 0.8, 0.8, down, down)


def test_a_resolution_close_to_whole_pixels_takes_whole_pixels(real_slide):
    with open_slide(real_slide) as slide:
        assert slide.meta.raster(1.0) == Raster(1110, 1484, 0.998, 0.998, 2.0, 2.0)
        assert slide.meta.raster(1.03).downsample_x == 1.03 / 0.499  # 3 % off


def test_odd_sizes_still_have_whole_downsamples(tmp_path, write_pyramid):
    write_pyramid(tmp_path / "s.tiff", 641, 385)
    with open_slide(tmp_path / "s.tiff") as slide:
        assert slide.meta.level_sizes == ((641, 385), (320, 192))
        assert slide.meta.level_downsamples == ((1.0, 1.0), (2.0, 2.0))


# Resolution


def with_tags(path, value, unit, tile=(64, 64)):
    pixels = np.full((128, 128, 3), 90, np.uint8)
    tifffile.imwrite(
        path, pixels, photometric="rgb", tile=tile, resolution=value, resolutionunit=unit
    )
    return path


@pytest.mark.parametrize("tile", [(64, 64), None], ids=["tiled", "plain"])
def test_the_resolution_tags_of_a_tiff_count(tmp_path, tile):
    path = with_tags(tmp_path / "x.tiff", (40_000, 40_000), "CENTIMETER", tile)
    with open_slide(path) as slide:
        assert (slide.meta.mpp_x, slide.meta.mpp_y) == (0.25, 0.25)
        assert slide.meta.mpp_source == "tiff-resolution"


@pytest.mark.parametrize("tile", [(64, 64), None], ids=["tiled", "plain"])
@pytest.mark.parametrize(
    ("value", "unit", "shown"),
    [
        ((72, 72), "INCH", "352.8"),
        ((96, 96), "INCH", "264.6"),
        ((300, 300), "INCH", "84.67"),
        ((20_000, 40_000), "CENTIMETER", "differ"),
        ((1, 1), "NONE", "states no resolution"),
    ],
)
def test_a_resolution_that_cannot_be_is_not_believed(tmp_path, value, unit, shown, tile):
    path = with_tags(tmp_path / "print.tiff", value, unit, tile)
    with pytest.raises(MissingMppError, match="slide 'print'") as caught:
        open_slide(path)
    assert shown in str(caught.value)
    assert "--slide-mpp" in str(caught.value)
    with open_slide(path, require_mpp=False) as slide:
        assert (slide.meta.mpp_x, slide.meta.mpp_source) == (None, None)
        with pytest.raises(MissingMppError, match="--slide-mpp"):
            slide.meta.raster(0.5)


def test_the_users_resolution_overrides_the_files(real_slide):
    with open_slide(real_slide, slide_mpp=0.25) as slide:
        assert (slide.meta.mpp_x, slide.meta.mpp_y) == (0.25, 0.25)
        assert slide.meta.mpp_source == "user"


@pytest.mark.parametrize("mpp", [float("nan"), float("inf"), -1.0, 0.0, 0.001, 1000.0])
def test_an_absurd_resolution_of_the_user_is_refused(real_slide, mpp):
    with pytest.raises(MissingMppError, match="--slide-mpp"):
        open_slide(real_slide, slide_mpp=mpp)


# Plain images


def test_transparency_is_laid_on_white(tmp_path):
    pixels = np.zeros((20, 20, 4), np.uint8)
    pixels[10:] = (200, 0, 0, 255)
    Image.fromarray(pixels).save(tmp_path / "x.png")
    with open_slide(tmp_path / "x.png", slide_mpp=1.0) as slide:
        read = read_whole(slide, slide.meta.raster(1.0))
    assert (read[:10] == 255).all()
    assert (read[10:] == (200, 0, 0)).all()


def png_that_claims(width, height):
    def chunk(kind, data):
        crc = zlib.crc32(kind + data)
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", crc)

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


# Bad input


def make_deep_image(path):
    Image.fromarray(np.full((20, 20), 30_000, np.uint16)).save(path)


BAD = [
    ("gone.svs", lambda p: None, "no such file"),
    ("a\0b.svs", lambda p: None, "null byte"),
    ("n" * 300 + ".svs", lambda p: None, "too long"),
    ("folder.svs", Path.mkdir, "folder"),
    ("store.zarr", Path.mkdir, "folder"),
    ("pipe.svs", os.mkfifo, "not a regular file"),
    ("empty.svs", Path.touch, "empty"),
    ("text.svs", lambda p: p.write_text("hello " * 99), "not a slide"),
    ("text.tif", lambda p: p.write_text("hello " * 99), "not a slide"),
    ("text.png", lambda p: p.write_text("hello " * 99), "not a slide"),
    ("text.mrxs", lambda p: p.write_text("hello " * 99), "not a slide"),
    ("text.ome.tif", lambda p: p.write_text("hello " * 99), "not a slide"),
    ("text.jp2", lambda p: p.write_text("hello " * 99), "not a slide"),
    ("text.dcm", lambda p: p.write_text("hello " * 99), "not a slide"),
    ("bomb.png", lambda p: p.write_bytes(png_that_claims(60_000, 60_000)), "limit"),
    ("cut.png", lambda p: p.write_bytes(png_that_claims(60, 60)), "truncated or damaged"),
    ("deep.png", make_deep_image, "8 bits"),
]


@pytest.mark.parametrize(("name", "make", "words"), BAD, ids=[b[0][:12] for b in BAD])
def test_what_is_no_slide_is_refused_in_one_line(tmp_path, name, make, words):
    path = tmp_path / name
    make(path)
    with pytest.raises(SlideOpenError, match=words) as caught:
        open_slide(path, slide_mpp=0.5)
    text = str(caught.value)
    assert text.startswith(f"slide '{default_slide_id(path)}': ")
    assert "\n" not in text


def test_a_truncated_slide_is_refused_with_openslides_reason(tmp_path, real_slide):
    path = tmp_path / "cut.svs"
    path.write_bytes(real_slide.read_bytes()[:200_000])
    with pytest.raises(SlideOpenError, match=r"slide 'cut': .*damaged"):
        open_slide(path)


@pytest.mark.parametrize("codec", ["deflate", "zstd"])
def test_damage_in_the_middle_names_the_slide_and_the_place(tmp_path, write_pyramid, codec):
    path = tmp_path / "torn.tiff"
    write_pyramid(path, 640, 384, codec=codec)
    with tifffile.TiffFile(path) as tiff:
        page = tiff.pages[0]
        offset, count = page.dataoffsets[0], page.databytecounts[0]
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\xff" * count)
    with open_slide(path) as slide:
        raster = slide.meta.raster(0.5)
        with pytest.raises(SlideReadError, match=r"slide 'torn': .* x=10 y=20 30 x 40 px"):
            slide.read(raster, Box(10, 20, 30, 40))


def test_a_decoders_error_of_several_lines_is_told_in_one(real_slide, monkeypatch):
    def fail(*_):
        raise OSError("Improper JPEG sampling factors 2,2\nApparently should be 1,1.")

    with open_slide(real_slide) as slide:
        monkeypatch.setattr(slide, "_read_inside", fail)
        with pytest.raises(SlideReadError, match=r"factors 2,2 Apparently should be 1,1\.\); is"):
            slide.read(slide.meta.raster(0.499), Box(0, 0, 8, 8))


# Names


@given(name=st.text(min_size=1).filter(lambda s: "/" not in s and "\0" not in s))
@settings(max_examples=200, deadline=None)
def test_a_slide_id_is_fit_to_name_a_file(name):
    slide_id = default_slide_id(Path(name))
    assert 1 <= len(slide_id.encode()) <= 200
    assert not slide_id.startswith(".")
    assert slide_id == slide_id.strip()
    assert not any(c in '/\\:*?"<>|' or ord(c) < 32 for c in slide_id)
    assert default_slide_id(Path(slide_id + ".svs")) == slide_id


@pytest.mark.parametrize(
    ("name", "slide_id"),
    [
        ("case 1.svs", "case 1"),
        ("a.b.tiff", "a.b"),
        ("a.ome.tif", "a"),
        (".hidden", "_hidden"),
        ("x\ny.svs", "x_y"),
        (os.fsdecode(b"\xff.svs"), "_"),
    ],
)
def test_a_slide_id_comes_from_the_file_name(name, slide_id):
    assert default_slide_id(Path(name)) == slide_id
