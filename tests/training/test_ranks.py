"""Several processes train as one does; what torchrun starts again is in tests/reliability."""

import itertools

import pytest

from tests.training.tiny_runs import assert_same_weights, lines
from tests.training.two_ranks import torchrun, train_alone, weights
from wsiseg.errors import ConfigError
from wsiseg.training.ranks import Ranks


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A store and the run of one process that nobody kills."""
    return train_alone(tmp_path_factory.mktemp("alone"))


def test_two_processes_end_with_the_bits_of_one(whole, tmp_path):
    """A network call is two tiles of 64 px, so that both have the same calls to make."""
    store, alone = whole
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
