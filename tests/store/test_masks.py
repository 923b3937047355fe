"""SlideMask: labels come back whatever the chunks, and strangers find valid OME-Zarr."""

import json
import shutil
from typing import Any

import numpy as np
import ome_zarr_models.v05 as ngff
import pytest
import stores_on_disk as data
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from wsiseg.errors import StoreCorruptError, StoreError
from wsiseg.geometry import Box
from wsiseg.store.ledger import Journal
from wsiseg.store.masks import SlideMask
from wsiseg.store.ngff import halve, halve_mean, num_pyramid_levels


@given(chunk_px=st.integers(16, 300), x=st.integers(-20, 210), y=st.integers(-20, 140))
@settings(max_examples=10, deadline=None)
def test_a_mask_reads_the_same_whatever_its_chunks(tmp_path_factory, chunk_px, x, y):
    path = data.write_mask(tmp_path_factory.mktemp("m") / "m.zarr", chunk_px=chunk_px)
    mask = SlideMask.open(path)
    labels, probability = data.mask_data()
    padded = np.pad(labels, 100, constant_values=255)
    padded_probability = np.pad(probability, 100)
    part = (slice(y + 100, y + 150), slice(x + 100, x + 170))
    np.testing.assert_array_equal(mask.read(Box(x, y, 70, 50)), padded[part])
    np.testing.assert_array_equal(
        mask.read_probability(Box(x, y, 70, 50)), padded_probability[part]
    )


def test_it_is_a_valid_ngff_label_pyramid(tmp_path):
    path = data.write_mask(tmp_path / "m.zarr", width=2500, height=1700, chunk_px=512)
    image = ngff.ImageLabel.from_zarr(zarr.open_group(path, mode="r"))
    attributes = image.attributes.ome
    assert [d.path for d in attributes.multiscales[0].datasets] == ["0", "1", "2"]
    assert [a.unit for a in attributes.multiscales[0].axes] == ["micrometer"] * 2
    ome: Any = zarr.open_group(path, mode="r").attrs["ome"]
    names = {p["label-value"]: p["class"] for p in ome["image-label"]["properties"]}
    assert names == {0: "Background", 1: "Tumor", 2: "Stroma", 255: "Not predicted"}


def test_each_level_halves_the_one_before(tmp_path):
    path = data.write_mask(tmp_path / "m.zarr", width=2500, height=1701, chunk_px=512)
    mask = SlideMask.open(path)
    level_0 = mask.read(Box(0, 0, 2500, 1701))
    level_1 = mask.read_level(1, Box(0, 0, 1250, 851))
    np.testing.assert_array_equal(level_1, halve(level_0))
    np.testing.assert_array_equal(mask.read_level(2, Box(0, 0, 625, 426)), halve(level_1))


@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9),
                  elements=st.sampled_from([0, 1, 2, 255])))  # fmt: skip
@settings(max_examples=60, deadline=None)
def test_halving_takes_a_most_frequent_label(labels):
    half = halve(labels)
    padded = np.pad(labels, ((0, labels.shape[0] % 2), (0, labels.shape[1] % 2)), mode="edge")
    for y, x in np.ndindex(half.shape):
        four = padded[2 * y : 2 * y + 2, 2 * x : 2 * x + 2].ravel().tolist()
        assert four.count(half[y, x]) == max(four.count(v) for v in four)


def test_the_probability_is_an_ngff_image_of_its_own(tmp_path):
    path = data.write_mask(tmp_path / "m.zarr", width=2500, height=1701, chunk_px=512)
    image = ngff.Image.from_zarr(zarr.open_group(path / "probability", mode="r"))
    assert [d.path for d in image.attributes.ome.multiscales[0].datasets] == ["0", "1", "2"]
    levels = [
        np.asarray(zarr.open_array(path / "probability" / str(level), mode="r"))
        for level in range(3)
    ]
    np.testing.assert_array_equal(levels[0], data.mask_data(2500, 1701)[1])
    np.testing.assert_array_equal(levels[1], halve_mean(levels[0]))
    np.testing.assert_array_equal(levels[2], halve_mean(levels[1]))
    labels_ome: Any = zarr.open_group(path, mode="r").attrs["ome"]
    image_ome: Any = zarr.open_group(path / "probability", mode="r").attrs["ome"]
    assert image_ome["multiscales"][0]["datasets"] == labels_ome["multiscales"][0]["datasets"]


