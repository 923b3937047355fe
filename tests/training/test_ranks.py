"""Several processes train as one does; what torchrun starts again is in tests/reliability."""

import itertools

import pytest

from tests.stores_on_disk import write_tiles
from tests.training.tiny_runs import assert_same_weights, lines
from tests.training.two_ranks import CONFIG, torchrun, weights
from wsiseg.errors import ConfigError
from wsiseg.stages import pretrain
from wsiseg.training.ranks import Ranks


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_tiles(tmp_path_factory.mktemp("store") / "s.zarr", num=8, size=64, shard_tiles=8)


@pytest.fixture(scope="module")
def alone(store, tmp_path_factory):
    """The run of one process."""
    folder = tmp_path_factory.mktemp("alone") / "run"
    pretrain.run(CONFIG, stores=[store], output=folder)
    return folder


def test_two_processes_end_with_the_bits_of_one(store, alone, tmp_path):
    """A network call is two tiles of 64 px, so that both have the same calls to make."""
    run = torchrun(store, tmp_path / "run")
    text, _ = run.communicate(timeout=200)
    assert run.returncode == 0, text
    assert_same_weights(weights(tmp_path / "run"), weights(alone))
    assert lines(tmp_path / "run") == lines(alone)
    assert text.count("train_tiles") <= 1  # one summary


def test_a_step_that_cannot_be_shared_is_refused():
    with pytest.raises(ConfigError, match="8 tiles cannot be shared by 3 processes"):
        Ranks(rank=0, size=3).check_batch(8)


def test_shares_are_all_tiles_once():
    tiles = list(range(12))
    shares = [tiles[Ranks(rank=rank, size=4).share(12)] for rank in range(4)]
    assert list(itertools.chain(*shares)) == tiles
    assert {len(share) for share in shares} == {3}
