"""Mask images: labels as drawn, the largest share where resampled, refused where not labels."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from wsiseg.classes import ClassTable
from wsiseg.errors import AnnotationError
from wsiseg.geometry import Box, Raster
from wsiseg.slides.images import open_image
from wsiseg.slides.label_image import LabelImage, find_label_image, read_values

ONE = ClassTable.of_names(["Nucleus"])
TWO = ClassTable.of_names(["Tumor", "Stroma"])


def raster(width, height, down):
    size = max(1, int(np.ceil(width / down))), max(1, int(np.ceil(height / down)))
    return Raster(*size, 0.5, 0.5, down, down)


def open_mask(path, values, classes=TWO, mode=None):
    image = Image.fromarray(values)
    (image.convert(mode) if mode else image).save(path)
    height, width = values.shape[:2]
    return LabelImage.open(
        path, slide_id="s1", width_px_l0=width, height_px_l0=height, classes=classes
    )


def test_at_full_resolution_labels_are_the_values(tmp_path):
    values = np.random.default_rng(0).choice(np.array([0, 1, 2, 255], np.uint8), (40, 60))
    labels = open_mask(tmp_path / "m.png", values)
    np.testing.assert_array_equal(labels.read(raster(60, 40, 1), Box(0, 0, 60, 40)), values)


def test_outside_the_slide_is_ignored(tmp_path):
    labels = open_mask(tmp_path / "m.png", np.ones((10, 10), np.uint8))
    read = labels.read(raster(10, 10, 1), Box(-2, -1, 14, 14))
    assert (read[1:11, 2:12] == 1).all()
    read[1:11, 2:12] = 255
    assert (read == 255).all()
    assert (labels.read(raster(10, 10, 1), Box(50, 50, 3, 3)) == 255).all()


@given(down=st.sampled_from([2, 3, 4, 7]), seed=st.integers(0, 50))
@settings(max_examples=30, deadline=None)
def test_the_label_of_most_pixels_wins_and_the_lowest_of_equals(down, seed):
    values = np.random.default_rng(seed).choice(np.array([0, 1, 2, 255], np.uint8), (28, 42))
    read = LabelImage(values).read(raster(42, 28, down), Box(0, 0, 42 // down, 28 // down))
    for y in range(28 // down):
        for x in range(42 // down):
            block = values[y * down : (y + 1) * down, x * down : (x + 1) * down]
            counts = np.bincount(block.ravel(), minlength=256)
            assert counts[read[y, x]] == counts.max()
            if down in (2, 4):  # a third is no whole number of weight units
                assert read[y, x] == counts.argmax()


@given(down=st.floats(0.4, 6), data=st.data())
@settings(max_examples=40, deadline=None)
def test_a_label_does_not_depend_on_the_box(down, data):
    values = np.random.default_rng(3).choice(np.array([0, 1, 2], np.uint8), (30, 44))
    labels, grid = LabelImage(values), raster(44, 30, down)
    whole = labels.read(grid, grid.box)
    x = data.draw(st.integers(0, grid.width_px - 1))
    y = data.draw(st.integers(0, grid.height_px - 1))
    box = Box(x, y, data.draw(st.integers(1, 9)), data.draw(st.integers(1, 9)))
    box = box.intersection(grid.box)
    part = whole[box.y : box.bottom, box.x : box.right]
    np.testing.assert_array_equal(labels.read(grid, box), part)
    assert set(np.unique(whole)) <= {0, 1, 2}


@pytest.mark.parametrize("mode", ["L", "1", "P"])
def test_a_binary_mask_is_background_and_the_one_class(tmp_path, mode):
    values = np.zeros((8, 8), np.uint8)
    values[2:5] = 255
    if mode == "P":
        values[2:5] = 1
    labels = open_mask(tmp_path / "m.png", values, ONE, mode)
    np.testing.assert_array_equal(labels.labels_l0, (values > 0).astype(np.uint8))


@pytest.mark.parametrize(
    ("name", "values", "classes", "words"),
    [
        ("m.png", np.full((8, 8), 3, np.uint8), TWO, r"value 3, .*0\.\.2.*--classes"),
        ("m.png", np.zeros((8, 8, 3), np.uint8), TWO, "mode RGB"),
        ("m.png", np.zeros((8, 8), np.uint16), TWO, "mode I"),
        ("m.jpg", np.zeros((8, 8), np.uint8), TWO, "JPEG, which changes labels"),
    ],
    ids=["no class", "colour", "16 bit", "jpeg"],
)
def test_what_holds_no_labels_is_refused(tmp_path, name, values, classes, words):
    with pytest.raises(AnnotationError, match=f"slide 's1': mask image '{name}'.*{words}"):
        open_mask(tmp_path / name, values, classes)


def test_another_size_than_the_slides_is_refused_with_both(tmp_path):
    Image.fromarray(np.zeros((5, 6), np.uint8)).save(tmp_path / "m.png")
    with pytest.raises(AnnotationError, match="is 6 x 5 px but the slide is 60 x 50 px"):
        LabelImage.open(
            tmp_path / "m.png", slide_id="s1", width_px_l0=60, height_px_l0=50, classes=TWO
        )


def test_a_file_that_is_no_image_is_refused(tmp_path):
    (tmp_path / "m.png").write_text("no image")
    with pytest.raises(AnnotationError, match=r"mask image 'm\.png' cannot be read"):
        LabelImage.open(
            tmp_path / "m.png", slide_id="s1", width_px_l0=6, height_px_l0=5, classes=TWO
        )


def test_a_mask_is_found_by_the_slides_name_and_only_one(tmp_path):
    assert find_label_image(tmp_path, "a.b") is None
    (tmp_path / "a.b.png").touch()
    assert find_label_image(tmp_path, "a.b") == tmp_path / "a.b.png"
    (tmp_path / "a.b.tif").touch()
    with pytest.raises(AnnotationError, match=r"several mask images \(a\.b\.png, a\.b\.tif\)"):
        find_label_image(tmp_path, "a.b")


def test_an_image_larger_than_a_photograph_is_read_and_the_limit_of_pil_stands_after_it(
    tmp_path, recwarn
):
    limit = Image.MAX_IMAGE_PIXELS
    path = tmp_path / "s.png"
    Image.new("1", (2 * 9600, 9600)).save(path)  # 184 megapixels, of which PIL refuses 178
    with open_image(path) as image:
        assert image.size == (2 * 9600, 9600)
    assert read_values(path, "mask image").shape == (9600, 2 * 9600)
    assert not recwarn.list
    assert limit == Image.MAX_IMAGE_PIXELS
