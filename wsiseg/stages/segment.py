"""Slide and segmenter to slide mask."""

import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from wsiseg.config import result_settings
from wsiseg.errors import ConfigError, NoTissueError
from wsiseg.grid import TileGrid
from wsiseg.inference.engine import Engine
from wsiseg.inference.meter import Use, total
from wsiseg.inference.overlay import write_overlay
from wsiseg.inference.predict import predict_slide
from wsiseg.inference.survey import survey_mask
from wsiseg.models.checkpoint import SegmenterCheckpoint, load_checkpoint
from wsiseg.models.device import resolve_device
from wsiseg.outputs import output_lock
from wsiseg.progress import Progress, SilentProgress
from wsiseg.runinfo import RunInfo, fingerprint_file
from wsiseg.settings.segment import SegmentConfig
from wsiseg.slides.cohort import CohortEntry
from wsiseg.slides.probe import fingerprint_slide, probe_slide
from wsiseg.slides.reader import Slide, open_slide
from wsiseg.slides.tissue import TissueMask, make_tissue_mask
from wsiseg.store.masks import SlideMask
from wsiseg.vector.outline import read_outline

TISSUE_MARGIN_UM = 8.0
"""Predicted around the tissue that was found: a pale rim, which the mask may have missed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentSummary:
    """What came of one slide.

    `seam_score` : see `wsiseg.inference.survey.Survey`. `network_waits` : share of the time from
    the first window to the last in which the network had nothing to do; None if nothing was left
    to predict.
    """

    slide_id: str
    mpp: float
    windows: int
    area_um2: dict[str, float]
    seam_score: float | None
    network_waits: float | None
    seconds: float
    output: str
    note: str = ""


def run(
    config: SegmentConfig,
    *,
    entry: CohortEntry,
    model: Path,
    output: Path,
    overlay: Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> SegmentSummary:
    """Segment one slide into the mask store `output`; a finished one of the same run is kept.

    Parameters
    ----------
    model
        Run folder of `finetune`. Resolution, window size and classes come from it.
    overlay
        PNG of the slide with the mask over it, or None.

    Raises
    ------
    SlideError
        The slide cannot be opened or read, has no mpp or no tissue.
    CheckpointError
        `model` is not a segmenter.
    OutputExistsError
        `output` holds a mask made from other inputs or settings.
    """
    began = time.perf_counter()
    slide_mpp = entry.mpp or config.slide_mpp
    # First of all: what is no file, or ends the process that reads it, must not be read here.
    probe_slide(entry.path, slide_id=entry.slide_id, slide_mpp=slide_mpp)
    checkpoint = load_checkpoint(model, kind="segmenter")
    uses: list[Use] = []
    with open_slide(entry.path, slide_id=entry.slide_id, slide_mpp=slide_mpp) as slide:
        info = _run_info(config, entry, checkpoint.digest)
        tissue = _tissue(slide, config)
        windows = _windows(slide, config, checkpoint, tissue)
        is_finished = not overwrite and SlideMask.is_finished(output, info)
        if not is_finished:
            with SlideMask.create(
                output,
                raster=windows.raster,
                slide=slide.meta.to_dict(),
                classes=checkpoint.classes,
                run=info,
                model_digest=checkpoint.digest,
                with_probability=config.probabilities,
                chunk_px=config.chunk,
                overwrite=overwrite,
            ) as writer:
                uses = predict_slide(
                    slide, _engine(config, checkpoint), writer, windows,
                    tissue=tissue, progress=progress or SilentProgress(),
                )  # fmt: skip
                if overlay is not None:
                    overlay.unlink(missing_ok=True)  # an old one must not outlive its mask
                writer.finish()
        mask = SlideMask.open(output)
        survey = survey_mask(mask, windows)
        if overlay is not None:
            with output_lock(overlay):
                if not (is_finished and overlay.exists()):
                    write_overlay(slide, mask, overlay, area_um2=survey.area_um2)
    return SegmentSummary(
        slide_id=entry.slide_id,
        mpp=round(windows.raster.mpp, 4),
        windows=len(windows),
        area_um2=survey.area_um2,
        seam_score=survey.seam_score,
        network_waits=round(total(uses).waiting, 4) if uses else None,
        seconds=round(time.perf_counter() - began, 2),
        output=str(output),
        note="already done" if is_finished else "",
    )


def _engine(config: SegmentConfig, checkpoint: SegmenterCheckpoint) -> Engine:
    return Engine(
        checkpoint.build(),
        resolve_device(config.device),
        batch_size=config.batch_size,
        num_readers=config.num_workers,
        amp=config.amp,
        tta=config.tta,
        lanes=config.lanes,
    )


def _run_info(config: SegmentConfig, entry: CohortEntry, digest: str) -> RunInfo:
    slide = fingerprint_slide(entry.path, slide_id=entry.slide_id)
    inputs = {"slide": slide, "model": digest}
    annotation = config.tissue.annotation
    if annotation is not None and annotation.exists():
        inputs["tissue"] = fingerprint_file(annotation)
    settings = result_settings(config)
    # Paths name files whose content is in `inputs`; the name itself may hold a patient's.
    settings["tissue"]["annotation"] = None
    settings["slide_mpp"] = entry.mpp or config.slide_mpp
    return RunInfo.of("segment", settings, inputs)


def _tissue(slide: Slide, config: SegmentConfig) -> TissueMask:
    outline = read_outline(
        config.tissue.annotation, slide_id=slide.meta.slide_id, bounds=slide.meta.bounds
    )
    tissue = make_tissue_mask(slide, config.tissue, outline=outline)
    return tissue.grown(TISSUE_MARGIN_UM) if config.tissue.method != "annotation" else tissue


def _windows(
    slide: Slide, config: SegmentConfig, checkpoint: SegmenterCheckpoint, tissue: TissueMask
) -> TileGrid:
    """Return the windows that hold tissue, at the model's resolution."""
    size_px = config.window or checkpoint.tile_size_px
    divisor = checkpoint.unet_config.divisor
    if size_px % divisor:
        msg = f"window: {size_px} px is no multiple of {divisor}, which this model needs"
        raise ConfigError(msg)
    raster = slide.meta.raster(checkpoint.mpp)
    grid = TileGrid.covering(raster, tile_size_px=size_px, overlap_px=int(size_px * config.overlap))
    keep = tissue.fractions(grid) > config.min_tissue
    if not keep.any():
        msg = (
            f"slide '{slide.meta.slide_id}': no window has more than {config.min_tissue:.0%} "
            "tissue; lower --min-tissue or choose another --tissue method"
        )
        raise NoTissueError(msg)
    return grid.select(np.asarray(keep))
