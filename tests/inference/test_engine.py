"""The engine: windows in order, the same for any threads; reading beside the network; counters."""

import threading

import numpy as np
import pytest
import torch
from segmenting import ByColour, engine, random_image, random_network
from torch import nn

from wsiseg.inference.blend import PROBABILITY_ONE
from wsiseg.inference.meter import Meter, Use, total
from wsiseg.inference.symmetry import NAMES, symmetries

IMAGES = [random_image(32, 32, seed=i) for i in range(9)]


def read(index):
    return IMAGES[index]


@pytest.fixture
def threads():
    before = torch.get_num_threads()
    yield torch.set_num_threads
    torch.set_num_threads(before)


def predictions(network, *, num_threads=2, **options):
    torch.set_num_threads(num_threads)
    results = list(engine(network, **options).run(range(len(IMAGES)), read))
    assert [item for item, _ in results] == list(range(len(IMAGES)))
    return np.stack([p for _, p in results])


@pytest.mark.parametrize(("num_threads", "num_readers"), [(1, 1), (1, 4), (2, 1), (3, 2), (4, 7)])
def test_windows_are_the_same_for_any_number_of_threads(threads, num_threads, num_readers):
    network = random_network(seed=1)
    wanted = predictions(network, num_threads=1, num_readers=1)
    got = predictions(network, num_threads=num_threads, num_readers=num_readers)
    np.testing.assert_array_equal(got, wanted)
    assert wanted.dtype == np.int32
    assert wanted.shape == (9, 2, 32, 32)
    assert wanted.min() >= 0
    assert wanted.sum(axis=1).max() <= PROBABILITY_ONE + 1  # each class is rounded on its own


def test_the_threads_of_torch_are_given_back(threads):
    threads(3)
    list(engine(ByColour()).run(range(3), read))
    assert torch.get_num_threads() == 3


@pytest.mark.parametrize("batch_size", [1, 2, 4, 9, 20])
def test_batches_as_on_a_gpu_give_each_window_once_and_drop_what_fills_them(batch_size):
    network = ByColour()  # works pixel by pixel, so that no batch can change a bit
    batched = engine(network, batch_size=batch_size)
    results = list(batched._run_in_batches(range(len(IMAGES)), read))
    assert [item for item, _ in results] == list(range(len(IMAGES)))
    np.testing.assert_array_equal(np.stack([p for _, p in results]), predictions(network))
    assert batched.use.windows == len(IMAGES)


class Waits(nn.Module):
    """A network that goes on only once an event has happened."""

    def __init__(self, event):
        super().__init__()
        self.event = event
        self.was_in_time = []

    def forward(self, x_NCHW):
        self.was_in_time.append(self.event.wait(timeout=60))
        return torch.cat([x_NCHW[:, :1], x_NCHW[:, :1]], dim=1)


def test_reading_goes_on_while_the_network_works(threads):
    threads(1)
    later_is_read = threading.Event()

    def read_and_tell(index):
        if index == 3:
            later_is_read.set()
        return IMAGES[index]

    network = Waits(later_is_read)
    assert len(list(engine(network).run(range(6), read_and_tell))) == 6
    assert network.was_in_time == [True] * 6


def test_the_network_goes_on_while_the_caller_is_busy(threads):
    threads(1)
    reached = threading.Event()

    class Counts(nn.Module):
        calls = 0

        def forward(self, x_NCHW):
            Counts.calls += 1
            if Counts.calls == 4:
                reached.set()
            return x_NCHW[:, :2]

    results = engine(Counts()).run(range(len(IMAGES)), read)
    next(results)  # and now the caller does something else
    assert reached.wait(timeout=60)
    results.close()


def test_reading_runs_ahead_only_so_far(threads):
    threads(1)
    begun: list[int] = []

    def read_and_note(index):
        begun.append(index)
        return IMAGES[0]

    results = engine(ByColour()).run(iter(range(10_000)), read_and_note)
    for _ in range(5):
        next(results)
    assert len(begun) <= 5 + 6 + 1
    results.close()


