"""Tile stores to a pretrained network: denoising diffusion on unlabelled tissue."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch

from wsiseg.config import result_settings, to_dict
from wsiseg.models.checkpoint import load_checkpoint, save_checkpoint
from wsiseg.models.device import resolve_device
from wsiseg.models.diffusion import Diffusion
from wsiseg.models.inputs import from_network
from wsiseg.models.unet import UNet
from wsiseg.progress import Progress, SilentProgress
from wsiseg.runinfo import RunInfo
from wsiseg.settings.training import PretrainConfig
from wsiseg.store.tiles import TileStore
from wsiseg.training.curves import image_grid, write_image
from wsiseg.training.data import split_tiles
from wsiseg.training.loop import Trainer, TrainResult
from wsiseg.training.ranks import ALONE, Ranks, joined
from wsiseg.training.runs import draw_run, open_run, open_stores, store_inputs
from wsiseg.training.tasks import SAMPLES, DenoiseTask, Setup, torch_generator

SAMPLE_GRID = 3
"""The grid of samples is 3 x 3 tiles."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PretrainSummary:
    """What came of it. `val_loss` : of the averaged weights on the held-out patients."""

    output: str
    steps: int
    train_tiles: int
    val_tiles: int
    parameters: int
    val_loss: float | None
    stopped_early: bool
    skipped_steps: int
    device: str
    seconds: float
    note: str = ""


def run(
    config: PretrainConfig,
    *,
    stores: Sequence[Path],
    output: Path,
    overwrite: bool = False,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> PretrainSummary:
    """Pretrain on the tiles of `stores` into the run folder `output`, going on where it stopped.

    Raises
    ------
    StoreError
        A store cannot be used, or they do not fit each other.
    OutputExistsError
        `output` holds a run of other settings or tiles.
    TrainingDivergedError
        Too many steps were not finite.
    """
    began = time.perf_counter()
    device = ranks.device(resolve_device(config.device))
    tiles = open_stores(stores)
    tiles[0].check_halvable(config.model.divisor)
    train, val = split_tiles(
        tiles, val_fraction=config.val_fraction, seed=config.seed, labelled_only=False
    )
    info = RunInfo.of("pretrain", result_settings(config), store_inputs(tiles), seed=config.seed)
    with (
        joined(ranks, device),
        open_run(
            output, info, config, section="pretrain", overwrite=overwrite, ranks=ranks
        ) as folder,
    ):
        torch.manual_seed(config.seed)
        unet = UNet(config.model, out_channels=3)
        diffusion = Diffusion(config.diffusion)
        if not folder.is_finished:
            setup = Setup(train, val, config.optim, config.augment, device, config.seed, ranks)
            task = DenoiseTask(setup, diffusion)
            trainer = Trainer(
                unet, task, config.optim,
                folder=output, device=device, progress=progress or SilentProgress(),
                ranks=ranks,
            )  # fmt: skip
            result = trainer.run("pretrain")
            if ranks.is_first:
                unet.load_state_dict(result.ema)
                _write_samples(unet, diffusion, config, tiles[0], output, result, device)
                draw_run(output, title="diffusion pretraining")
                save_checkpoint(
                    output,
                    kind="pretrain",
                    unet_config=config.model,
                    out_channels=3,
                    state=result.ema,
                    mpp=tiles[0].raster.mpp,
                    tile_size_px=tiles[0].tile_size_px,
                    timestep=0,
                    classes=None,
                    diffusion=to_dict(config.diffusion),
                    metrics=_metrics(result),
                    run=info,
                )
            ranks.from_first(0)  # the others wait for the files
        metrics = load_checkpoint(output, kind="pretrain").metrics
    return PretrainSummary(
        output=str(output),
        steps=metrics["steps"],
        train_tiles=len(train),
        val_tiles=len(val),
        parameters=sum(p.numel() for p in unet.parameters()),
        val_loss=metrics.get("loss"),
        stopped_early=metrics["stopped_early"],
        skipped_steps=metrics["skipped_steps"],
        device=str(device),
        seconds=round(time.perf_counter() - began, 2),
        note="already done" if folder.is_finished else "",
    )


def _metrics(result: TrainResult) -> dict[str, object]:
    return {
        **result.metrics,
        "steps": result.steps,
        "stopped_early": result.is_stopped_early,
        "skipped_steps": result.num_bad_steps,
    }


@torch.inference_mode()
def _write_samples(
    unet: UNet,
    diffusion: Diffusion,
    config: PretrainConfig,
    store: TileStore,
    output: Path,
    result: TrainResult,
    device: torch.device,
) -> None:
    """Let the averaged network dream up tissue: DDIM from fixed noise."""
    size = store.tile_size_px
    generator = torch_generator(config.seed, result.steps, SAMPLES)
    x = diffusion.to(device).ddim_sample(
        unet.eval(), (SAMPLE_GRID**2, 3, size, size), config.sample_steps, generator
    )
    grid = image_grid(from_network(x).cpu().numpy(), SAMPLE_GRID)
    write_image(output / "samples" / f"step-{result.steps:08d}.png", grid)
