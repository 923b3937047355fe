"""The whole pipeline on built-in slides, in minutes: what `wsiseg demo` and `make demo` run.

Four synthetic slides whose truth is known exactly: three to learn from, two of them annotated in a
small region, and one to segment. Every stage is the real one, called as the command line calls it.
"""

import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from wsiseg.classes import ClassTable, TissueClass
from wsiseg.geometry import Box, Raster
from wsiseg.outputs import atomic_file, write_json, write_text
from wsiseg.progress import Progress
from wsiseg.settings.evaluate import EvaluateConfig
from wsiseg.settings.export import ExportConfig
from wsiseg.settings.model import UNET_PRESETS
from wsiseg.settings.segment import SegmentConfig
from wsiseg.settings.tile import TileConfig
from wsiseg.settings.training import AugmentConfig, FinetuneConfig, OptimConfig, PretrainConfig
from wsiseg.slides.cohort import CohortEntry
from wsiseg.stages import evaluate, export, finetune, pretrain, segment, tile
from wsiseg.store.masks import SlideMask
from wsiseg.synthetic import GLAND, SyntheticTissue, write_slide
from wsiseg.vector.qupath import write_geojson
from wsiseg.vector.trace import source_of_array

SIDE_PX = 3072
"""Side of a slide at 0.5 um/px: some thirty glands."""

ANNOTATED_PX = 1536
"""Side of the annotated region: a quarter of each annotated slide, glass included."""

WORKING_MPP = 2.0
"""A gland of 80 um fits in a tile of 64 px, which two cores can learn from in minutes."""

TILE_PX = 64
PRETRAIN_STEPS, FINETUNE_STEPS = 300, 150

REGION = "Region"
CLASSES = ClassTable((TissueClass(1, "Gland", (200, 0, 120)),), roi=REGION)
ANNOTATED = ClassTable((*CLASSES.classes, TissueClass(2, REGION, (80, 80, 80))))
"""What an annotator draws: glands, and the region in which all of them were drawn."""

TARGET = "test"