def test_a_read_that_fails_ends_the_run_with_its_error(threads):
    def fail(index):
        if index == 4:
            raise OSError("the disk is gone")
        return IMAGES[index]

    before = threading.active_count()
    got: list[int] = []
    with pytest.raises(OSError, match="the disk is gone"):
        got.extend(i for i, _ in engine(ByColour()).run(range(9), fail))
    assert got == [0, 1, 2, 3]
    assert threading.active_count() == before


def test_a_caller_who_stops_listening_leaves_no_threads():
    before = threading.active_count()
    results = engine(random_network()).run(range(9), read)
    next(results)
    results.close()
    assert threading.active_count() == before


def test_the_counters_add_up():
    counted = engine(random_network())
    list(counted.run(range(len(IMAGES)), read))
    use = counted.use
    assert use.windows == len(IMAGES)
    assert use.lanes == torch.get_num_threads()
    assert 0 < use.network_s <= use.lanes * use.wall_s
    assert use.read_s > 0
    assert 0 <= use.waiting < 1


def test_waiting_is_the_share_of_the_lanes_without_work():
    use = Use(windows=4, lanes=2, wall_s=10.0, network_s=15.0, read_s=3.0)
    assert use.waiting == 0.25
    busy = Use(windows=1, lanes=2, wall_s=10.0, network_s=20.0, read_s=0.0)
    assert busy.waiting == 0.0
    both = total([use, busy])
    assert (both.windows, both.wall_s, both.waiting) == (5, 20.0, 0.125)
    assert Meter(2).use.waiting == 0.0


def turned(image, symmetry):
    tensor = torch.from_numpy(image.copy()).permute(2, 0, 1)[None]
    return np.ascontiguousarray(symmetry.apply(tensor)[0].permute(1, 2, 0).numpy())


@pytest.mark.parametrize("name", NAMES)
def test_undo_brings_back_what_apply_turned(name):
    x = torch.arange(2 * 3 * 5 * 5).reshape(2, 3, 5, 5)
    group = symmetries(name)
    assert len(group) == {"none": 1, "flips": 4, "dihedral": 8}[name]
    images = [symmetry.apply(x) for symmetry in group]
    for symmetry, image in zip(group, images, strict=True):
        assert torch.equal(symmetry.undo(image), x)
    assert len({tuple(image.flatten().tolist()) for image in images}) == len(group)
    assert torch.equal(images[0], x)


@pytest.mark.parametrize("name", ["flips", "dihedral"])
def test_augmented_predictions_turn_with_the_image_exactly(name):
    network = random_network(seed=3, scale=4.0)
    group = symmetries(name)
    pixels = [turned(IMAGES[0], symmetry) for symmetry in group]
    results = engine(network, tta=name).run(range(len(group)), pixels.__getitem__)
    for symmetry, (_, p) in zip(group, results, strict=True):
        upright = symmetry.undo(torch.from_numpy(p)[None])[0].numpy()
        if symmetry == group[0]:
            first = upright
        np.testing.assert_array_equal(upright, first)
    plain = predictions(network)[0]
    assert (plain != first).any()  # without it the network is no such thing


def test_augmentation_is_the_mean_of_the_probabilities():
    network = random_network(seed=3, scale=4.0)
    group = symmetries("flips")
    pixels = [turned(IMAGES[0], symmetry) for symmetry in group]
    plain = [
        symmetry.undo(torch.from_numpy(p)[None])[0].numpy()
        for symmetry, (_, p) in zip(
            group, engine(network).run(range(4), pixels.__getitem__), strict=True
        )
    ]
    ((_, mean),) = engine(network, tta="flips").run(range(1), read)
    np.testing.assert_allclose(mean, np.mean(plain, axis=0), atol=0.5)


def test_an_unknown_augmentation_is_refused():
    with pytest.raises(ValueError, match="'spin' is not one of none, flips, dihedral"):
        engine(ByColour(), tta="spin")
