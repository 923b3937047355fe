"""What does pretraining buy? Gland segmentation with few labels, with and without it.

    python pipelines/label_efficiency.py ../shared/data/ebhi_seg -o runs/label-efficiency

The folder has images/, masks/ of the same names and index.csv (name, case_id, split). Networks are
pretrained on all training images without their labels, then fine-tuned on a share of the training
cases; the same network, steps, cases and augmentations from random weights are the baseline. All
are judged on the test images, none of whose cases was seen.

Every part that is finished is kept: run the same command again after an interruption. Results are
in OUTPUT/table.md, curve.png and results.json. To see what a time step or a budget does, give it
an OUTPUT of its own (with a copy of tiles/ and pretrain/, where they stay as they were).
"""

import argparse
import csv
import json
import multiprocessing
import os
import random
import sys
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from label_efficiency_report import write_report

from wsiseg.classes import ClassTable
from wsiseg.config import to_dict
from wsiseg.models.checkpoint import load_checkpoint
from wsiseg.models.inputs import to_network
from wsiseg.outputs import write_json
from wsiseg.settings.model import UNET_PRESETS, DiffusionConfig, UNetConfig
from wsiseg.settings.tile import TileConfig, TissueConfig
from wsiseg.settings.training import (
    AugmentConfig,
    FinetuneConfig,
    LossConfig,
    OptimConfig,
    PretrainConfig,
)
from wsiseg.slides.cohort import CohortEntry
from wsiseg.stages import finetune as finetune_stage
from wsiseg.stages import pretrain as pretrain_stage
from wsiseg.stages import tile as tile_stage
from wsiseg.store.tiles import TileStore
from wsiseg.training.confusion import confusion_matrix
from wsiseg.training.distances import hausdorff_95

FRACTIONS = (5, 10, 25, 50, 100)
"""Per cent of the training cases whose labels are used."""

NOMINAL_MPP = 1.0
"""The images state no resolution: a "um" of this study is one of their pixels."""

CLASSES = ClassTable.of_names(["Gland"])

