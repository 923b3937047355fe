"""TileStore: what is written comes back, from shards of any size, and after any interruption."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import stores_on_disk as data
import zarr
from hypothesis import given, settings
from hypothesis import strategies as st

from wsiseg import outputs
from wsiseg.config import digest
from wsiseg.errors import (
    ConfigError,
    OutputExistsError,
    OutputLockedError,
    StoreCorruptError,
    StoreError,
)
from wsiseg.geometry import Box
from wsiseg.jpeg import decode_jpeg, encode_jpeg
from wsiseg.store import layout
from wsiseg.store.codecs import tile_codec
from wsiseg.store.ledger import FileRecord
from wsiseg.store.tile_array import TileArray
from wsiseg.store.tiles import TileStore, tiles_per_shard
from wsiseg.synthetic import SyntheticTissue


def tree(path):
    return {p.relative_to(path).as_posix(): p.read_bytes() for p in path.rglob("*") if p.is_file()}


@given(
    num=st.integers(1, 12),
    shard_tiles=st.integers(1, 5),
    size=st.sampled_from([1, 8, 16]),
    codec=st.sampled_from(["delta", "zstd", "source"]),
)
@settings(max_examples=15, deadline=None)
def test_tiles_and_labels_come_back_as_they_were(tmp_path_factory, num, shard_tiles, size, codec):
    path = tmp_path_factory.mktemp("t") / "s1.zarr"
    data.write_tiles(path, num=num, size=size, shard_tiles=shard_tiles, codec=codec)
    store = TileStore.open(path)
    images, labels = data.tile_data(num, size)
    order = np.random.default_rng(1).permutation(num)
    np.testing.assert_array_equal(store.read_images(order), images[order])
    np.testing.assert_array_equal(store.read_labels(order), labels[order])
    np.testing.assert_array_equal(store.read_images(range(num)), images)
    assert store.labelled_px.tolist() == (labels != 255).sum((1, 2)).tolist()


def test_a_store_says_where_it_came_from(tiles):
    store = TileStore.open(tiles)
    assert (store.slide_id, store.group_id, store.split) == ("s1", "p1", "train")
    assert store.raster == data.raster()
    assert store.classes == data.CLASSES
    assert store.origins.tolist() == [[3 * i, i] for i in range(10)]
    assert store.run["stage"] == "test"


def test_tiles_that_a_network_cannot_halve_are_refused(tiles):
    store = TileStore.open(tiles)
    store.check_halvable(8)
    with pytest.raises(ConfigError, match=r"tiles of 16 px do not fit .* a multiple of 32 px"):
        store.check_halvable(32)


quiet = pytest.mark.filterwarnings("ignore:Numcodecs codecs are not in the Zarr")

CODECS = ["delta", "zstd", "jpeg", "source"]
LOSSLESS = ["delta", "zstd", "source"]


@quiet
@pytest.mark.parametrize("codec", CODECS)
def test_zarr_reads_what_we_read(tmp_path, codec):
    path = data.write_tiles(tmp_path / "s.zarr", num=7, codec=codec)
    store = TileStore.open(path)
    group = zarr.open_group(path, mode="r")
    np.testing.assert_array_equal(layout.array(group, "images")[:], store.read_images(range(7)))
    np.testing.assert_array_equal(layout.array(group, "labels")[:], store.read_labels(range(7)))
    np.testing.assert_array_equal(layout.array(group, "origins")[:], store.origins)


@quiet
@given(
    num=st.integers(1, 9),
    shard_tiles=st.integers(1, 4),
    size=st.sampled_from([1, 5, 16]),
    codec=st.sampled_from(LOSSLESS),
)
@settings(max_examples=15, deadline=None)
def test_we_read_what_zarr_writes(tmp_path_factory, num, shard_tiles, size, codec):
    folder = tmp_path_factory.mktemp("z") / "images"
    images, _ = data.tile_data(num, size)
    array = zarr.create_array(
        folder, shape=images.shape, chunks=(1, size, size, 3), dtype="uint8",
        shards=(shard_tiles, size, size, 3), **tile_codec(codec).arguments,
    )  # fmt: skip
    array[:] = images
    read = TileArray(folder, codec).read(range(num))
    np.testing.assert_array_equal(read, images)


STRANGER = """
import sys
sys.path.append(sys.argv[1])
import zarr
group = zarr.open_group(sys.argv[2], mode="r")
print(group.attrs["wsiseg"]["codec"])
group["images"]
"""


@pytest.mark.parametrize("codec", ["source", "jpeg"])
def test_zarr_without_wsiseg_says_what_to_install(tmp_path, codec):
    path = data.write_tiles(tmp_path / "s.zarr", codec=codec)
    elsewhere = tmp_path / "packages"  # as this one, but wsiseg was never installed there
    elsewhere.mkdir()
    for entry in Path(zarr.__file__).parents[1].iterdir():
        if "wsiseg" not in entry.name:
            (elsewhere / entry.name).symlink_to(entry)
    command = [sys.executable, "-I", "-S", "-c", STRANGER, str(elsewhere), str(path)]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=tmp_path)
    assert done.stdout.strip() == codec
    assert "Unknown codec: 'wsiseg.image'" in done.stderr.splitlines()[-1]


def test_zarr_with_wsiseg_installed_finds_the_codec_by_itself(tmp_path):
    path = data.write_tiles(tmp_path / "s.zarr", codec="source")
    code = f"import zarr; print(zarr.open_group({str(path)!r}, mode='r')['images'][3].sum())"
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path)
    assert int(done.stdout) == data.tile_data(10, 16)[0][3].sum(dtype=int)


def test_jpeg_tiles_are_close_to_what_was_written(tmp_path):
    image, _ = SyntheticTissue(width_px=512, height_px=512).region(Box(128, 128, 128, 128))
    codec = tile_codec("jpeg")
    loss = codec.decode(codec.encode(image), image.shape).astype(int) - image
    assert 38 < 10 * np.log10(255**2 / np.mean(loss**2)) < 60


def test_a_jpeg_is_kept_byte_for_byte(tmp_path):
    images, labels = data.tile_data(2, 16)
    streams = [encode_jpeg(image, 80) for image in images]
    with data.begin_tiles(tmp_path / "s.zarr", num=2, codec="source") as writer:
        writer.write_chunks(0, [writer.keep(stream) for stream in streams], labels)
        writer.finish()
    assert streams[0] in (tmp_path / "s.zarr/images/c/0/0/0/0").read_bytes()
    read = TileStore.open(tmp_path / "s.zarr").read_images([0, 1])
    for stream, tile in zip(streams, read, strict=True):
        np.testing.assert_array_equal(decode_jpeg(stream, width_px=16, height_px=16), tile)


def test_only_the_codec_source_keeps_a_jpeg(tmp_path):
    with (
        data.begin_tiles(tmp_path / "s.zarr", codec="zstd") as writer,
        pytest.raises(ValueError, match="stores no JPEG as it is"),
    ):
        writer.keep(b"")


@pytest.mark.parametrize("codec", CODECS)
def test_any_flipped_bit_of_a_shard_is_found_when_its_tiles_are_read(tmp_path, codec):
    path = data.write_tiles(tmp_path / "s.zarr", num=4, codec=codec)
    shard = path / "images/c/0/0/0/0"
    whole = shard.read_bytes()
    rng = np.random.default_rng(2)
    for place in rng.choice(len(whole), 60, replace=False):
        raw = bytearray(whole)
        raw[place] ^= 1 << int(rng.integers(8))
        shard.write_bytes(raw)
        with pytest.raises(StoreCorruptError, match="cannot be decoded"):
            TileStore.open(path).read_images(range(4))


@pytest.mark.parametrize("keep", [0, 3, 40, -1])
def test_a_truncated_shard_is_found_when_its_tiles_are_read(tmp_path, keep):
    path = data.write_tiles(tmp_path / "s.zarr", num=4)
    store = TileStore.open(path)
    shard = path / "images/c/0/0/0/0"
    shard.write_bytes(shard.read_bytes()[:keep])
    with pytest.raises(StoreCorruptError, match="cannot be decoded"):
        store.read_images([3])


def test_a_store_without_labels_reads_as_ignored_everywhere(tmp_path):
    store = TileStore.open(data.write_tiles(tmp_path / "s.zarr", has_labels=False))
    assert (store.read_labels([0, 5]) == 255).all()
    assert store.num_labelled_tiles == 0


@given(stop_after=st.integers(0, 3))
@settings(max_examples=4, deadline=None)
def test_an_interrupted_store_goes_on_and_ends_in_the_same_bytes(tmp_path_factory, stop_after):
    folder = tmp_path_factory.mktemp("t")
    path = folder / "s1.zarr"
    images, labels = data.tile_data(10, 16)
    with data.begin_tiles(path) as writer:
        for shard in writer.pending_shards()[:stop_after]:
            part = slice(writer.shard_tiles(shard).start, writer.shard_tiles(shard).stop)
            writer.write_shard(shard, images[part], labels[part])
    assert not path.exists()
    with pytest.raises(StoreError):
        TileStore.open(path)
    with data.begin_tiles(path) as writer:
        assert writer.pending_shards() == list(range(stop_after, 3))
    data.write_tiles(path)
    assert tree(path) == tree(data.write_tiles(folder / "whole.zarr"))
    assert sorted(p.name for p in folder.iterdir()) == ["s1.zarr", "whole.zarr"]


def test_a_shard_whose_data_was_lost_is_written_again(tmp_path):
    path = tmp_path / "s1.zarr"
    images, labels = data.tile_data(10, 16)
    with data.begin_tiles(path) as writer:
        for shard in (0, 1):
            part = slice(4 * shard, 4 * shard + 4)
            writer.write_shard(shard, images[part], labels[part])
    (tmp_path / "s1.zarr.partial/images/c/0/0/0/0").write_bytes(b"")
    with data.begin_tiles(path) as writer:
        assert writer.pending_shards() == [0, 2]


def test_a_torn_last_line_of_the_journal_is_an_unfinished_shard(tmp_path):
    path = tmp_path / "s1.zarr"
    images, labels = data.tile_data(10, 16)
    with data.begin_tiles(path) as writer:
        writer.write_shard(0, images[:4], labels[:4])
    journal = tmp_path / "s1.zarr.partial/ledger.jsonl"
    journal.write_bytes(journal.read_bytes() + b'{"unit": "shard-1", "fi')
    with data.begin_tiles(path) as writer:
        assert writer.pending_shards() == [1, 2]
    data.write_tiles(path)


def test_an_unfinished_store_of_other_settings_is_refused(tmp_path):
    with data.begin_tiles(tmp_path / "s.zarr", mpp=1):
        pass
    with pytest.raises(OutputExistsError, match=r"config\.mpp: 1 -> 2.*--overwrite"):
        data.begin_tiles(tmp_path / "s.zarr", mpp=2).__enter__()


def test_overwriting_keeps_the_old_store_until_the_new_one_is_finished(tmp_path):
    path = data.write_tiles(tmp_path / "s.zarr", mpp=1)
    before = tree(path)
    with data.begin_tiles(path, mpp=2, overwrite=True):
        assert tree(path) == before
    data.write_tiles(path, mpp=2, overwrite=True)
    assert TileStore.open(path).run["config"] == {"mpp": 2}


def test_two_writers_of_one_store_are_refused(tmp_path):
    with (
        data.begin_tiles(tmp_path / "s.zarr"),
        pytest.raises(OutputLockedError, match="locked by pid"),
    ):
        data.begin_tiles(tmp_path / "s.zarr").__enter__()


def test_is_finished_knows_its_own_run(tiles):
    assert TileStore.is_finished(tiles, data.run_info())
    assert not TileStore.is_finished(tiles.with_name("other.zarr"), data.run_info())
    with pytest.raises(OutputExistsError, match="different run"):
        TileStore.is_finished(tiles, data.run_info(mpp=9))


def test_a_foreign_folder_is_not_taken_for_an_output(tmp_path):
    (tmp_path / "s.zarr").mkdir()
    with pytest.raises(OutputExistsError, match="exists already"):
        TileStore.is_finished(tmp_path / "s.zarr", data.run_info())


def test_a_missing_shard_is_an_error_and_not_black_tiles(tiles):
    (tiles / "images/c/1/0/0/0").unlink()
    with pytest.raises(StoreCorruptError, match="images/c/1/0/0/0: is missing"):
        TileStore.open(tiles)


def test_a_flipped_bit_is_an_error_when_the_tile_is_read(tiles):
    path = tiles / "images/c/1/0/0/0"
    raw = bytearray(path.read_bytes())
    raw[len(raw) // 3] ^= 4
    path.write_bytes(raw)
    store = TileStore.open(tiles)
    with pytest.raises(StoreCorruptError, match=r"cannot be decoded.*wsiseg verify"):
        store.read_images(range(10))


@pytest.mark.parametrize(
    ("edit", "text"),
    [
        (lambda a: a.update(format_version=9), "format version 9, newer than 1"),
        (lambda a: a.update(format_version="x"), "no valid format version"),
        (lambda a: a.update(kind="mask"), "holds 'mask', expected 'tiles'"),
        (lambda a: a.pop("slide"), "attributes are damaged"),
        (lambda a: a.update(raster={"width_px": 0}), "attributes are damaged"),
        (lambda a: a.update(tile_size_px=17), r"expected uint8 \(10, 17, 17, 3\)"),
    ],
)
def test_damaged_attributes_are_named(tiles, edit, text):
    content = json.loads((tiles / "zarr.json").read_text())
    edit(content["attributes"]["wsiseg"])
    (tiles / "zarr.json").write_text(json.dumps(content))
    ledger = json.loads((tiles / "ledger.json").read_text())
    record = FileRecord.of(tiles / "zarr.json")
    ledger["files"]["zarr.json"] = [record.size_bytes, record.sha256]
    ledger["digest"] = digest(ledger["files"])
    outputs.write_json(tiles / "ledger.json", ledger)
    with pytest.raises(StoreError, match=text):
        TileStore.open(tiles)


@pytest.mark.parametrize(
    ("make", "text"),
    [
        (lambda p: None, "no such folder"),
        (lambda p: p.write_text("x"), "a file"),
        (lambda p: p.mkdir(), "not a zarr group"),
        (zarr.create_group, "not made by wsiseg"),
    ],
)
def test_what_is_not_a_store_is_refused(tmp_path, make, text):
    make(tmp_path / "s.zarr")
    with pytest.raises(StoreError, match=text):
        TileStore.open(tmp_path / "s.zarr")


def test_an_index_outside_is_an_index_error(tiles):
    with pytest.raises(IndexError, match=r"outside 0\.\.9"):
        TileStore.open(tiles).read_images([10])


@pytest.mark.parametrize("size", [16, 128, 256, 1024, 8192])
def test_a_shard_fits_in_memory_whatever_the_tile_size(size):
    per_shard = tiles_per_shard(size, "delta")
    assert 1 <= per_shard <= 64
    assert per_shard == 1 or per_shard * 3 * size**2 <= 16 << 20
