"""Labelled tiles and a pretrained network to a segmenter."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from wsiseg.classes import ClassTable
from wsiseg.config import result_settings
from wsiseg.errors import CheckpointError, ConfigError, StoreError
from wsiseg.geometry import is_same_mpp
from wsiseg.models.checkpoint import PretrainCheckpoint, load_checkpoint, save_checkpoint
from wsiseg.models.device import resolve_device
from wsiseg.models.inputs import to_network
from wsiseg.models.segmenter import Segmenter
from wsiseg.models.unet import UNet
from wsiseg.progress import Progress, SilentProgress
from wsiseg.runinfo import RunInfo
from wsiseg.settings.model import UNetConfig
from wsiseg.settings.training import FinetuneConfig
from wsiseg.store.tiles import TileStore
from wsiseg.training.curves import image_grid, paint_labels, write_image
from wsiseg.training.data import TileSet, split_tiles
from wsiseg.training.loop import Trainer
from wsiseg.training.losses import SegmentationLoss
from wsiseg.training.ranks import ALONE, Ranks, joined
from wsiseg.training.runs import draw_run, open_run, open_stores, store_inputs
from wsiseg.training.tasks import SegmentTask, Setup

SHOWN_TILES = 6
"""Rows of the picture of image, truth and prediction."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FinetuneSummary:
    """What came of it. `dice` : mean over classes of the best validation, at `best_step`."""

    output: str
    steps: int
    best_step: int
    train_tiles: int
    val_tiles: int
    parameters: int
    dice: float | None
    stopped_early: bool
    skipped_steps: int
    device: str
    seconds: float
    note: str = ""


def run(
    config: FinetuneConfig,
    *,
    stores: Sequence[Path],
    output: Path,
    pretrained: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    ranks: Ranks = ALONE,
) -> FinetuneSummary:
    """Fine-tune on the labelled tiles of `stores` into the run folder `output`.

    The checkpoint holds the averaged weights of the best validation.

    Parameters
    ----------
    pretrained
        Run folder of `pretrain`; None starts from random weights.

    Raises
    ------
    StoreError
        No store has labels, or the stores do not fit each other or the pretrained network.
    CheckpointError
        `pretrained` is not a pretraining run.
    OutputExistsError
        `output` holds a run of other settings or tiles.
    """
    began = time.perf_counter()
    device = ranks.device(resolve_device(config.device))
    tiles = open_stores(stores)
    classes = _classes(tiles)
    checkpoint = None if pretrained is None else load_checkpoint(pretrained, kind="pretrain")
    unet_config = _network(config, checkpoint, tiles[0])
    train, val = split_tiles(
        tiles, val_fraction=config.val_fraction, seed=config.seed, labelled_only=True
    )
    inputs = store_inputs(tiles) | ({"pretrained": checkpoint.digest} if checkpoint else {})
    info = RunInfo.of("finetune", result_settings(config), inputs, seed=config.seed)
    with (
        joined(ranks, device),
        open_run(
            output, info, config, section="finetune", overwrite=overwrite, ranks=ranks
        ) as folder,
    ):
        torch.manual_seed(config.seed)
        model = Segmenter(
            UNet(unet_config, out_channels=classes.num_labels), classes, config.timestep
        )
        if checkpoint is not None:
            model.transfer_from_pretrained(checkpoint.state_dict)
        if not folder.is_finished:
            setup = Setup(train, val, config.optim, config.augment, device, config.seed, ranks)
            loss = SegmentationLoss(config.loss, classes.num_labels)
            trainer = Trainer(
                model, SegmentTask(setup, loss, classes), config.optim,
                folder=output, device=device, progress=progress or SilentProgress(),
                ranks=ranks,
            )  # fmt: skip
            result = trainer.run("finetune")
            if ranks.is_first:
                model.load_state_dict(result.best)
                _write_examples(model, val if len(val) else train, classes, output, device)
                draw_run(output, title="fine-tuning")
                save_checkpoint(
                    output,
                    kind="segmenter",
                    unet_config=unet_config,
                    out_channels=classes.num_labels,
                    state=result.best,
                    mpp=tiles[0].raster.mpp,
                    tile_size_px=tiles[0].tile_size_px,
                    timestep=config.timestep,
                    classes=classes,
                    diffusion=None,
                    metrics={
                        "dice": result.best_metric,
                        "best_step": result.best_step,
                        "steps": result.steps,
                        "stopped_early": result.is_stopped_early,
                        "skipped_steps": result.num_bad_steps,
                    },
                    run=info,
                )
            ranks.from_first(0)  # the others wait for the files
        metrics = load_checkpoint(output, kind="segmenter").metrics
    return FinetuneSummary(
        output=str(output),
        steps=metrics["steps"],
        best_step=metrics["best_step"],
        train_tiles=len(train),
        val_tiles=len(val),
        parameters=sum(p.numel() for p in model.parameters()),
        dice=metrics["dice"],
        stopped_early=metrics["stopped_early"],
        skipped_steps=metrics["skipped_steps"],
        device=str(device),
        seconds=round(time.perf_counter() - began, 2),
        note="already done" if folder.is_finished else "",
    )


def _classes(stores: Sequence[TileStore]) -> ClassTable:
    labelled = [store for store in stores if store.num_labelled_tiles and store.classes]
    if not labelled:
        names = ", ".join(store.slide_id for store in stores[:3])
        msg = f"no tile of {names} has a label; tile with --annotations or --labels to fine-tune"
        raise StoreError(msg)
    classes = labelled[0].classes
    assert classes is not None
    return classes


def _network(
    config: FinetuneConfig, checkpoint: PretrainCheckpoint | None, store: TileStore
) -> UNetConfig:
    """Return the architecture, checked against the tiles."""
    if checkpoint is None:
        unet_config = config.model or UNetConfig()
    else:
        unet_config = checkpoint.unet_config
        if config.model not in (None, unet_config):
            msg = "model: the pretrained network settles it; leave it out or use --from-scratch"
            raise ConfigError(msg)
        if not is_same_mpp(store.raster.mpp, checkpoint.mpp):
            msg = (
                f"the tiles are at {store.raster.mpp:.4g} um/px, the network was pretrained at "
                f"{checkpoint.mpp:.4g}; tile with --mpp {checkpoint.mpp:.4g}"
            )
            raise CheckpointError(msg)
    store.check_halvable(unet_config.divisor)
    return unet_config


@torch.inference_mode()
def _write_examples(
    model: Segmenter, tiles: TileSet, classes: ClassTable, output: Path, device: torch.device
) -> None:
    """Write rows of image, truth and prediction of tiles spread over the validation set."""
    chosen = np.unique(np.linspace(0, len(tiles) - 1, SHOWN_TILES).round().astype(np.int64))
    shown = tiles.read(chosen)
    model.eval()
    guesses = [
        model(to_network(torch.from_numpy(image[None]).to(device))).argmax(dim=1).cpu().numpy()[0]
        for image in shown.images
    ]
    columns = [
        shown.images,
        paint_labels(shown.images, shown.labels, classes),
        paint_labels(shown.images, np.stack(guesses).astype(np.uint8), classes),
    ]
    rows = np.stack(columns, axis=1).reshape(-1, *shown.images.shape[1:])
    write_image(output / "samples" / "validation.png", image_grid(rows, 3))