@given(hnp.arrays(np.uint8, hnp.array_shapes(min_dims=2, max_dims=2, max_side=9)))
@settings(max_examples=40, deadline=None)
def test_halving_a_probability_takes_the_mean(values):
    padded = np.pad(values, ((0, values.shape[0] % 2), (0, values.shape[1] % 2)), mode="edge")
    blocks = padded.reshape(padded.shape[0] // 2, 2, padded.shape[1] // 2, 2).astype(int)
    np.testing.assert_array_equal(halve_mean(values), (blocks.sum(axis=(1, 3)) + 2) // 4)


def test_a_mask_of_the_first_format_is_still_read(tmp_path):
    """Version 1 had `probability` as one array."""
    path = data.write_mask(tmp_path / "m.zarr")
    shutil.move(path / "probability" / "0", tmp_path / "array")
    shutil.rmtree(path / "probability")
    shutil.move(tmp_path / "array", path / "probability")
    meta = json.loads((path / "zarr.json").read_text())
    meta["attributes"]["wsiseg"]["format_version"] = 1
    (path / "zarr.json").write_text(json.dumps(meta))
    (path / "ledger.json").unlink()
    Journal(path).finalise()
    mask = SlideMask.open(path)
    np.testing.assert_array_equal(mask.read_probability(Box(0, 0, 200, 130)), data.mask_data()[1])


def test_a_mask_begun_in_another_format_is_not_gone_on_with(tmp_path):
    with data.begin_mask(tmp_path / "m.zarr"):
        pass
    meta_path = tmp_path / "m.zarr.partial" / "zarr.json"
    meta = json.loads(meta_path.read_text())
    meta["attributes"]["wsiseg"]["format_version"] = 1
    meta_path.write_text(json.dumps(meta))
    with pytest.raises(StoreError, match="begun by another wsiseg; start with --overwrite"):
        data.begin_mask(tmp_path / "m.zarr").__enter__()
    with data.begin_mask(tmp_path / "m.zarr", overwrite=True) as writer:
        assert len(writer.pending_chunks()) == 12


def test_skipped_chunks_are_done_and_not_stored(tmp_path):
    with data.begin_mask(tmp_path / "m.zarr") as writer:
        writer.skip_chunks(writer.pending_chunks()[2:])
    with data.begin_mask(tmp_path / "m.zarr") as writer:
        assert writer.pending_chunks() == [(0, 0), (0, 1)]
        writer.skip_chunks(writer.pending_chunks())
        writer.finish()
    assert not list((tmp_path / "m.zarr").rglob("c"))
    assert (SlideMask.open(tmp_path / "m.zarr").read(Box(0, 0, 200, 130)) == 255).all()


def test_many_skipped_chunks_are_synced_once(tmp_path, monkeypatch):
    with data.begin_mask(tmp_path / "m.zarr") as writer:
        synced: list[int] = []
        monkeypatch.setattr("os.fsync", synced.append)
        writer.skip_chunks(writer.pending_chunks())
        assert (len(synced), writer.pending_chunks()) == (1, [])


def test_of_skipped_chunks_those_count_whose_line_is_whole(tmp_path):
    """A kill in the middle of the write that holds them all."""
    with data.begin_mask(tmp_path / "m.zarr") as writer:
        chunks = writer.pending_chunks()
        writer.skip_chunks(chunks)
    journal = tmp_path / "m.zarr.partial" / "ledger.jsonl"
    lines = journal.read_bytes().splitlines(keepends=True)
    assert len(lines) == len(chunks)
    journal.write_bytes(b"".join(lines[:7]) + lines[7][:20])
    with data.begin_mask(tmp_path / "m.zarr") as writer:
        assert writer.pending_chunks() == chunks[7:]


def test_an_interrupted_mask_goes_on_with_its_chunks(tmp_path):
    path = tmp_path / "m.zarr"
    labels, probability = data.mask_data()
    with data.begin_mask(path) as writer:
        for row, column in writer.pending_chunks()[:5]:
            data.write_one(writer, row, column, labels, probability)
    with pytest.raises(StoreError, match="no such folder"):
        SlideMask.open(path)
    with data.begin_mask(path, chunk_px=999) as writer:
        assert writer.chunk_px == 64
        assert len(writer.pending_chunks()) == 12 - 5
        with pytest.raises(StoreError, match="not written yet"):
            writer.finish()
        for row, column in writer.pending_chunks():
            data.write_one(writer, row, column, labels, probability)
        writer.finish()
    np.testing.assert_array_equal(SlideMask.open(path).read(Box(0, 0, 200, 130)), labels)
    assert [p.name for p in tmp_path.iterdir()] == ["m.zarr"]


def test_what_was_not_predicted_takes_no_room(tmp_path):
    with data.begin_mask(tmp_path / "m.zarr") as writer:
        for row, column in writer.pending_chunks():
            box = writer.chunk_box(row, column)
            empty = np.full((box.height, box.width), 255, np.uint8)
            writer.write_chunk(row, column, empty, np.zeros_like(empty))
        writer.finish()
    assert not list((tmp_path / "m.zarr").rglob("c"))
    assert (SlideMask.open(tmp_path / "m.zarr").read(Box(0, 0, 200, 130)) == 255).all()


def test_a_missing_chunk_is_an_error_and_not_background(mask):
    (mask / "0/c/1/1").unlink()
    with pytest.raises(StoreCorruptError, match="0/c/1/1: is missing"):
        SlideMask.open(mask)


@pytest.mark.parametrize(("side", "levels"), [(1, 1), (1024, 1), (1025, 2), (4097, 4)])
def test_the_pyramid_ends_with_an_overview(side, levels):
    assert num_pyramid_levels(side, 5) == levels
