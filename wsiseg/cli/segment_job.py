"""One slide through segment and then export: what `wsiseg segment` does for each slide."""

import dataclasses
import os
import time
from pathlib import Path

from wsiseg.errors import OutputExistsError
from wsiseg.outputs import check_not_read, explaining
from wsiseg.progress import Progress
from wsiseg.settings.export import ExportConfig, ExtraOutputs, beside_geojson
from wsiseg.settings.segment import SegmentConfig
from wsiseg.slides.cohort import CohortEntry
from wsiseg.stages import export, segment


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SegmentJob:
    """One slide to segment; sent to a worker as it is."""

    entry: CohortEntry
    config: SegmentConfig
    export: ExportConfig
    extra: ExtraOutputs
    model: Path
    geojson: Path
    overwrite: bool = False

    @property
    def mask(self) -> Path:
        """The slide mask beside the GeoJSON."""
        return beside_geojson(self.geojson, ".mask.zarr")

    @property
    def overlay(self) -> Path:
        """The overlay picture beside the GeoJSON; a slide that has its name keeps it."""
        path = beside_geojson(self.geojson, ".png")
        is_slide = os.path.realpath(path) == os.path.realpath(self.entry.path)
        return beside_geojson(self.geojson, ".overlay.png") if is_slide else path


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class SlideResult:
    """What came of one slide."""

    slide_id: str
    features: int
    vertices: int
    geojson_mb: float
    area_mm2: dict[str, float]
    seam_score: float | None
    network_waits: float | None
    seconds: float
    output: str
    note: str = ""


def run(job: SegmentJob, *, progress: Progress | None = None) -> SlideResult:
    """Segment one slide and write its GeoJSON; each part that is finished already is kept."""
    began = time.perf_counter()
    with explaining(job.geojson):
        _check_outputs(job)
    segmented = segment.run(
        job.config,
        entry=job.entry,
        model=job.model,
        output=job.mask,
        overlay=job.overlay,
        overwrite=job.overwrite,
        progress=progress,
    )
    exported = export.run(
        job.export,
        mask=job.mask,
        output=job.geojson,
        extra=job.extra,
        overwrite=True,
        progress=progress,
    )
    return SlideResult(
        slide_id=job.entry.slide_id,
        features=exported.features,
        vertices=exported.vertices,
        geojson_mb=exported.mb,
        area_mm2={k: round(v / 1e6, 4) for k, v in segmented.area_um2.items()},
        seam_score=segmented.seam_score,
        network_waits=segmented.network_waits,
        seconds=round(time.perf_counter() - began, 2),
        output=str(job.geojson),
        note="; ".join(filter(None, (segmented.note, exported.note))),
    )


LOWERED = "half of --batch-size on a GPU, one window at a time on a CPU"
"""What a job `with_less_memory` has less of."""


def with_less_memory(job: SegmentJob) -> SegmentJob:
    """Return the job with less of what takes memory and changes no result."""
    config = dataclasses.replace(job.config, batch_size=max(1, job.config.batch_size // 2), lanes=1)
    return dataclasses.replace(job, config=config)


def _check_outputs(job: SegmentJob) -> None:
    """Refuse, before the work begins, to replace the slide or a file that is not ours."""
    for path in (job.geojson, job.mask, job.overlay, *job.extra.paths(job.geojson)):
        check_not_read(path, job.entry.path)
    if job.overwrite:
        return
    export.check_replaceable(job.geojson, job.extra)
    if job.overlay.exists() and not job.mask.exists():
        msg = (
            f"output '{job.overlay}' exists without the '{job.mask.name}' that it would belong "
            "to; choose another or pass --overwrite"
        )
        raise OutputExistsError(msg)
