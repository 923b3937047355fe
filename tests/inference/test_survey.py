"""Areas are exact; the seam score is 1 where nobody sees the windows, and tells where one does."""

import numpy as np
import pytest
import torch
from segmenting import (
    CLASSES,
    DARK,
    GLASS,
    STAINED,
    ByColour,
    begin_mask,
    random_image,
    random_network,
    windows_of,
    write_image,
    write_mask,
)
from torch import nn

from wsiseg.geometry import Box
from wsiseg.inference.survey import foreground, survey_mask
from wsiseg.runinfo import RunInfo
from wsiseg.slides.reader import open_slide
from wsiseg.store.masks import SlideMask


class PerWindow(nn.Module):
    """Each window has an opinion of its own: the worst that tiles can do."""

    def forward(self, x_NCHW):
        own = 2 * torch.sin(1e3 * x_NCHW.mean(dim=(1, 2, 3), keepdim=True))
        foreground = 0.3 * x_NCHW[:, :1] + own
        return torch.cat([torch.zeros_like(foreground), foreground, foreground - 9], dim=1)


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    path = write_image(tmp_path_factory.mktemp("slide") / "s.png", random_image(400, 330, seed=1))
    with open_slide(path, slide_mpp=0.5) as opened:
        yield opened


def score(slide, network, tmp_path, *, overlap, size=64, chunk_px=96):
    windows = windows_of(slide, 0.5, size=size, overlap=overlap)
    mask, _ = write_mask(tmp_path / f"{chunk_px}.zarr", slide, network, windows, chunk_px=chunk_px)
    return survey_mask(mask, windows).seam_score


def test_a_network_that_sees_pixels_alone_leaves_no_seams(slide, tmp_path):
    assert score(slide, ByColour(), tmp_path, overlap=0.0) == pytest.approx(1, abs=0.05)


@pytest.mark.parametrize("overlap", [0.25, 0.5])
def test_blended_windows_cannot_be_seen(slide, tmp_path, overlap):
    network = random_network(seed=4, scale=4.0)
    assert 0.95 < score(slide, network, tmp_path, overlap=overlap) < 1.05


def test_windows_of_a_real_network_are_seen_when_nothing_blends_them(slide, tmp_path):
    network = random_network(seed=4, scale=4.0)
    assert score(slide, network, tmp_path, overlap=0.0) > 1.1


def test_windows_that_disagree_are_seen_at_once(slide, tmp_path):
    assert score(slide, PerWindow(), tmp_path, overlap=0.0) > 3
    (tmp_path / "96.zarr").rename(tmp_path / "hard.zarr")
    assert score(slide, PerWindow(), tmp_path, overlap=0.25) < 1.3


@pytest.mark.parametrize("chunk_px", [33, 64, 150, 500])
def test_the_figures_do_not_depend_on_the_chunks(slide, tmp_path, chunk_px):
    network = random_network(seed=4, scale=4.0)
    windows = windows_of(slide, 0.5, size=64)
    wanted, _ = write_mask(tmp_path / "a.zarr", slide, network, windows, chunk_px=1000)
    got, _ = write_mask(tmp_path / "b.zarr", slide, network, windows, chunk_px=chunk_px)
    assert survey_mask(got, windows) == survey_mask(wanted, windows)


def test_the_score_is_what_its_definition_says(slide, tmp_path):
    windows = windows_of(slide, 0.5, size=64)
    mask, _ = write_mask(
        tmp_path / "m.zarr", slide, random_network(seed=4, scale=4.0), windows, chunk_px=96
    )
    box = mask.raster.box
    values = foreground(mask.read(box), mask.read_probability(box)).astype(int)
    at_border, beside = [], []
    for axis, lines in ((0, values.T), (1, values)):
        borders = np.unique(
            np.concatenate([windows.origins[:, axis], windows.origins[:, axis] + 64])
        )
        borders = borders[(borders > 0) & (borders < len(lines))]
        for i in range(1, len(lines)):
            distance = np.abs(borders - i).min()
            steps = np.abs(lines[i] - lines[i - 1])
            if distance == 0:
                at_border.append(steps)
            elif 2 <= distance <= 8:
                beside.append(steps)
    ratio = np.concatenate(at_border).mean() / np.concatenate(beside).mean()
    assert survey_mask(mask, windows).seam_score == pytest.approx(ratio, abs=6e-4)


def test_glass_has_no_steps():
    labels = np.array([[0, 1, 2, 255]], np.uint8)
    probability = np.array([[200, 200, 255, 0]], np.uint8)
    assert foreground(labels, probability).tolist() == [[55, 200, 255, -1]]


def test_a_flat_prediction_has_no_score(tmp_path):
    path = write_image(tmp_path / "s.png", np.full((100, 100, 3), 230, np.uint8))
    with open_slide(path, slide_mpp=0.5) as plain:
        assert score(plain, ByColour(), tmp_path, overlap=0.0, size=32) is None


def test_areas_are_the_pixels_of_each_class(tmp_path):
    image = np.empty((90, 140, 3), np.uint8)
    image[:] = STAINED
    image[10:30, 20:50] = DARK
    image[60:90, 100:140] = GLASS
    path = write_image(tmp_path / "s.png", image)
    with open_slide(path, slide_mpp=0.5) as slide:
        windows = windows_of(slide, 0.5)
        mask, _ = write_mask(tmp_path / "m.zarr", slide, ByColour(), windows)
    assert survey_mask(mask, windows).area_um2 == {"Dark": 20 * 30 / 4, "Pale": 30 * 40 / 4}


def test_a_mask_without_probabilities_has_areas_only(slide, tmp_path):
    windows = windows_of(slide, 0.5)
    with SlideMask.create(
        tmp_path / "m.zarr", raster=windows.raster, slide=slide.meta.to_dict(), classes=CLASSES,
        run=RunInfo(stage="segment", config={}), model_digest="",
        with_probability=False, chunk_px=100,
    ) as writer:  # fmt: skip
        for row, column in writer.pending_chunks():
            box = writer.chunk_box(row, column)
            writer.write_chunk(row, column, np.ones((box.height, box.width), np.uint8))
        writer.finish()
    survey = survey_mask(SlideMask.open(tmp_path / "m.zarr"), windows)
    assert survey.seam_score is None
    assert survey.area_um2 == {"Dark": 400 * 330 / 4, "Pale": 0.0}


def test_the_last_line_and_column_are_counted(slide, tmp_path):
    windows = windows_of(slide, 0.5)
    with begin_mask(tmp_path / "m.zarr", slide, windows, chunk_px=64) as writer:
        for row, column in writer.pending_chunks():
            box = writer.chunk_box(row, column)
            labels = np.zeros((box.height, box.width), np.uint8)
            if not box.intersection(Box(399, 329, 1, 1)).is_empty:
                labels[-1, -1] = 1
            writer.write_chunk(row, column, labels, np.full_like(labels, 255))
        writer.finish()
    assert survey_mask(SlideMask.open(tmp_path / "m.zarr"), windows).area_um2["Dark"] == 0.25
