"""Tiles of many stores as one set: what is read, in which order, and who may learn from it."""

import itertools
import threading
import time

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.stores_on_disk import CLASSES, run_info, tile_data
from wsiseg.classes import ClassTable
from wsiseg.errors import StoreError
from wsiseg.geometry import Raster
from wsiseg.store.tiles import TileStore
from wsiseg.training import data
from wsiseg.training.data import Sampler, TileSet, check_stores_agree, read_ahead, split_tiles


def write(
    folder, name, *, patient=None, split=None, num=6, size=16, mpp=0.5, classes=CLASSES,
    labelled=True,
):  # fmt: skip
    with TileStore.create(
        folder / f"{name}.zarr",
        raster=Raster(200, 130, mpp, mpp, 2.0, 2.0),
        tile_size_px=size,
        origins=np.stack([np.arange(num) * 3, np.arange(num)], axis=1),
        slide={"slide_id": name, "width_px_l0": 400, "height_px_l0": 260, "bounds": None},
        run=run_info(),
        has_labels=classes is not None,
        classes=classes,
        group_id=patient or name,
        split=split,
        shard_tiles=4,
        overwrite=False,
        codec="zstd",
    ) as writer:
        images, labels = tile_data(num, size, seed=sum(name.encode()))
        if not labelled:
            labels[:] = 255
        for shard in writer.pending_shards():
            part = slice(writer.shard_tiles(shard).start, writer.shard_tiles(shard).stop)
            writer.write_shard(shard, images[part], labels[part] if classes else None)
        writer.finish()
    return TileStore.open(folder / f"{name}.zarr")


@given(num=st.integers(1, 40), batch=st.integers(1, 60), seed=st.integers(0, 9))
def test_every_epoch_is_a_permutation_of_all_tiles(num, batch, seed):
    sampler = Sampler(num, batch_size=batch, seed=seed)
    steps = -(-3 * num // batch)
    order = np.concatenate([sampler.indices(step) for step in range(steps)])
    for epoch in range(3):
        assert sorted(order[epoch * num : (epoch + 1) * num]) == list(range(num))


@given(num=st.integers(2, 40), batch=st.integers(1, 9), step=st.integers(0, 10**9))
def test_the_tiles_of_a_step_need_no_step_before_it(num, batch, step):
    fresh, used = (Sampler(num, batch_size=batch, seed=3) for _ in range(2))
    for earlier in range(3):
        used.indices(earlier)
    assert np.array_equal(fresh.indices(step), used.indices(step))


def test_another_seed_or_epoch_is_another_order():
    orders = {
        tuple(Sampler(30, batch_size=30, seed=seed).indices(epoch))
        for seed, epoch in itertools.product(range(3), range(3))
    }
    assert len(orders) == 9


@pytest.mark.parametrize("cache_bytes", [0, 2 << 30])
def test_tiles_come_in_the_order_asked_for_with_their_names(tmp_path, monkeypatch, cache_bytes):
    monkeypatch.setattr(data, "CACHE_BYTES", cache_bytes)
    stores = [write(tmp_path, "a"), write(tmp_path, "b")]
    tile_set = TileSet(stores, np.array([[1, 2], [0, 5], [1, 0]]))
    for _ in range(2):  # the second time from the cache, where there is one
        found = tile_set.read([2, 0, 1, 0])
        assert found.names == ["b[0]", "b[2]", "a[5]", "b[2]"]
        for i, (store, tile) in enumerate([(1, 0), (1, 2), (0, 5), (1, 2)]):
            assert np.array_equal(found.images[i], stores[store].read_images([tile])[0])
            assert np.array_equal(found.labels[i], stores[store].read_labels([tile])[0])


def test_one_step_is_read_while_the_caller_works_and_no_more():
    started: list[int] = []
    may_read = threading.Semaphore(1)

    def read(step):
        assert may_read.acquire(timeout=10)
        started.append(step)
        return step * 10

    steps = read_ahead(read, range(4, 8))
    assert next(steps) == (4, 40)
    may_read.release()
    while started != [4, 5]:
        time.sleep(0.001)  # it is read by the thread, though nobody asked for it yet
    may_read.release()
    may_read.release()
    assert list(steps) == [(5, 50), (6, 60), (7, 70)]
    assert list(read_ahead(read, range(0))) == []


def test_an_error_of_reading_reaches_the_caller():
    def read(step):
        if step == 2:
            msg = "tile 17 is damaged"
            raise StoreError(msg)
        return step

    seen: list[int] = []
    with pytest.raises(StoreError, match="tile 17 is damaged"):
        seen.extend(value for _, value in read_ahead(read, range(5)))
    assert seen == [0, 1]


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"size": 32}, "'a' has tiles of 16 px, 'b' of 32 px; tile all slides alike"),
        ({"mpp": 0.25}, "'a' is at 0.5 um/px, 'b' at 0.25; tile all slides with one --mpp"),
        (
            {"classes": ClassTable.of_names(["Gland"])},
            "'a' has the classes Tumor, Stroma, 'b' Gland; tile all slides with one --classes",
        ),
    ],
)
def test_stores_that_differ_are_named_with_the_remedy(tmp_path, options, message):
    stores = [write(tmp_path, "a"), write(tmp_path, "b", **options)]
    with pytest.raises(StoreError, match=message):
        check_stores_agree(stores)


