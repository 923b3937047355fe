"""Where pixels come from: OpenSlide with its bounds and transparency, plain images, sniffing."""

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tifffile
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from wsiseg.errors import MissingMppError, SlideOpenError
from wsiseg.geometry import Box
from wsiseg.slides.reader import open_slide
from wsiseg.slides.resolution import read_resolution
from wsiseg.slides.sources import OpenSlideSource, _parse_color, is_for_tiatoolbox

NOISE = np.random.default_rng(0).integers(0, 256, (60, 90, 3), np.uint8)


def read_whole(path, **options):
    with open_slide(path, slide_mpp=0.5, **options) as slide:
        raster = slide.meta.raster(0.5)
        return slide.read(raster, raster.box)


@pytest.mark.parametrize("name", ["x.png", "x.bmp", "x.tif", "x.TIFF", "x.webp", "x.jp2"])
def test_a_lossless_image_is_a_slide_with_its_own_pixels(tmp_path, name):
    exactly: dict[str, Any] = {"x.webp": {"lossless": True}, "x.jp2": {"irreversible": False}}
    Image.fromarray(NOISE).save(tmp_path / name, **exactly.get(name, {}))
    np.testing.assert_array_equal(read_whole(tmp_path / name), NOISE)


def test_a_jpeg_image_is_a_slide(tmp_path):
    Image.fromarray(NOISE).save(tmp_path / "x.jpg", quality=95)
    with Image.open(tmp_path / "x.jpg") as image:
        np.testing.assert_array_equal(read_whole(tmp_path / "x.jpg"), np.asarray(image))


@pytest.mark.parametrize("name", ["x.png", "x.jpg", "x.jp2"])
def test_an_image_without_resolution_names_slide_mpp(tmp_path, name):
    Image.fromarray(NOISE).save(tmp_path / name)
    with pytest.raises(MissingMppError, match=r"slide 'x': states no resolution.*--slide-mpp"):
        open_slide(tmp_path / name)


@pytest.mark.parametrize("mode", ["L", "P", "RGBA", "LA", "1", "CMYK"])
def test_an_image_of_any_mode_becomes_rgb(tmp_path, mode):
    image = Image.fromarray(NOISE).convert(mode)
    path = tmp_path / ("x.tif" if mode == "CMYK" else "x.png")
    image.save(path)
    read = read_whole(path)
    assert read.shape == (60, 90, 3)
    if mode in ("L", "LA", "1"):
        assert (read[..., 0] == read[..., 2]).all()


@pytest.mark.parametrize("name", ["cut.png", "cut.jpg", "cut.jp2"])
def test_a_truncated_image_is_an_error_and_not_grey(tmp_path, name):
    Image.fromarray(NOISE).save(tmp_path / name)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(SlideOpenError, match=r"slide 'cut': "):
        open_slide(tmp_path / name, slide_mpp=0.5)


def test_the_scanned_part_of_a_slide_is_known(real_slide, monkeypatch):
    source_properties = {
        "openslide.bounds-x": "300", "openslide.bounds-y": "200",
        "openslide.bounds-width": "1500", "openslide.bounds-height": "1000",
    }  # fmt: skip
    original = OpenSlideSource.__init__

    def with_bounds(self, path, *, place):
        original(self, path, place=place)
        self.properties = {**self.properties, **source_properties}

    monkeypatch.setattr(OpenSlideSource, "__init__", with_bounds)
    with open_slide(real_slide) as slide:
        assert slide.meta.bounds == Box(300, 200, 1500, 1000)
        assert (slide.meta.width_px_l0, slide.meta.height_px_l0) == (2220, 2967)


@pytest.mark.parametrize(
    ("text", "color"),
    [("EFEFEF", (239,) * 3), ("000a10", (0, 10, 16)), ("", (255,) * 3), ("zz", (255,) * 3)],
)
def test_the_background_colour_is_the_files_or_white(text, color):
    assert _parse_color(text) == color


@given(
    alpha=st.sampled_from([0, 1, 128, 254, 255]),
    value=st.integers(0, 255),
    back=st.integers(0, 255),
)
def test_transparent_pixels_lie_on_the_background(alpha, value, back):
    source = OpenSlideSource.__new__(OpenSlideSource)
    source._downsamples = (1.0,)
    source.background = (back, 255 - back, 7)

    class Transparent:
        def read_region(self, place, level, size):
            return Image.new("RGBA", size, (value, value, value, alpha))

    shown: Any = Transparent()
    source._slide = shown
    read = source._region(0, Box(0, 0, 2, 2))[0, 0]
    wanted = [(value * alpha + b * (255 - alpha)) / 255 for b in source.background]
    assert np.abs(read - wanted).max() <= 0.5


