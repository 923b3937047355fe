"""Each way in which a file states its resolution, or fails to: a right scale or a clear refusal."""

from typing import Any

import numpy as np
import pytest
import tifffile

from wsiseg.errors import MissingMppError
from wsiseg.geometry import Box
from wsiseg.slides.reader import open_slide

WIDTH, HEIGHT = 700, 500


def coordinate_colours(width, height, down):
    """Red and green count level-0 columns and rows from 0 to 250 and again, at pixel centres.

    A whole downsample drops what is left over at the border, as writers that halve do; another
    fits the slide into the level's size.
    """
    steps = (down, down) if float(down).is_integer() else (WIDTH / width, HEIGHT / height)
    x, y = (
        (np.arange(n) + 0.5) * step - 0.5 for n, step in zip((width, height), steps, strict=True)
    )
    red, green = np.meshgrid(x % 250, y % 250)
    return np.rint(np.stack([red, green, 0 * red], axis=-1)).astype(np.uint8)


def write(path, *, downs=(1,), description=None, resolution=None, unit=None, tile=(128, 128)):
    tags: dict[str, Any] = {"photometric": "rgb", "compression": "deflate", "metadata": None}
    with tifffile.TiffWriter(path) as tiff:
        for i, down in enumerate(downs):
            size = int(WIDTH / down), int(HEIGHT / down)
            tiff.write(
                coordinate_colours(*size, down), tile=tile,
                subfiletype=int(i > 0 and not description),
                description=description, resolution=resolution, resolutionunit=unit, **tags,
            )  # fmt: skip
    return path


def aperio(fields):
    return f"Aperio Image Library v11.2.1 \r\n{WIDTH}x{HEIGHT} (128x128) Q=90{fields}"


PER_CM = "CENTIMETER"

GOOD: dict[str, tuple[dict[str, Any], float]] = {
    "tags in cm": ({"resolution": (2e4, 2e4), "unit": PER_CM}, 0.5),
    "tags in inch": ({"resolution": (50_800, 50_800), "unit": "INCH"}, 0.5),
    "axes 1 % apart": ({"resolution": (20_000, 20_200), "unit": PER_CM}, 0.5),
    "tags, two levels": ({"resolution": (2e4, 2e4), "unit": PER_CM, "downs": (1, 2)}, 0.5),
    "a level of an odd downsample": (
        {"resolution": (4e4, 4e4), "unit": PER_CM, "downs": (1, 3.97)}, 0.25
    ),
    "levels at 1, 4 and 16": (
        {"resolution": (4e4, 4e4), "unit": PER_CM, "downs": (1, 4, 16)}, 0.25
    ),
    "aperio": ({"description": aperio("|AppMag = 20|MPP = 0.4990")}, 0.499),
    "aperio without power": ({"description": aperio("|MPP = 0.5020")}, 0.502),
    "aperio with a comma": ({"description": aperio("|AppMag = 40|MPP = 0,25")}, 0.25),
    "aperio of 40x": ({"description": aperio("|MPP = 0.2525"), "downs": (1, 4)}, 0.2525),
    "aperio, levels only": ({"description": aperio("|MPP = 0.5"), "downs": (1, 2, 4)}, 0.5),
}  # fmt: skip


@pytest.mark.parametrize("mpp", [0.5, 0.77, 1.0, 2.0])
@pytest.mark.parametrize("name", GOOD)
def test_a_stated_resolution_gives_the_right_scale(tmp_path, name, mpp):
    options, stated = GOOD[name]
    with open_slide(write(tmp_path / "s.svs", **options)) as slide:
        meta = slide.meta
        assert meta.mpp_x is not None
        assert meta.mpp_x == pytest.approx(stated, rel=0.02)
        raster = meta.raster(mpp)
        assert raster.mpp == pytest.approx(mpp, rel=0.021)
        assert raster.mpp_x == pytest.approx(meta.mpp_x * raster.downsample_x)
        read = slide.read(raster, raster.box).astype(float)
    for axis, (down, size) in enumerate(
        ((raster.downsample_x, WIDTH), (raster.downsample_y, HEIGHT))
    ):
        line = read[:, :, axis].mean(axis=axis)
        place = (np.arange(len(line)) + 0.5) * down - 0.5
        # Not where the count begins again, nor where the last pixel reaches over the border.
        clear = (place % 250 > 20) & (place % 250 < 230) & (place < size - 2 * max(down, 4))
        assert clear.sum() > 20
        assert np.abs(line - place % 250)[clear].max() <= 1


BAD: dict[str, tuple[dict[str, Any], str]] = {
    "no tags": ({}, "states no resolution"),
    "a unit of none": ({"resolution": (2e4, 2e4), "unit": "NONE"}, "states no resolution"),
    "72 dpi": ({"resolution": (72, 72), "unit": "INCH"}, "352.8"),
    "300 dpi": ({"resolution": (300, 300), "unit": "INCH"}, "84.67"),
    "one pixel per cm": ({"resolution": (1, 1), "unit": PER_CM}, "cannot be"),
    "far too fine": ({"resolution": (1e8, 1e8), "unit": PER_CM}, "cannot be"),
    "axes at 1 : 2": ({"resolution": (20_000, 40_000), "unit": PER_CM}, "differ"),
    "aperio without mpp": ({"description": aperio("|AppMag = 20")}, "states no resolution"),
    "aperio, mpp empty": ({"description": aperio("|AppMag = 20|MPP = ")}, "resolution"),
    "aperio, mpp 0": ({"description": aperio("|AppMag = 20|MPP = 0")}, "cannot be"),
    "aperio, mpp negative": ({"description": aperio("|MPP = -0.25")}, "cannot be"),
    "aperio, mpp NaN": ({"description": aperio("|MPP = NaN")}, "cannot be|states no"),
    "aperio, mpp infinite": ({"description": aperio("|MPP = inf")}, "cannot be|states no"),
    "aperio, mpp a word": ({"description": aperio("|MPP = quarter")}, "cannot be|states no"),
    "aperio, mpp in metres": ({"description": aperio("|MPP = 2.5e-7")}, "cannot be"),
    "aperio, mpp of a flatbed": ({"description": aperio("|MPP = 250")}, "cannot be"),
}


@pytest.mark.parametrize("name", BAD)
def test_no_resolution_or_an_absurd_one_names_the_remedy(tmp_path, name):
    options, words = BAD[name]
    path = write(tmp_path / "case 7.svs", **options)
    with pytest.raises(MissingMppError, match=words) as caught:
        open_slide(path)
    text = str(caught.value)
    assert text.startswith("slide 'case 7': ")
    assert "--slide-mpp" in text
    assert "\n" not in text
    with open_slide(path, slide_mpp=0.25) as slide:
        assert (slide.meta.mpp_x, slide.meta.mpp_source) == (0.25, "user")
        raster = slide.meta.raster(0.5)
        assert slide.read(raster, Box(30, 40, 1, 1))[0, 0, :2].tolist() == pytest.approx(
            [60.5, 80.5], abs=1
        )