def test_stores_without_labels_agree_with_any_class_table(tmp_path):
    check_stores_agree([write(tmp_path, "a", classes=None), write(tmp_path, "b")])


def slides_of(tile_set):
    return {tile_set.name(i).split("[")[0] for i in range(len(tile_set))}


def test_test_slides_are_in_neither_set(tmp_path):
    stores = [
        write(tmp_path, "a", split="train"),
        write(tmp_path, "b", split="val"),
        write(tmp_path, "c", split="test"),
        write(tmp_path, "d"),
    ]
    train, val = split_tiles(stores, val_fraction=0.5, seed=0, labelled_only=True)
    assert slides_of(train) == {"a", "d"}  # nothing is drawn where a split is named
    assert slides_of(val) == {"b"}


def test_unlabelled_tiles_are_learned_from_in_pretraining_only(tmp_path):
    stores = [write(tmp_path, "a"), write(tmp_path, "b", labelled=False)]
    train, _ = split_tiles(stores, val_fraction=0.0, seed=0, labelled_only=True)
    assert slides_of(train) == {"a"}
    train, _ = split_tiles(stores, val_fraction=0.0, seed=0, labelled_only=False)
    assert slides_of(train) == {"a", "b"}


def test_one_patient_validates_on_its_last_tiles_and_is_told_so(tmp_path, caplog):
    stores = [write(tmp_path, "a", patient="p"), write(tmp_path, "b", patient="p")]
    train, val = split_tiles(stores, val_fraction=0.25, seed=0, labelled_only=False)
    assert [val.name(i) for i in range(len(val))] == ["b[3]", "b[4]", "b[5]"]
    assert len(train) == 9
    assert "only one patient: validating on 3 of its own tiles" in caplog.text


def test_nothing_to_learn_from_is_an_error(tmp_path):
    unlabelled = [write(tmp_path, "a", labelled=False)]
    with pytest.raises(StoreError, match="no labelled tile to learn from in 1 stores"):
        split_tiles(unlabelled, val_fraction=0.2, seed=0, labelled_only=True)
    for_test = [write(tmp_path, "b", split="test")]
    with pytest.raises(StoreError, match="slides of the splits val and test are not learned from"):
        split_tiles(for_test, val_fraction=0.2, seed=0, labelled_only=False)


def test_a_patient_in_two_splits_is_an_error(tmp_path):
    stores = [
        write(tmp_path, "a", patient="p", split="train"),
        write(tmp_path, "b", patient="p", split="test"),
    ]
    with pytest.raises(StoreError, match="one patient are in the splits train and test; correct"):
        split_tiles(stores, val_fraction=0.2, seed=0, labelled_only=False)
