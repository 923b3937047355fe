"""Images/s that the loader gives, alone, against what a training step takes.

    python benchmarks/bench_loader.py [--size 128] [--preset tiny]

A store of random-looking tissue is written once. The loader is what `wsiseg pretrain` reads with:
the sampler's order, tile by tile, decoded and checked; measured from disk (first epoch) and from
its cache (all later ones). The step is the whole step of the same run: augmentation, network,
gradient and update. The peer is the ratio of the two; 2 is wanted.
"""

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from wsiseg.geometry import Raster
from wsiseg.models.diffusion import Diffusion
from wsiseg.models.unet import UNet
from wsiseg.progress import SilentProgress
from wsiseg.runinfo import RunInfo
from wsiseg.settings.model import UNET_PRESETS, DiffusionConfig
from wsiseg.settings.training import AugmentConfig, OptimConfig
from wsiseg.store.tiles import TileStore
from wsiseg.training.data import TileSet
from wsiseg.training.loop import Trainer
from wsiseg.training.tasks import DenoiseTask, Setup

NUM_TILES = 256
BATCH = 8
STEPS = 8
ROUNDS = 3


def write_store(path: Path, size: int) -> None:
    """Write tiles that compress about as tissue does: smooth structure and a little noise."""
    rng = np.random.default_rng(0)
    coarse = rng.integers(90, 240, (NUM_TILES, size // 16, size // 16, 3))
    images = coarse.repeat(16, axis=1).repeat(16, axis=2) + rng.integers(
        -12, 12, (1, size, size, 3)
    )
    with TileStore.create(
        path,
        raster=Raster(size * NUM_TILES, size, 0.5, 0.5, 1.0, 1.0),
        tile_size_px=size,
        origins=np.stack([np.arange(NUM_TILES) * size, np.zeros(NUM_TILES, np.int64)], axis=1),
        slide={
            "slide_id": "s", "width_px_l0": size * NUM_TILES, "height_px_l0": size, "bounds": None,
        },
        run=RunInfo(stage="bench", config={}, inputs={}),
        has_labels=False, classes=None, group_id="p", split="train", shard_tiles=64,
        overwrite=False, codec="zstd",
    ) as writer:  # fmt: skip
        for shard in writer.pending_shards():
            tiles = writer.shard_tiles(shard)
            writer.write_shard(shard, images[tiles.start : tiles.stop].astype(np.uint8), None)
        writer.finish()


def setup_of(path: Path, preset: str) -> tuple[Setup, DenoiseTask, OptimConfig]:
    """Return a pretraining task on the store, with nothing cached yet."""
    places = np.stack([np.zeros(NUM_TILES, np.int64), np.arange(NUM_TILES)], axis=1)
    train, val = (TileSet([TileStore.open(path)], part) for part in (places, places[:1]))
    optim = OptimConfig(
        steps=STEPS, batch_size=BATCH, warmup_steps=1, save_every=10_000, validate_every=10_000
    )
    setup = Setup(train, val, optim, AugmentConfig(), torch.device("cpu"), 0)
    return setup, DenoiseTask(setup, Diffusion(DiffusionConfig())), optim


def loader_rate(task: DenoiseTask, first_step: int) -> float:
    """Return images/s of one epoch of batches."""
    num = NUM_TILES // BATCH
    began = time.perf_counter()
    for step in range(first_step, first_step + num):
        task.batch(step)
    return num * BATCH / (time.perf_counter() - began)


def step_rate(path: Path, preset: str, folder: Path) -> float:
    """Return images/s of the training steps of a short run."""
    _, task, optim = setup_of(path, preset)
    torch.manual_seed(0)
    unet = UNet(UNET_PRESETS[preset], out_channels=3)
    loader_rate(task, 0)
    folder.mkdir()
    run = Trainer(
        unet, task, optim, folder=folder, device=torch.device("cpu"), progress=SilentProgress()
    )
    began = time.perf_counter()
    run.run("bench")
    return STEPS * BATCH / (time.perf_counter() - began)


def report(name: str, values: list[float]) -> float:
    """Print minimum, median and maximum; return the median."""
    median = statistics.median(values)
    print(f"  {name:34s} {min(values):10.1f} {median:10.1f} {max(values):10.1f}", flush=True)
    return median


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", type=int, default=128, help="side of the tiles in px")
    parser.add_argument("--preset", default="tiny", choices=tuple(UNET_PRESETS))
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        path = Path(name, "s.zarr")
        write_store(path, options.size)
        print(f"{options.preset}, {options.size} px, batches of {BATCH}, images/s: min median max")
        disk, cache = [], []
        for _ in range(ROUNDS):
            task = setup_of(path, options.preset)[1]
            disk.append(loader_rate(task, 0))
            cache.append(loader_rate(task, NUM_TILES // BATCH))
        slowest = report("loader, from disk", disk)
        report("loader, from its cache", cache)
        steps = [step_rate(path, options.preset, Path(name, str(i))) for i in range(ROUNDS)]
        step = report("training step", steps)
        print(f"  the loader gives {slowest / step:.1f} times what a step takes, from disk")


if __name__ == "__main__":
    main()