OBJECTIVES = {"noise": "noise", "masked": "masked", "autoencoding": "autoencoding"}
"""Objective of the pretraining of each arm; 'scratch' has none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Preset:
    """Sizes of a study. `mpp` : image pixels per network pixel along a side."""

    mpp: float
    tile_size: int
    network: UNetConfig
    pretrain_steps: int
    finetune_steps: int
    batch_size: int
    pretrain_rate: float
    finetune_rate: float


PRESETS = {
    "smoke": Preset(
        mpp=4.0, tile_size=56, network=UNET_PRESETS["tiny"], pretrain_steps=4, finetune_steps=4,
        batch_size=4, pretrain_rate=1e-3, finetune_rate=1e-3,
    ),
    "cpu": Preset(
        mpp=2.0, tile_size=112, network=UNET_PRESETS["tiny"], pretrain_steps=1200,
        finetune_steps=150, batch_size=8, pretrain_rate=1e-3, finetune_rate=1e-3,
    ),
    "gpu": Preset(
        mpp=1.0, tile_size=224, network=UNET_PRESETS["base"], pretrain_steps=20_000,
        finetune_steps=2_000, batch_size=16, pretrain_rate=2e-4, finetune_rate=2e-4,
    ),
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Image:
    """One row of index.csv."""

    name: str
    case_id: str
    split: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Study:
    """What every job needs; sent to its process."""

    data: Path
    output: Path
    preset: Preset
    images: tuple[Image, ...]
    threads: int
    timestep: int

    def of(self, split: str) -> list[Image]:
        """Return the images of a split."""
        return [image for image in self.images if image.split == split]

    def store(self, image: Image) -> Path:
        """Return the tile store of an image."""
        return self.output / "tiles" / f"{image.name}.zarr"


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """One fine-tuning: an arm, a share of the cases, a seed."""

    arm: str
    percent: int
    seed: int

    @property
    def name(self) -> str:
        """Name of its folder."""
        return f"{self.arm}-{self.percent:03d}-{self.seed}"


def read_index(data: Path) -> tuple[Image, ...]:
    """Return the images of a data folder, in the order of their names."""
    path = data / "index.csv"
    if not path.is_file():
        msg = f"'{path}': no such file; the data folder needs images/, masks/ and index.csv"
        raise SystemExit(msg)
    with path.open(newline="", encoding="utf-8") as file:
        rows = [Image(row["name"], row["case_id"], row["split"]) for row in csv.DictReader(file)]
    splits: dict[str, set[str]] = {}
    for row in rows:
        splits.setdefault(row.case_id, set()).add(row.split)
    shared = sorted(case for case, found in splits.items() if len(found) > 1)
    if shared:
        msg = f"'{path}': case {shared[0]} is in the splits {', '.join(sorted(splits[shared[0]]))}"
        raise SystemExit(msg)
    return tuple(sorted(rows, key=lambda row: row.name))


def check_same_study(study: Study) -> None:
    """Keep the settings in OUTPUT/study.json, and refuse to add results of others to it."""
    settings = {"schema_version": 1, "timestep": study.timestep, **to_dict(study.preset)}
    path = study.output / "study.json"
    if not path.exists():
        study.output.mkdir(parents=True, exist_ok=True)
        write_json(path, settings)
        return
    found = json.loads(path.read_text(encoding="utf-8"))
    other = [key for key, value in settings.items() if found.get(key) != value]
    if other:
        changes = "; ".join(f"{key}: {found.get(key)} -> {settings[key]}" for key in other)
        msg = f"'{study.output}' holds a study of other settings ({changes}); choose another output"
        raise SystemExit(msg)


def chosen_cases(images: Sequence[Image], percent: int, seed: int) -> set[str]:
    """Return the training cases whose labels are used; more per cent only ever adds cases."""
    cases = sorted({image.case_id for image in images})
    random.Random(seed).shuffle(cases)
    return set(cases[: max(1, round(len(cases) * percent / 100))])


def tile_image(study: Study, image: Image) -> None:
    """Store an image as one tile with its labels."""
    settings = TileConfig(
        mpp=study.preset.mpp,
        tile_size=study.preset.tile_size,
        slide_mpp=NOMINAL_MPP,
        min_tissue=0.0,
        tissue=TissueConfig(method="none"),
    )
    entry = CohortEntry(
        slide_id=image.name,
        patient_id=image.case_id,
        path=study.data / "images" / f"{image.name}.png",
        split=image.split,
    )
    tile_stage.run(
        tile_stage.TileJob(
            entry=entry,
            config=settings,
            output=study.store(image),
            label_image=study.data / "masks" / f"{image.name}.png",
            classes=CLASSES,
            threads=1,
        )
    )


def _optim(preset: Preset, *, steps: int, rate: float, checks: int) -> OptimConfig:
    return OptimConfig(
        steps=steps,
        batch_size=preset.batch_size,
        learning_rate=rate,
        warmup_steps=min(50, steps // 4),
        ema_decay=0.98 if steps < 1000 else 0.995,
        validate_every=max(1, steps // checks),
        save_every=max(1, steps // 4),
        patience=0,
    )


def pretrain(study: Study, arm: str) -> None:
    """Pretrain the network of an arm on all images of training cases, without their labels."""
    torch.set_num_threads(study.threads)
    preset = study.preset
    settings = PretrainConfig(
        model=preset.network,
        diffusion=DiffusionConfig(objective=OBJECTIVES[arm]),
        optim=_optim(preset, steps=preset.pretrain_steps, rate=preset.pretrain_rate, checks=4),
        sample_steps=25,
    )
    stores = [study.store(image) for image in (*study.of("train"), *study.of("val"))]
    pretrain_stage.run(settings, stores=stores, output=study.output / "pretrain" / arm)


def finetune(study: Study, run: Run) -> None:
    """Fine-tune on the labels of some cases, and write what it makes of the test images."""
    torch.set_num_threads(study.threads)
    result = study.output / "results" / f"{run.name}.json"
    if result.exists():
        return
    preset = study.preset
    cases = chosen_cases(study.of("train"), run.percent, run.seed)
    train = [image for image in study.of("train") if image.case_id in cases]
    settings = FinetuneConfig(
        seed=run.seed,
        timestep=study.timestep,
        val_fraction=0.0,
        model=preset.network if run.arm == "scratch" else None,
        optim=_optim(preset, steps=preset.finetune_steps, rate=preset.finetune_rate, checks=5),
        augment=AugmentConfig(),
        loss=LossConfig(focal=0.0, structural=0.0, cross_entropy=1.0, dice=1.0),
    )
    output = study.output / "finetune" / run.name
    finetune_stage.run(
        settings,
        # No validation set: to choose a step by many labels would not be learning from few.
        stores=[study.store(image) for image in train],
        output=output,
        pretrained=None if run.arm == "scratch" else study.output / "pretrain" / run.arm,
    )
    write_json(result, {"cases": len(cases), "images": len(train), **_test(study, output)})


def _test(study: Study, model: Path) -> dict[str, object]:
    """Return, for each test image, its confusion matrix and HD95 in image pixels."""
    segmenter = load_checkpoint(model, kind="segmenter").build()
    figures: dict[str, object] = {}
    for image in study.of("test"):
        store = TileStore.open(study.store(image))
        pixels, truth = store.read_images([0]), store.read_labels([0])[0]
        with torch.inference_mode():
            guess = segmenter(to_network(torch.from_numpy(pixels))).argmax(dim=1)[0]
        label = guess.numpy().astype(np.uint8)
        spacing = (store.raster.mpp_y, store.raster.mpp_x)
        figures[image.name] = {
            "case": image.case_id,
            "confusion": confusion_matrix(truth, label, CLASSES.num_labels).tolist(),
            "hd95_px": hausdorff_95(truth == 1, label == 1, spacing),
        }
    return {"test": figures}


def _all(pool: ProcessPoolExecutor, function, study: Study, items: Sequence, what: str) -> None:  # noqa: ANN001 - any of the three jobs
    for number, future in enumerate([pool.submit(function, study, item) for item in items], 1):
        future.result()
        if number % 10 == 0 or number == len(items):
            sys.stderr.write(f"{what}: {number}/{len(items)}\n")


def main() -> None:
    """Run the study."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("data", type=Path, help="folder with images/, masks/ and index.csv")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--preset", choices=PRESETS, default="cpu", help="sizes (default: cpu)")
    parser.add_argument("--seeds", type=int, default=3, help="runs of each point (default: 3)")
    parser.add_argument(
        "--arms", nargs="+", choices=OBJECTIVES, default=["noise", "masked"],
        help="pretrainings to hold against random weights (default: noise masked)",
    )  # fmt: skip
    parser.add_argument(
        "--percent", nargs="+", type=int, default=FRACTIONS, help="shares of the training cases"
    )
    parser.add_argument(
        "--timestep", type=int, default=0, help="time step fed downstream (default: 0)"
    )
    parser.add_argument("--pretrain-steps", type=int, help="instead of the preset's")
    parser.add_argument("--finetune-steps", type=int, help="instead of the preset's")
    cores = os.cpu_count() or 1
    parser.add_argument(
        "--jobs", type=int, default=cores, help=f"trainings at a time (default: {cores})"
    )
    given = parser.parse_args()
    preset = PRESETS[given.preset]
    study = Study(
        data=given.data,
        output=given.output,
        preset=replace(
            preset,
            pretrain_steps=given.pretrain_steps or preset.pretrain_steps,
            finetune_steps=given.finetune_steps or preset.finetune_steps,
        ),
        images=read_index(given.data),
        threads=max(1, cores // given.jobs),
        timestep=given.timestep,
    )
    check_same_study(study)
    runs = [
        Run(arm=arm, percent=percent, seed=seed)
        for seed in range(given.seeds)
        for percent in given.percent
        for arm in ("scratch", *given.arms)
    ]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(given.jobs, mp_context=context) as pool:
        _all(pool, tile_image, study, study.images, "tile")
        _all(pool, pretrain, study, given.arms, "pretrain")
        _all(pool, finetune, study, runs, "finetune")
    write_report(given.output, runs)


if __name__ == "__main__":
    main()
