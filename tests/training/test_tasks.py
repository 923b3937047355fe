"""What a step learns from: its tiles and random numbers, and the figures of a validation."""

import itertools

import numpy as np
import pytest
import torch
from torch import nn

from tests.stores_on_disk import CLASSES, write_tiles
from tests.training.tiny_runs import CPU, SHORT, denoiser, segmenter, setup_of
from wsiseg.classes import IGNORE
from wsiseg.errors import ConfigError
from wsiseg.models.inputs import to_network
from wsiseg.settings.training import AugmentConfig, LossConfig
from wsiseg.store.tiles import TileStore
from wsiseg.training.losses import SegmentationLoss
from wsiseg.training.pieces import open_runner
from wsiseg.training.ranks import Ranks
from wsiseg.training.tasks import SegmentTask, Setup, seed_of

PLAIN = AugmentConfig(
    flip=False, stain_sigma=0.0, blur_probability=0.0, brightness=0.0, contrast=0.0
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_tiles(tmp_path_factory.mktemp("tasks") / "s1.zarr")


def test_every_purpose_of_every_tile_has_random_numbers_of_its_own():
    seeds = {seed_of(*words) for words in itertools.product(range(4), range(50), range(6))}
    assert len(seeds) == 4 * 50 * 6
    assert all(0 <= seed < 1 << 63 for seed in seeds)  # what a torch generator takes


@pytest.mark.parametrize("make", [denoiser, segmenter])
def test_the_loss_of_a_batch_does_not_depend_on_how_it_is_cut(store, monkeypatch, make):
    totals = []
    for pixels in (16 * 16, 3 * 16 * 16, 64 * 64):  # one, three and all tiles of a call
        monkeypatch.setattr("wsiseg.training.tasks.CPU_PIECE_PIXELS", pixels)
        model, task = make(store)
        found = [piece(model) for piece in task.pieces(task.batch(2), 2)]
        totals.append([sum(loss.item() for loss, _ in found), sum(n for _, n in found)])
    assert totals[0] == pytest.approx(totals[1], rel=1e-5)
    assert totals[0] == pytest.approx(totals[2], rel=1e-5)


def test_processes_share_the_tiles_of_a_step(store):
    _, alone = segmenter(store)
    names = []
    for number in range(2):
        _, task = segmenter(store, ranks=Ranks(rank=number, size=2))
        names += task.batch(3).names
        assert task.names(3) == alone.names(3)  # a message names the whole batch
    assert names == alone.batch(3).names


def test_a_batch_that_cannot_be_shared_is_refused(store):
    with pytest.raises(
        ConfigError,
        match="a step of 4 tiles cannot be shared by 3 processes; choose a --batch-size",
    ):
        segmenter(store, ranks=Ranks(rank=0, size=3))


class Known(nn.Module):
    """Predicts the first class where the red channel is above half, else background."""

    def forward(self, x):
        red = x[:, :1]
        return torch.cat([-red, red, torch.full_like(red, -9.0)], dim=1) * 5


def test_validation_pools_the_dice_of_each_class_over_all_tiles(store):
    setup = setup_of(store, augment=PLAIN)
    task = SegmentTask(setup, SegmentationLoss(LossConfig(), 3), CLASSES)
    with open_runner(CPU, amp=True, num_pieces=2, is_compiled=False) as runner:
        found = task.validate(Known(), runner)
    tiles = TileStore.open(store)
    images, truth = tiles.read_images(range(7, 10)), tiles.read_labels(range(7, 10))
    guess = (to_network(torch.from_numpy(images))[:, 0] > 0).numpy()
    counted = truth != IGNORE
    hit = (guess & (truth == 1)).sum()
    dice = 2 * hit / ((guess & counted).sum() + (truth == 1).sum())
    assert found["dice_Tumor"] == pytest.approx(dice)
    assert found["dice_Stroma"] == 0  # is there and never found
    assert found["dice"] == pytest.approx(dice / 2)


def test_validation_without_tiles_gives_no_figures(store):
    setup = setup_of(store)
    empty = Setup(setup.train, setup.train.__class__([], np.zeros((0, 2), np.int64)), SHORT,
                  PLAIN, CPU, 1)  # fmt: skip
    task = SegmentTask(empty, SegmentationLoss(LossConfig(), 3), CLASSES)
    with open_runner(CPU, amp=True, num_pieces=2, is_compiled=False) as runner:
        assert task.validate(Known(), runner) == {}


def test_a_tile_without_any_label_neither_teaches_nor_counts(tmp_path, store):
    _, task = segmenter(store, augment=PLAIN)
    batch = task.batch(0)
    batch.labels[0] = IGNORE
    found = [piece(Known()) for piece in task.pieces(batch, 0)]
    assert sum(count for _, count in found) == len(batch.labels) - 1
