"""The pictures of a run: curves from its log, grids of images, labels painted over them."""

import io

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from tests.stores_on_disk import CLASSES
from wsiseg.training.curves import GAP_PX, image_grid, paint_labels, write_curves, write_image


def lines(*values):
    return "".join(f"{value}\n" for value in values)


@pytest.mark.parametrize(
    "text",
    [
        "",
        lines('{"step": 1, "loss": 0.5, "learning_rate": 0.1}'),
        lines('{"step": 1, "loss": 0.5}', '{"step": 2, "skipped": ["a[1]"], "loss": null}'),
        lines('{"step": 4, "loss": 0.5}', '{"step": 4, "val_loss": 0.4, "val_dice": 0.7}'),
    ],
    ids=["nothing", "pretraining", "a skipped step", "fine-tuning"],
)
def test_any_log_gives_a_picture_and_the_same_bytes_each_time(tmp_path, text):
    (tmp_path / "metrics.jsonl").write_text(text)
    for name in ("one.png", "two.png"):
        write_curves(tmp_path / "metrics.jsonl", tmp_path / name, title="a run")
    first = (tmp_path / "one.png").read_bytes()
    assert first == (tmp_path / "two.png").read_bytes()
    with Image.open(io.BytesIO(first)) as picture:
        assert picture.size == (1100, 440)


@given(num=st.integers(1, 13), columns=st.integers(1, 5), size=st.integers(1, 9))
def test_every_image_has_its_place_in_a_grid_and_the_rest_is_white(num, columns, size):
    images = np.random.default_rng(num).integers(0, 255, (num, size, size, 3), dtype=np.uint8)
    grid = image_grid(images, columns)
    rest = np.ones(grid.shape[:2], bool)
    for i, image in enumerate(images):
        y, x = (i // columns) * (size + GAP_PX), (i % columns) * (size + GAP_PX)
        assert np.array_equal(grid[y : y + size, x : x + size], image)
        rest[y : y + size, x : x + size] = False
    assert (grid[rest] == 255).all()


def test_labels_are_tinted_in_their_colour_and_ignored_pixels_darkened():
    images = np.full((1, 2, 2, 3), 200, np.uint8)
    labels = np.array([[[0, 1], [2, 255]]], np.uint8)
    painted = paint_labels(images, labels, CLASSES)[0]
    assert painted[0, 0].tolist() == [200, 200, 200]
    for item, pixel in zip(CLASSES.classes, (painted[0, 1], painted[1, 0]), strict=True):
        assert np.abs(pixel - (0.45 * 200 + 0.55 * np.array(item.color))).max() <= 0.5
    assert painted[1, 1].tolist() == [100, 100, 100]
    assert (images == 200).all()


def test_an_image_is_written_as_it_is(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 7, 3), dtype=np.uint8)
    write_image(tmp_path / "x.png", image)
    with Image.open(tmp_path / "x.png") as picture:
        assert np.array_equal(np.asarray(picture), image)
