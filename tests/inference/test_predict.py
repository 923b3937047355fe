"""A slide mask is what the whole raster in memory would give, however the work is cut."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from segmenting import (
    DARK,
    GLASS,
    STAINED,
    ByColour,
    begin_mask,
    engine,
    everywhere,
    random_image,
    random_network,
    whole_slide,
    windows_of,
    write_image,
    write_mask,
)

from wsiseg.errors import SlideReadError
from wsiseg.geometry import Box, Raster
from wsiseg.inference import window
from wsiseg.inference.predict import predict_slide
from wsiseg.progress import SilentProgress
from wsiseg.slides.reader import Slide, open_slide
from wsiseg.slides.tissue import TissueMask
from wsiseg.store.masks import SlideMask

IMAGE = random_image(203, 171, seed=5)
WHOLE = Box(0, 0, 203, 171)
NETWORK = random_network(seed=2, scale=3.0)


class Interrupts(SilentProgress):
    """A user who presses ctrl-c at a certain window."""

    def __init__(self, at):
        self.at = at
        self.count = 0

    def advance(self, amount=1, *, note=""):
        self.count += amount
        if self.count == self.at:
            raise KeyboardInterrupt


class Recorder(SilentProgress):
    def __init__(self):
        self.total = self.done = self.advanced = 0

    def start(self, label, total, *, unit, done=0):
        self.total, self.done = total, done

    def advance(self, amount=1, *, note=""):
        self.advanced += amount


class Recording(Slide):
    """A slide that remembers what was read of it."""

    def __init__(self, slide):
        super().__init__(slide.path, slide.meta, slide._source)
        self.boxes: list[Box] = []

    def read(self, raster, box):
        self.boxes.append(box)
        return super().read(raster, box)


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    path = write_image(tmp_path_factory.mktemp("slide") / "s.png", IMAGE)
    with open_slide(path, slide_mpp=0.5) as opened:
        yield opened


@pytest.fixture(scope="module")
def wanted(slide):
    return whole_slide(IMAGE, NETWORK, windows_of(slide, 0.5))


def arrays(mask):
    box = mask.raster.box
    return mask.read(box), mask.read_probability(box)


def assert_is(mask, wanted):
    for ours, theirs in zip(arrays(mask), wanted, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@given(
    chunk_px=st.integers(37, 260),
    num_threads=st.integers(1, 4),
    num_readers=st.integers(1, 4),
    batch_size=st.integers(1, 9),
    interruptions=st.lists(st.integers(1, 60), max_size=3),
    band_bytes=st.sampled_from([1, 40_000, 1 << 29]),
)
@settings(max_examples=10, deadline=None)
def test_the_mask_is_that_of_one_pass_in_memory(
    slide, wanted, tmp_path_factory, chunk_px, num_threads, num_readers, batch_size,
    interruptions, band_bytes,
):  # fmt: skip
    path = tmp_path_factory.mktemp("m") / "m.zarr"
    options = {"chunk_px": chunk_px, "num_readers": num_readers, "batch_size": batch_size}
    before = torch.get_num_threads(), window.BAND_BYTES
    torch.set_num_threads(num_threads)
    window.BAND_BYTES = band_bytes
    try:
        for at in interruptions:
            try:
                write_mask(path, slide, NETWORK, windows_of(slide, 0.5),
                           progress=Interrupts(at), **options)  # fmt: skip
                break  # less was left than the interruption waits for
            except KeyboardInterrupt:
                assert not path.exists()
        mask, _ = write_mask(path, slide, NETWORK, windows_of(slide, 0.5), **options)
    finally:
        torch.set_num_threads(before[0])
        window.BAND_BYTES = before[1]
    assert_is(mask, wanted)


@pytest.mark.parametrize("at", range(1, 50, 7))
def test_after_an_interruption_only_windows_of_pending_chunks_are_read(slide, wanted, tmp_path, at):
    windows = windows_of(slide, 0.5)
    recording = Recording(slide)
    with pytest.raises(KeyboardInterrupt):
        write_mask(tmp_path / "m.zarr", recording, NETWORK, windows, progress=Interrupts(at))
    with begin_mask(tmp_path / "m.zarr", slide, windows) as writer:
        pending = [writer.chunk_box(*chunk) for chunk in writer.pending_chunks()]
    recording.boxes.clear()
    progress = Recorder()
    mask, _ = write_mask(tmp_path / "m.zarr", recording, NETWORK, windows, progress=progress)
    expected = {
        box
        for i in range(len(windows))
        if any(not (box := windows.box(i)).intersection(chunk).is_empty for chunk in pending)
    }
    assert set(recording.boxes) == expected
    assert len(recording.boxes) == len(expected) == progress.advanced
    assert progress.total == len(windows) == progress.done + progress.advanced
    assert_is(mask, wanted)


def test_a_finished_part_is_not_predicted_again(slide, tmp_path):
    windows = windows_of(slide, 0.5)
    with begin_mask(tmp_path / "m.zarr", slide, windows) as writer:
        writer.skip_chunks(writer.pending_chunks())
        uses = predict_slide(
            slide, engine(NETWORK), writer, windows,
            tissue=everywhere(windows.raster), progress=SilentProgress(),
        )  # fmt: skip
    assert uses == []


def tissue_in(raster, box, *, mask_px=4):
    """Tissue exactly in a box of the raster, on a mask of `mask_px` times coarser pixels."""
    coarse = Raster(
        -(-raster.width_px // mask_px), -(-raster.height_px // mask_px),
        raster.mpp_x * mask_px, raster.mpp_y * mask_px,
        raster.downsample_x * mask_px, raster.downsample_y * mask_px,
    )  # fmt: skip
    mask = np.zeros((coarse.height_px, coarse.width_px), bool)
    mask[box.y // mask_px : box.bottom // mask_px, box.x // mask_px : box.right // mask_px] = True
    return TissueMask(mask, coarse)


@pytest.mark.parametrize("chunk_px", [20, 64, 300])
def test_glass_is_neither_read_nor_predicted(slide, tmp_path, chunk_px):
    raster = slide.meta.raster(0.5)
    tissue = tissue_in(raster, Box(40, 64, 60, 48))
    windows = windows_of(slide, 0.5, tissue=tissue)
    recording = Recording(slide)
    mask, _ = write_mask(
        tmp_path / "m.zarr", recording, NETWORK, windows, tissue=tissue, chunk_px=chunk_px
    )
    is_tissue = tissue.at(raster, raster.box)
    assert is_tissue.sum() == 60 * 48 - 4  # interpolated, so that corners are cut
    assert 0 < len(recording.boxes) == len(windows) < len(windows_of(slide, 0.5)) // 3
    assert all(is_tissue[b.y : b.bottom, b.x : b.right].any() for b in recording.boxes)
    assert_is(mask, whole_slide(IMAGE, NETWORK, windows, is_tissue=is_tissue))
    assert ((mask.read(WHOLE) != 255) == is_tissue).all()


@given(
    x=st.integers(-5, 210), y=st.integers(-5, 180), side=st.integers(1, 90), seed=st.integers(0, 9)
)
@settings(max_examples=60, deadline=None)
def test_what_a_tissue_mask_covers_is_tissue_in_every_pixel(slide, x, y, side, seed):
    raster = slide.meta.raster(0.5)
    tissue = tissue_in(raster, Box(20, 20, 100, 90))
    box = Box(x, y, side, side).intersection(raster.box)
    if not box.is_empty and tissue.covers(raster, box):
        assert tissue.at(raster, box).all()
    inner = Box(40, 40, 1 + seed * 4, 30)
    assert tissue.covers(raster, inner)


def test_a_slide_smaller_than_a_window_is_predicted_whole(tmp_path):
    image = random_image(21, 13)
    path = write_image(tmp_path / "s.png", image)
    with open_slide(path, slide_mpp=0.5) as small:
        windows = windows_of(small, 0.5)
        mask, _ = write_mask(tmp_path / "m.zarr", small, NETWORK, windows)
    assert_is(mask, whole_slide(image, NETWORK, windows))


def test_a_slide_that_breaks_in_the_middle_keeps_what_was_finished(slide, wanted, tmp_path):
    class Breaks(Recording):
        def read(self, raster, box):
            if box.y > 100:
                raise SlideReadError("slide 's': cannot be read")
            return super().read(raster, box)

    windows = windows_of(slide, 0.5)
    with pytest.raises(SlideReadError, match="cannot be read"):
        write_mask(tmp_path / "m.zarr", Breaks(slide), NETWORK, windows)
    with begin_mask(tmp_path / "m.zarr", slide, windows) as writer:
        assert 0 < len(writer.pending_chunks()) < 20
    mask, _ = write_mask(tmp_path / "m.zarr", slide, NETWORK, windows)
    assert_is(mask, wanted)


def test_a_chunk_that_cannot_be_written_ends_the_run(slide, tmp_path):
    windows = windows_of(slide, 0.5)
    with begin_mask(tmp_path / "m.zarr", slide, windows) as writer:
        (tmp_path / "m.zarr.partial" / "0" / "c").write_text("in the way")
        with pytest.raises(OSError, match=r"directory|exists"):
            predict_slide(
                slide, engine(NETWORK), writer, windows,
                tissue=everywhere(windows.raster),
                progress=SilentProgress(),
            )  # fmt: skip


@pytest.mark.parametrize("downsample", [1, 2, 2.5, 4])
def test_objects_lie_where_they_lie_on_the_slide(tmp_path, downsample):
    """Level 0 and the mask agree to a pixel, at the far corner too."""
    image = np.empty((600, 800, 3), np.uint8)
    image[:] = STAINED
    objects = [Box(100, 80, 60, 40), Box(700, 520, 40, 60), Box(0, 0, 20, 20)]
    for box in objects:
        image[box.y : box.bottom, box.x : box.right] = DARK
    image[300:400, 300:420] = GLASS
    path = write_image(tmp_path / "s.png", image)
    with open_slide(path, slide_mpp=0.5) as slide:
        windows = windows_of(slide, 0.5 * downsample)
        mask, _ = write_mask(tmp_path / "m.zarr", slide, ByColour(), windows)
    labels = mask.read(mask.raster.box)
    for box in objects:
        x0, y0 = (round(v) for v in mask.raster.raster_from_l0(box.x, box.y))
        x1, y1 = (round(v) for v in mask.raster.raster_from_l0(box.right, box.bottom))
        assert (labels[y0:y1, x0:x1] == 1).all()
        around = labels[max(0, y0 - 3) : y1 + 3, max(0, x0 - 3) : x1 + 3]
        assert (around == 1).sum() == (y1 - y0) * (x1 - x0)
    assert (labels == 1).sum() * mask.raster.pixel_area_um2 == sum(
        0.25 * b.width * b.height for b in objects
    )
    x0, y0 = (int(v) for v in mask.raster.raster_from_l0(300, 300))
    assert labels[y0, x0] == 2


def test_an_overwritten_mask_begins_anew(slide, wanted, tmp_path):
    windows = windows_of(slide, 0.5)
    with pytest.raises(KeyboardInterrupt):
        write_mask(tmp_path / "m.zarr", slide, ByColour(), windows, progress=Interrupts(40))
    with begin_mask(tmp_path / "m.zarr", slide, windows, overwrite=True) as writer:
        predict_slide(
            slide, engine(NETWORK), writer, windows,
            tissue=everywhere(windows.raster),
            progress=SilentProgress(),
        )  # fmt: skip
        writer.finish()
    assert_is(SlideMask.open(tmp_path / "m.zarr"), wanted)