OME = (
    '<?xml version="1.0"?><OME><Image><Pixels DimensionOrder="XYCZT" {} SizeX="9"></Pixels></Image>'
)


@pytest.mark.parametrize(
    ("attributes", "mpp"),
    [
        ('PhysicalSizeX="0.25" PhysicalSizeY="0.25"', 0.25),
        ('PhysicalSizeX="0.25" PhysicalSizeXUnit="µm" PhysicalSizeY="0.25"', 0.25),
        ('PhysicalSizeX="250" PhysicalSizeXUnit="nm" PhysicalSizeY="250" '
         'PhysicalSizeYUnit="nm"', 0.25),
        ('PhysicalSizeX="0.0005" PhysicalSizeXUnit="mm" PhysicalSizeY="0.5"', 0.5),
    ],
)  # fmt: skip
def test_ome_xml_states_the_resolution(attributes, mpp):
    found = read_resolution({"tiff.ImageDescription": OME.format(attributes)}, None)
    assert found.problem is None
    assert found.mpp_x == pytest.approx(mpp)
    assert found.mpp_y == pytest.approx(mpp)


@pytest.mark.parametrize(
    ("attributes", "words"),
    [
        ("", "states no resolution"),
        ('PhysicalSizeX="0.25"', "cannot be"),
        ('PhysicalSizeX="0" PhysicalSizeY="0"', "cannot be"),
        ('PhysicalSizeX="1" PhysicalSizeXUnit="pixel" PhysicalSizeY="1"', "cannot be"),
        ('PhysicalSizeX="abc" PhysicalSizeY="1"', "cannot be"),
    ],
)
def test_ome_xml_that_states_none_is_not_believed(attributes, words):
    found = read_resolution({"tiff.ImageDescription": OME.format(attributes)}, None)
    assert found.mpp_x is None
    assert found.problem is not None
    assert words in found.problem


@pytest.mark.parametrize(
    ("name", "data", "expected"),
    [
        ("x.ome.tif", b"II*\0", True),
        ("x.ome.tiff", b"MM\0+", True),
        ("x.ome.tif", b"text", False),
        ("x.tif", b"II*\0", False),
        ("x.jp2", b"\0\0\0\x0cjP  \r\n", True),
        ("x.jp2", b"jP", False),
        ("x.dcm", b"\0" * 128 + b"DICM", True),
        ("x.dcm", b"DICM", False),
        ("x.zarr", b"", False),
    ],
)
def test_tiatoolbox_is_asked_only_for_what_looks_like_its_own(tmp_path, name, data, expected):
    (tmp_path / name).write_bytes(data)
    assert is_for_tiatoolbox(tmp_path / name) is expected


def test_the_usual_ways_of_reading_never_import_tiatoolbox(real_slide, tmp_path):
    Image.fromarray(NOISE).save(tmp_path / "x.jp2")
    tifffile.imwrite(tmp_path / "y.ome.tif", NOISE, photometric="rgb", tile=(16, 16))
    code = (
        "import sys\n"
        "from pathlib import Path\n"
        "from wsiseg.slides.reader import open_slide\n"
        "from wsiseg.slides.tissue import make_tissue_mask\n"
        "from wsiseg.settings.tile import TissueConfig\n"
        "for path in sys.argv[1:]:\n"
        "    with open_slide(Path(path), slide_mpp=8.0) as slide:\n"
        "        make_tissue_mask(slide, TissueConfig(method='none'))\n"
        "print(sorted({'tiatoolbox', 'torch', 'dask'} & set(sys.modules)))\n"
    )
    paths = [str(real_slide), str(tmp_path / "x.jp2"), str(tmp_path / "y.ome.tif")]
    done = subprocess.run(
        [sys.executable, "-c", code, *paths], capture_output=True, text=True, check=True
    )
    assert done.stdout.strip() == "[]"


def test_a_missing_tiatoolbox_is_named_with_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "tiatoolbox.wsicore.wsireader", None)
    path = Path(tmp_path / "x.dcm")
    path.write_bytes(b"\0" * 128 + b"DICM" + b"\0" * 100)
    with pytest.raises(SlideOpenError, match=r"slide 'x': .*pip install 'wsiseg\[tia\]'"):
        open_slide(path, slide_mpp=0.5)
