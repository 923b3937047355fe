"""Runs small enough to be done thirty times in a test: 16 px tiles, a network of two stages."""

import json
import math
import shutil
from pathlib import Path

import numpy as np
import safetensors.torch
import torch

from tests.stores_on_disk import CLASSES
from wsiseg.models.diffusion import Diffusion
from wsiseg.models.segmenter import Segmenter
from wsiseg.models.unet import UNet
from wsiseg.progress import SilentProgress
from wsiseg.settings.model import DiffusionConfig, UNetConfig
from wsiseg.settings.training import AugmentConfig, LossConfig, OptimConfig
from wsiseg.store.tiles import TileStore
from wsiseg.training.data import TileSet
from wsiseg.training.loop import METRICS_NAME, Trainer
from wsiseg.training.losses import SegmentationLoss
from wsiseg.training.tasks import DenoiseTask, SegmentTask, Setup

CPU = torch.device("cpu")
TINY = UNetConfig(dim=8, mults=(1, 2), blocks=1, heads=2, head_dim=8)
SHORT = OptimConfig(
    steps=12, batch_size=4, learning_rate=1e-3, warmup_steps=3, validate_every=4, save_every=1,
    patience=0, ema_decay=0.9,
)  # fmt: skip


def tile_set(store, numbers):
    places = np.stack([np.zeros(len(numbers), np.int64), np.asarray(numbers)], axis=1)
    return TileSet([TileStore.open(store)], places)


def setup_of(store, optim=SHORT, *, seed=1, augment=None, num=10, **options):
    train, val = tile_set(store, range(num - 3)), tile_set(store, range(num - 3, num))
    return Setup(train, val, optim, augment or AugmentConfig(), CPU, seed, **options)


def denoiser(store, optim=SHORT, *, config=TINY, diffusion=None, **options):
    setup = setup_of(store, optim, **options)
    torch.manual_seed(setup.seed)
    task = DenoiseTask(setup, Diffusion(diffusion or DiffusionConfig(mask_size=4)))
    return UNet(config, out_channels=3), task


def segmenter(store, optim=SHORT, *, config=TINY, loss=None, **options):
    setup = setup_of(store, optim, **options)
    torch.manual_seed(setup.seed)
    task = SegmentTask(setup, SegmentationLoss(loss or LossConfig(), 3), CLASSES)
    return Segmenter(UNet(config, out_channels=3), CLASSES, 0), task


KINDS = {"pretrain": denoiser, "finetune": segmenter}


def trainer(folder, model, task, optim=SHORT, *, progress=None, **options):
    Path(folder).mkdir(parents=True, exist_ok=True)
    progress = progress or SilentProgress()
    return Trainer(
        model, task, optim, folder=Path(folder), device=CPU, progress=progress, **options
    )


def train(kind, store, folder, optim=SHORT, **options):
    """Train in `folder`, going on where a run there stopped."""
    model, task = KINDS[kind](store, optim, **options)
    return trainer(folder, model, task, optim).run(kind)


def newest_state(folder, *, step=None):
    """Return everything in the newest resume point, or that of a step: description and tensors."""
    points = Path(folder) / "resume"
    point = points / f"step-{step:08d}" if step else sorted(points.glob("step-????????"))[-1]
    content = json.loads((point / "state.json").read_text())["state"]
    return content, safetensors.torch.load((point / "state.safetensors").read_bytes())


def lines(folder, *, timed=False):
    """Return the lines of metrics.jsonl, without the speed."""
    text = (Path(folder) / METRICS_NAME).read_text(encoding="utf-8")
    found = [json.loads(line) for line in text.splitlines()]
    return found if timed else [{k: v for k, v in f.items() if k != "images_per_s"} for f in found]


def go_back(folder, step):
    """Leave only the resume point of a step, as a kill right after it would."""
    for point in (Path(folder) / "resume").glob("step-????????"):
        if point.name != f"step-{step:08d}":
            shutil.rmtree(point)


def assert_same_weights(one, other):
    assert one.keys() == other.keys()
    different = [name for name in one if not torch.equal(one[name], other[name])]
    assert not different


class StopAfterEveryStep(SilentProgress):
    """Presses Ctrl-C as soon as a step is done."""

    def advance(self, count=1, *, note=""):
        raise KeyboardInterrupt


def stop_after_every_step(kind, store, folder, optim, **options):
    """Stop a run after every step and take it up again; return how often.

    What it has at each step and at its end is what a run has that nobody stops. Needs
    `resume.KEPT` points for every step.
    """
    whole = train(kind, store, folder / "whole", optim, **options)
    num_stops = 0
    while True:
        model, task = KINDS[kind](store, optim, **options)
        again = trainer(folder / "again", model, task, optim, progress=StopAfterEveryStep())
        try:
            result = again.run(kind)
        except KeyboardInterrupt:
            num_stops += 1
        else:
            break
        content, tensors = newest_state(folder / "again")
        assert content["step"] == num_stops
        if num_stops < optim.steps:
            _, expected = newest_state(folder / "whole", step=num_stops)
            # The best weights come with the validation, which Ctrl-C put off until the resume.
            assert_same_weights(
                *({n: t for n, t in s.items() if n[:5] != "best."} for s in (tensors, expected))
            )
    assert num_stops == whole.steps
    assert_same_weights(result.ema, whole.ema)
    assert_same_weights(result.best, whole.best)
    assert (result.best_step, result.metrics) == (whole.best_step, whole.metrics)
    assert lines(folder / "again") == lines(folder / "whole")
    return num_stops


class Poisoned:
    """A task whose loss or gradient is not finite at some steps."""

    def __init__(self, task, steps, value=math.nan, where="loss"):
        self._task, self._steps, self._value, self._where = task, steps, value, where
        self.metric, self.is_higher_better = task.metric, task.is_higher_better
        self.num_pieces, self.batch, self.names = task.num_pieces, task.batch, task.names
        self.validate = task.validate

    def pieces(self, batch, step):
        pieces = self._task.pieces(batch, step)
        if step not in self._steps:
            return pieces

        def spoiled(model):
            loss, count = pieces[0](model)
            if self._where == "loss":
                return loss * self._value, count
            zero = sum((p * 0.0).sum() for p in model.parameters())
            return loss + torch.sqrt(zero), count  # finite, with a slope that is not

        return [spoiled, *pieces[1:]]
