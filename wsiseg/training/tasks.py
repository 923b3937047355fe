"""The two things that are learned: to denoise tissue, and to label it."""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
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

CPU_PIECE = 2
"""Tiles per network call on a CPU, where small batches stay in its caches: 8 tiles of 128 px take
0.61 s in pieces of 2 and 0.84 s at once (two cores, tiny network)."""

MAX_VAL_TILES = 256
"""Validation looks at this many tiles at most, evenly spaced."""


def step_generator(seed: int, step: int, purpose: int) -> torch.Generator:
    """Return the random numbers of one purpose of one step, on the CPU."""
    words = np.random.SeedSequence([seed, step, purpose]).generate_state(2, np.uint32)
    return torch.Generator().manual_seed(int(words[0]) << 31 ^ int(words[1]))


AUGMENTATION, NOISE, MASKS, VALIDATION = range(4)


@dataclass(frozen=True, slots=True)
class Setup:
    """What both tasks share."""

    train: TileSet
    val: TileSet
    optim: OptimConfig
    augment: AugmentConfig
    device: torch.device
    seed: int

    @property
    def batch_size(self) -> int:
        """Tiles of one optimizer step."""
        return self.optim.batch_size * self.optim.accumulate

    @property
    def piece(self) -> int:
        """Tiles per network call."""
        on_cpu = self.device.type == "cpu"
        return min(CPU_PIECE, self.optim.batch_size) if on_cpu else self.optim.batch_size

    def val_pieces(self) -> Iterator[Tiles]:
        """Yield the validation tiles, always the same ones."""
        num = min(len(self.val), MAX_VAL_TILES)
        chosen = np.unique(np.linspace(0, len(self.val) - 1, num).round().astype(np.int64))
        for first in range(0, num, self.piece):
            yield self.val.read(chosen[first : first + self.piece])


class _TileTask:
    """Reading and augmenting the tiles of a step."""

    def __init__(self, setup: Setup) -> None:
        self._setup = setup
        self._sampler = Sampler(len(setup.train), batch_size=setup.batch_size, seed=setup.seed)

    def batch(self, step: int) -> Tiles:
        """See Task."""
        return self._setup.train.read(self._sampler.indices(step))

    def names(self, batch: Tiles) -> list[str]:
        """See Task."""
        return batch.names

    def _augmented(self, batch: Tiles, step: int) -> tuple[torch.Tensor, torch.Tensor]:
        setup = self._setup
        images = torch.from_numpy(batch.images).to(setup.device, non_blocking=True)
        labels = torch.from_numpy(batch.labels).to(setup.device, non_blocking=True)
        generator = step_generator(setup.seed, step, AUGMENTATION)
        return augment(images, labels, setup.augment, generator)


class DenoiseTask(_TileTask):
    """Pretraining: predict the noise in noised tiles (or what the objective asks for)."""

    metric = "loss"
    is_higher_better = False

    def __init__(self, setup: Setup, diffusion: Diffusion) -> None:
        super().__init__(setup)
        self._diffusion = diffusion.to(setup.device)

    def losses(self, model: nn.Module, batch: Tiles, step: int) -> Iterator[torch.Tensor]:
        """See Task."""
        setup = self._setup
        images, _ = self._augmented(batch, step)
        x0 = to_network(images)
        generator = step_generator(setup.seed, step, NOISE)
        t = torch.randint(0, self._diffusion.config.timesteps, (len(x0),), generator=generator)
        t = t.to(setup.device)
        noise = torch.randn(x0.shape, generator=generator).to(x0)
        masks = step_generator(setup.seed, step, MASKS)
        for first in range(0, len(x0), setup.piece):
            part = slice(first, first + setup.piece)
            piece = self._diffusion.loss(model, x0[part], t[part], noise[part], masks)
            yield piece.sum() / len(x0)

    @torch.inference_mode()
    def validate(self, model: nn.Module) -> dict[str, float]:
        """Return the mean loss over fixed tiles, time steps and noise (defect D17)."""
        total, count = 0.0, 0
        generator = step_generator(self._setup.seed, 0, VALIDATION)
        timesteps = self._diffusion.config.timesteps
        for tiles in self._setup.val_pieces():
            x0 = to_network(torch.from_numpy(tiles.images).to(self._setup.device))
            # An even spread of time steps: golden ratio steps through 0..T-1.
            order = (np.arange(count, count + len(x0)) * 0.6180339887) % 1.0
            t = torch.from_numpy((order * timesteps).astype(np.int64)).to(self._setup.device)
            noise = torch.randn(x0.shape, generator=generator).to(x0)
            total += float(self._diffusion.loss(model, x0, t, noise, generator).sum())
            count += len(x0)
        return {"loss": total / count} if count else {}


class SegmentTask(_TileTask):
    """Fine-tuning: label each pixel of the annotated tiles."""

    metric = "dice"
    is_higher_better = True

    def __init__(self, setup: Setup, loss: SegmentationLoss, classes: ClassTable) -> None:
        super().__init__(setup)
        self._loss = loss
        self._classes = classes

    def losses(self, model: nn.Module, batch: Tiles, step: int) -> Iterator[torch.Tensor]:
        """See Task."""
        images, labels = self._augmented(batch, step)
        x = to_network(images)
        # The mean is over tiles that have a label; how the batch is cut does not matter.
        is_labelled = (labels != IGNORE).flatten(1).any(dim=1)
        num_labelled = max(1, int(is_labelled.sum()))
        for first in range(0, len(x), self._setup.piece):
            part = slice(first, first + self._setup.piece)
            total, _ = self._loss(model(x[part]), labels[part])
            yield total.sum() / num_labelled

    @torch.inference_mode()
    def validate(self, model: nn.Module) -> dict[str, float]:
        """Return the loss and the Dice of each class, pooled over all validation tiles."""
        num = self._classes.num_labels
        confusion = np.zeros((num, num), np.int64)
        total, count = 0.0, 0
        for tiles in self._setup.val_pieces():
            logits = model(to_network(torch.from_numpy(tiles.images).to(self._setup.device)))
            labels = torch.from_numpy(tiles.labels).to(self._setup.device)
            losses, _ = self._loss(logits, labels)
            total, count = total + float(losses.sum()), count + len(losses)
            guess = logits.argmax(dim=1).to(torch.uint8).cpu().numpy()
            confusion += confusion_matrix(tiles.labels, guess, num)
        if not count:
            return {}
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