README = """\
What `wsiseg demo` made
=======================
{target}.tiff            the slide that was segmented (synthetic; OpenSlide and QuPath open it)
{target}.geojson         the glands found: drag it onto the slide in QuPath
{target}-truth.geojson   the glands that are really there
{target}.png             the slide with what was found over it
curves-pretrain.png      loss of the diffusion pretraining
curves-finetune.png      loss and validation Dice of the fine-tuning
samples.png              what the pretrained network paints; after so few steps stained noise
metrics.json             every figure
work/                    slides, annotations, tile stores, run folders, the slide mask
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoResult:
    """The closing table, and how long each stage took."""

    rows: list[dict[str, Any]]
    seconds: dict[str, float]

    @property
    def beats_trivial(self) -> bool:
        """Whether the segmentation has a higher Dice than both trivial answers."""
        ours, *trivial = (row["dice"] for row in self.rows)
        return ours is not None and all(ours > dice for dice in trivial)


@dataclass(frozen=True, slots=True)
class _Case:
    """One slide of the demo. `split` is what it serves for; a None learns without labels."""

    slide_id: str
    seed: int
    split: str
    is_annotated: bool

    @property
    def tissue(self) -> SyntheticTissue:
        return SyntheticTissue(width_px=SIDE_PX, height_px=SIDE_PX, seed=self.seed)


CASES = (
    _Case("train-a", 1, "train", is_annotated=True),
    _Case("train-b", 2, "val", is_annotated=True),
    _Case("train-c", 3, "train", is_annotated=False),
    _Case(TARGET, 4, "test", is_annotated=False),
)


def run(output: Path, *, progress: Progress, say: Callable[[str], None]) -> DemoResult:
    """Run every stage into `output`; stages that are done already are kept.

    `say` is told what begins.
    """
    seconds: dict[str, float] = {}
    work = output / "work"

    def stage(name: str, what: str, function: Callable[[], Any]) -> Any:  # noqa: ANN401
        say(f"{name}: {what}")
        began = time.perf_counter()
        result = function()
        seconds[name] = round(time.perf_counter() - began, 1)
        return result

    stage("slides", "four synthetic slides", lambda: _make_slides(work))
    stage("tile", "tissue tiles into zarr stores", lambda: _tile(work, progress))
    stores = [work / "tiles" / f"{case.slide_id}.zarr" for case in CASES if case.split != "test"]
    stage(
        "pretrain",
        f"{PRETRAIN_STEPS} steps of denoising diffusion, no labels",
        lambda: pretrain.run(
            _pretrain_config(), stores=stores, output=work / "pretrain", progress=progress
        ),
    )
    stage(
        "finetune",
        f"{FINETUNE_STEPS} steps on the annotated regions of two slides",
        lambda: finetune.run(
            _finetune_config(),
            stores=[work / "tiles" / f"{c.slide_id}.zarr" for c in CASES if c.is_annotated],
            output=work / "finetune",
            pretrained=work / "pretrain",
            progress=progress,
        ),
    )
    stage("segment", "the test slide", lambda: _segment(work, output, progress))
    stage("export", "polygons for QuPath", lambda: _export(work, output))
    rows = stage("evaluate", "against the exact truth", lambda: _evaluate(work, output))
    _lay_out(work, output)
    result = DemoResult(rows=rows, seconds=seconds)
    write_json(output / "metrics.json", {"schema_version": 1, "results": rows, "seconds": seconds})
    return result


def _make_slides(work: Path) -> None:
    for case in CASES:
        path = work / "slides" / f"{case.slide_id}.tiff"
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            with atomic_file(path) as temporary:
                write_slide(temporary, case.tissue)
        if case.is_annotated:
            _write_annotation(case, work / "annotations" / f"{case.slide_id}.geojson")


def _write_annotation(case: _Case, path: Path) -> None:
    """Write what an annotator would: the glands of the left middle of the slide, and its frame."""
    box = Box(0, (SIDE_PX - ANNOTATED_PX) // 2, ANNOTATED_PX, ANNOTATED_PX)
    _, labels = case.tissue.region(box)
    drawn = np.zeros((SIDE_PX, SIDE_PX), np.uint8)
    drawn[box.y : box.bottom, box.x : box.right] = np.where(labels == GLAND, 1, 2)
    _write_polygons(path, drawn, ANNOTATED, case)


def _write_polygons(path: Path, labels: Any, classes: ClassTable, case: _Case) -> None:  # noqa: ANN401
    path.parent.mkdir(parents=True, exist_ok=True)
    mpp = case.tissue.mpp
    write_geojson(
        path,
        source_of_array(labels),
        raster=Raster(SIDE_PX, SIDE_PX, mpp, mpp, 1.0, 1.0),
        classes=classes,
        slide={"slide_id": case.slide_id, "bounds": None},
        provenance={"source": "synthetic", "seed": case.seed},
        config=ExportConfig(locked=False),
    )


def _tile(work: Path, progress: Progress) -> None:
    for case in CASES:
        if case.split == "test":
            continue
        annotation = work / "annotations" / f"{case.slide_id}.geojson"
        job = tile.TileJob(
            entry=CohortEntry(
                slide_id=case.slide_id,
                patient_id=case.slide_id,
                path=work / "slides" / f"{case.slide_id}.tiff",
                split=case.split,
            ),
            config=TileConfig(mpp=WORKING_MPP, tile_size=TILE_PX),
            output=work / "tiles" / f"{case.slide_id}.zarr",
            annotation=annotation if case.is_annotated else None,
            classes=CLASSES if case.is_annotated else None,
        )
        tile.run(job, progress=progress)


def _pretrain_config() -> PretrainConfig:
    return PretrainConfig(
        model=UNET_PRESETS["tiny"],
        optim=_optim_config(PRETRAIN_STEPS, num_validations=2),
        sample_steps=25,
    )


def _finetune_config() -> FinetuneConfig:
    return FinetuneConfig(
        optim=_optim_config(FINETUNE_STEPS, num_validations=4),
        augment=AugmentConfig(blur_probability=0.0),
    )


def _optim_config(steps: int, *, num_validations: int) -> OptimConfig:
    """Return a loop of so few steps that rates and averages must be quick."""
    return OptimConfig(
        steps=steps,
        batch_size=8,
        learning_rate=1e-3,
        warmup_steps=10,
        ema_decay=0.95,
        validate_every=steps // num_validations,
        save_every=steps // 2,
    )


def _segment(work: Path, output: Path, progress: Progress) -> None:
    slide = work / "slides" / f"{TARGET}.tiff"
    segment.run(
        SegmentConfig(),
        entry=CohortEntry(slide_id=TARGET, patient_id=TARGET, path=slide),
        model=work / "finetune",
        output=work / f"{TARGET}.mask.zarr",
        overlay=output / f"{TARGET}.png",
        progress=progress,
    )


def _export(work: Path, output: Path) -> None:
    export.run(
        ExportConfig(),
        mask=work / f"{TARGET}.mask.zarr",
        output=output / f"{TARGET}.geojson",
        overwrite=True,
    )
    case = next(case for case in CASES if case.slide_id == TARGET)
    _, labels = case.tissue.region(Box(0, 0, SIDE_PX, SIDE_PX))
    _write_polygons(output / f"{TARGET}-truth.geojson", labels, CLASSES, case)


def _evaluate(work: Path, output: Path) -> list[dict[str, Any]]:
    """Return the rows of the closing table: ours first, then the trivial answers."""
    mask_path = work / f"{TARGET}.mask.zarr"
    result = evaluate.run(
        EvaluateConfig(bootstrap=0),
        prediction=mask_path,
        truth=output / f"{TARGET}-truth.geojson",
        output=None,
    )
    scores = result["pooled"]["classes"]["Gland"]
    mask = SlideMask.open(mask_path)
    tissue = mask.read(mask.raster.box) != 255
    case = next(case for case in CASES if case.slide_id == TARGET)
    _, truth = case.tissue.region(Box(0, 0, SIDE_PX, SIDE_PX))
    truth_share = float((truth == GLAND).mean())
    tissue_share = float(tissue.mean())
    return [
        {"answer": "wsiseg", "dice": scores["dice"], "iou": scores["iou"]},
        {"answer": "all background", "dice": 0.0, "iou": 0.0},
        _all_foreground("all foreground (the tissue)", truth_share, tissue_share),
        _all_foreground("all foreground (the slide)", truth_share, 1.0),
    ]


def _all_foreground(answer: str, truth_share: float, answer_share: float) -> dict[str, Any]:
    """Score the answer "gland" for an area that holds all of the truth; shares of the slide."""
    return {
        "answer": answer,
        "dice": 2 * truth_share / (truth_share + answer_share),
        "iou": truth_share / answer_share,
    }


def _lay_out(work: Path, output: Path) -> None:
    """Put what a person wants to look at beside the GeoJSON."""
    newest = max((work / "pretrain" / "samples").glob("*.png"))
    for source, name in (
        (work / "slides" / f"{TARGET}.tiff", f"{TARGET}.tiff"),
        (work / "pretrain" / "curves.png", "curves-pretrain.png"),
        (work / "finetune" / "curves.png", "curves-finetune.png"),
        (newest, "samples.png"),
    ):
        with atomic_file(output / name) as temporary:
            shutil.copyfile(source, temporary)
    write_text(output / "README.txt", README.format(target=TARGET))
