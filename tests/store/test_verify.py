"""`verify` finds every single damage, wherever it is."""

import random

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from wsiseg.errors import StoreError
from wsiseg.outputs import partial_path
from wsiseg.store.verify import verify_store


def files_of(store):
    return sorted(p for p in store.rglob("*") if p.is_file())


@pytest.fixture(params=["tiles", "mask"])
def store(request):
    return request.getfixturevalue(request.param)


def test_a_whole_store_has_no_problem(store):
    assert verify_store(store) == []


@given(data=st.data())
@settings(
    max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
def test_any_flipped_bit_is_found_and_its_file_named(store, data):
    path = data.draw(st.sampled_from(files_of(store)))
    before = path.read_bytes()
    bit = data.draw(st.integers(0, 8 * len(before) - 1))
    raw = bytearray(before)
    raw[bit // 8] ^= 1 << (bit % 8)
    path.write_bytes(raw)
    try:
        found = verify_store(store)
    finally:
        path.write_bytes(before)
    assert [p.file for p in found] == [path.relative_to(store).as_posix()]


def test_any_missing_or_truncated_file_is_found(store):
    for path in files_of(store):
        if path.name == "ledger.json":
            continue
        before = path.read_bytes()
        for damage in (path.unlink, lambda p=path, b=before: p.write_bytes(b[:-1])):
            damage()
            found = verify_store(store)
            path.write_bytes(before)
            assert [p.file for p in found] == [path.relative_to(store).as_posix()]


def test_a_foreign_file_is_found(store):
    (store / "extra.bin").write_bytes(random.Random(0).randbytes(10))
    assert [p.file for p in verify_store(store)] == ["extra.bin"]


def test_an_unfinished_store_is_not_verified(tmp_path, store):
    (store / "ledger.json").unlink()
    with pytest.raises(StoreError, match="unfinished"):
        verify_store(store)
    store.rename(partial_path(store))
    with pytest.raises(StoreError, match="no such folder"):
        verify_store(store)
