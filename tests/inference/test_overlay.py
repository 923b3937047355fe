"""The picture: the slide's proportions, each class in its colour where it lies, a legend."""

import numpy as np
import pytest
from PIL import Image
from segmenting import (
    CLASSES,
    DARK,
    GLASS,
    STAINED,
    ByColour,
    windows_of,
    write_image,
    write_mask,
)

from wsiseg.classes import ClassTable
from wsiseg.inference.overlay import PICTURE_PX, paint, with_legend, write_overlay
from wsiseg.slides.reader import open_slide

RED, BLUE = (c.color for c in CLASSES.classes)


def overlay_of(tmp_path, width, height):
    image = np.empty((height, width, 3), np.uint8)
    image[:] = STAINED
    image[: height // 2, : width // 2] = DARK
    image[-height // 4 :, -width // 4 :] = GLASS
    path = write_image(tmp_path / "s.png", image)
    with open_slide(path, slide_mpp=0.5) as slide:
        mask, _ = write_mask(
            tmp_path / "m.zarr", slide, ByColour(), windows_of(slide, 4.0), chunk_px=512
        )
        write_overlay(slide, mask, tmp_path / "o.png", area_um2={"Dark": 2.5e6, "Pale": 31.0})
    return np.asarray(Image.open(tmp_path / "o.png").convert("RGB"))


@pytest.mark.parametrize(
    ("width", "height"),
    [(900, 600), (4400, 2200), (2200, 4400), (5000, 300), (300, 5000), (60, 40)],
)
def test_the_picture_has_the_slides_proportions_and_fits(tmp_path, width, height):
    picture = overlay_of(tmp_path, width, height)
    assert max(picture.shape) <= PICTURE_PX
    is_slide = (picture != 255).any(axis=2)
    # Every pixel of this slide is stained, dark or grey: what is white is legend and margin.
    columns = int(is_slide[: picture.shape[0] // 8].any(axis=0).sum())
    rows = int(is_slide[:, 0].sum())
    assert columns / rows == pytest.approx(width / height, rel=0.02)
    assert max(columns, rows) >= min(max(width, height), PICTURE_PX - 400)


def test_classes_have_their_colour_where_they_lie(tmp_path):
    picture = overlay_of(tmp_path, 900, 600).astype(int)
    inside = picture[150, 225]
    assert np.abs(inside - (np.array(DARK) + 0.28 * (np.array(RED) - DARK))).max() <= 1
    assert picture[450, 225].tolist() == list(STAINED)
    is_red = (picture == RED).all(axis=2)
    assert is_red[100, 440:452].any()  # the outline, where dark ends at x = 450
    assert not is_red[100, 460:].any()
    assert (picture[600:] == RED).all(axis=2).sum() > 300  # the legend's swatches
    assert (picture[600:] == BLUE).all(axis=2).sum() > 300


def test_what_has_no_class_keeps_its_pixels():
    image = np.full((9, 9, 3), 77, np.uint8)
    labels = np.zeros((9, 9), np.uint8)
    labels[0] = 255
    np.testing.assert_array_equal(paint(image, labels, CLASSES), image)
    labels[4, 4] = 1
    painted = paint(image, labels, CLASSES)
    assert painted[4, 4].tolist() == list(RED)
    assert (painted != image).any(axis=2).sum() == 1


def test_a_legend_leaves_the_image_above_it_alone():
    image = np.full((50, 700, 3), 9, np.uint8)
    picture = with_legend(image, [("Dark  1 mm2", RED)])
    np.testing.assert_array_equal(picture[:50, :700], image)
    assert picture.shape[0] > 80
    text = picture[50:, 60:]
    assert (text.sum(axis=2) < 300).sum() > 50


def test_many_classes_with_long_names_still_fit(tmp_path):
    names = [f"{'Very long name ' * 8}{i}" for i in range(60)]
    image = np.full((800, 200, 3), 120, np.uint8)
    path = write_image(tmp_path / "s.png", image)
    with open_slide(path, slide_mpp=0.5) as slide:
        windows = windows_of(slide, 4.0)
        mask, _ = write_mask(tmp_path / "m.zarr", slide, ByColour(), windows)
        mask.classes = ClassTable.of_names(names)
        write_overlay(slide, mask, tmp_path / "o.png", area_um2={})
    with Image.open(tmp_path / "o.png") as picture:
        assert max(picture.size) <= PICTURE_PX
