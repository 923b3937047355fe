"""The two things that are learned: to denoise tissue, and to label it."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from wsiseg.classes import IGNORE, ClassTable
from wsiseg.models.diffusion import Diffusion
from wsiseg.models.inputs import to_network
from wsiseg.settings.training import AugmentConfig, OptimConfig
from wsiseg.training.augment import augment
from wsiseg.training.confusion import confusion_matrix
from wsiseg.training.data import Sampler, Tiles, TileSet
from wsiseg.training.losses import SegmentationLoss
from wsiseg.training.pieces import Piece, Runner
from wsiseg.training.ranks import ALONE, Ranks

CPU_PIECE_PIXELS = 128 * 64
"""Pixels of a network call on a CPU, at least one tile: two of 64 px, one of 128 px and more.
Larger calls leave the caches; smaller ones are all overhead."""

GOLDEN_RATIO = 0.6180339887

MAX_VAL_TILES = 256
"""Validation looks at this many tiles at most, evenly spaced."""


AUGMENTATION, NOISE, STEPS, VAL_NOISE, VAL_STEPS, SAMPLES = range(6)
"""Purposes, each with random numbers of its own."""


def seed_of(seed: int, number: int, purpose: int) -> int:
    """Return the seed of one purpose of one tile, which depends on nothing else."""
    words = np.random.SeedSequence([seed, number, purpose]).generate_state(1, np.uint64)
    return int(words[0] >> np.uint64(1))


def torch_generator(
    seed: int, number: int, purpose: int, device: torch.device | str = "cpu"
) -> torch.Generator:
    """Return the random numbers of one purpose of one tile, drawn on a device."""
    return torch.Generator(device).manual_seed(seed_of(seed, number, purpose))


@dataclass(frozen=True, slots=True)
class Setup:
    """What both tasks share."""

    train: TileSet
    val: TileSet
    optim: OptimConfig
    augment: AugmentConfig
    device: torch.device
    seed: int
    ranks: Ranks = ALONE

    @property
    def batch_size(self) -> int:
        """Tiles of one optimizer step, of all processes together."""
        return self.optim.batch_size * self.optim.accumulate

    @property
    def piece(self) -> int:
        """Tiles per network call."""
        if self.device.type == "cpu":
            fitting = CPU_PIECE_PIXELS // self.train.tile_size_px**2
            return max(1, min(fitting, self.optim.batch_size))
        return max(1, self.optim.batch_size // self.ranks.size)

    def parts(self, num: int) -> list[slice]:
        """Cut `num` tiles into pieces."""
        return [slice(i, min(i + self.piece, num)) for i in range(0, num, self.piece)]

    def val_parts(self) -> list[npt.NDArray[np.int64]]:
        """Return the numbers of the validation tiles in pieces, always the same ones."""
        num = min(len(self.val), MAX_VAL_TILES)
        chosen = np.unique(np.linspace(0, len(self.val) - 1, num).round().astype(np.int64))
        return [chosen[part] for part in self.parts(num)]


class _TileTask:
    """Reading and augmenting this process's tiles of a step."""

    def __init__(self, setup: Setup) -> None:
        setup.ranks.check_batch(setup.batch_size)
        self._setup = setup
        self._sampler = Sampler(len(setup.train), batch_size=setup.batch_size, seed=setup.seed)

    @property
    def num_pieces(self) -> int:
        """See Task."""
        return len(self._setup.parts(self._setup.batch_size // self._setup.ranks.size))

    def batch(self, step: int) -> Tiles:
        """See Task."""
        share = self._setup.ranks.share(self._setup.batch_size)
        return self._setup.train.read(self._sampler.indices(step)[share])

    def names(self, step: int) -> list[str]:
        """See Task."""
        return [self._setup.train.name(int(i)) for i in self._sampler.indices(step)]

    def _numbers(self, step: int) -> range:
        """Return how many tiles the run has seen before each tile of the step."""
        first = step * self._setup.batch_size
        return range(first, first + self._setup.batch_size)[
            self._setup.ranks.share(self._setup.batch_size)
        ]

    def _augmented(self, batch: Tiles, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        setup = self._setup
        images = torch.from_numpy(batch.images).to(setup.device, non_blocking=True)
        labels = torch.from_numpy(batch.labels).to(setup.device, non_blocking=True)
        generators = [
            np.random.default_rng(seed_of(setup.seed, number, AUGMENTATION))
            for number in self._numbers(step)
        ]
        return augment(images, labels, setup.augment, generators)


class DenoiseTask(_TileTask):
    """Pretraining: predict the noise in noised tiles (or what the objective asks for)."""

    metric = "loss"
    is_higher_better = False

    def __init__(self, setup: Setup, diffusion: Diffusion) -> None:
        super().__init__(setup)
        self._diffusion = diffusion.to(setup.device)

    def pieces(self, batch: Tiles, step: int) -> list[Piece]:
        """See Task."""
        setup = self._setup
        images, _ = self._augmented(batch, step)
        numbers = self._numbers(step)
        return [
            functools.partial(self._loss, images[part], numbers[part], (NOISE, STEPS), None)
            for part in setup.parts(len(images))
        ]

    def _loss(
        self,
        images: torch.Tensor,
        numbers: Sequence[int],
        purposes: tuple[int, int],
        t: torch.Tensor | None,
        model: nn.Module,
    ) -> tuple[torch.Tensor, float]:
        """Return the summed loss of tiles; each draws its own time step, noise and mask."""
        setup, x0 = self._setup, to_network(images)
        generators = [
            torch_generator(setup.seed, number, purposes[0], setup.device) for number in numbers
        ]
        masks = [torch_generator(setup.seed, number, purposes[1]) for number in numbers]
        if t is None:
            steps = self._diffusion.config.timesteps
            t = torch.cat([torch.randint(0, steps, (1,), generator=g) for g in masks])
        noise = torch.stack(
            [torch.randn(x0.shape[1:], generator=g, device=setup.device) for g in generators]
        )
        losses = self._diffusion.loss(model, x0, t.to(setup.device), noise, masks)
        return losses.sum(), len(x0)

    def validate(self, model: nn.Module, runner: Runner) -> dict[str, float]:
        """Return the mean loss over fixed tiles, time steps and noise (defect D17)."""
        timesteps = self._diffusion.config.timesteps

        @torch.inference_mode()
        def loss_of(chosen: npt.NDArray[np.int64]) -> tuple[float, float]:
            tiles = self._setup.val.read(chosen)
            # An even spread of time steps: golden ratio steps through 0..T-1.
            spread = (chosen * GOLDEN_RATIO) % 1.0 * timesteps
            t = torch.from_numpy(spread.astype(np.int64))
            images = torch.from_numpy(tiles.images).to(self._setup.device)
            loss, count = self._loss(images, chosen.tolist(), (VAL_NOISE, VAL_STEPS), t, model)
            return float(loss), count

        found = list(runner.map(loss_of, self._setup.val_parts()))
        count = sum(count for _, count in found)
        return {"loss": sum(loss for loss, _ in found) / count} if count else {}


class SegmentTask(_TileTask):
    """Fine-tuning: label each pixel of the annotated tiles."""

    metric = "dice"
    is_higher_better = True

    def __init__(self, setup: Setup, loss: SegmentationLoss, classes: ClassTable) -> None:
        super().__init__(setup)
        self._loss = loss
        self._classes = classes

    def pieces(self, batch: Tiles, step: int) -> list[Piece]:
        """See Task."""
        images, labels = self._augmented(batch, step)

        def loss_of(part: slice, model: nn.Module) -> tuple[torch.Tensor, float]:
            # The mean is over tiles that have a label; how the batch is cut does not matter.
            is_labelled = (labels[part] != IGNORE).flatten(1).any(dim=1)
            losses, _ = self._loss(model(to_network(images[part])), labels[part])
            return losses.sum(), float(is_labelled.sum())

        return [functools.partial(loss_of, part) for part in self._setup.parts(len(images))]

    def validate(self, model: nn.Module, runner: Runner) -> dict[str, float]:
        """Return the loss and the Dice of each class, pooled over all validation tiles."""
        num = self._classes.num_labels

        @torch.inference_mode()
        def judge(chosen: npt.NDArray[np.int64]) -> tuple[float, npt.NDArray[np.int64]]:
            tiles = self._setup.val.read(chosen)
            logits = model(to_network(torch.from_numpy(tiles.images).to(self._setup.device)))
            losses, _ = self._loss(logits, torch.from_numpy(tiles.labels).to(self._setup.device))
            guess = logits.argmax(dim=1).to(torch.uint8).cpu().numpy()
            return float(losses.sum()), confusion_matrix(tiles.labels, guess, num)

        found = list(runner.map(judge, self._setup.val_parts()))
        count = min(len(self._setup.val), MAX_VAL_TILES)
        if not count:
            return {}
        total = sum(loss for loss, _ in found)
        confusion = np.sum([matrix for _, matrix in found], axis=0)
        figures = {"loss": total / count}
        hits = np.diag(confusion)[1:]
        sizes = confusion.sum(axis=0)[1:] + confusion.sum(axis=1)[1:]
        dice = {
            name: float(2 * hit / size)
            for name, hit, size in zip(self._classes.names[1:], hits, sizes, strict=True)
            if size > 0
        }
        figures |= {f"dice_{name}": value for name, value in dice.items()}
        if dice:
            figures["dice"] = sum(dice.values()) / len(dice)
        return figures
