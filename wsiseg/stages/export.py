"""Slide mask to the GeoJSON that QuPath opens."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsiseg.config import digest, result_settings
from wsiseg.errors import OutputExistsError
from wsiseg.geometry import Box
from wsiseg.outputs import output_lock
from wsiseg.progress import Progress, SilentProgress
from wsiseg.runinfo import RunInfo, check_same_run, fingerprint_of
from wsiseg.settings.export import ExportConfig
from wsiseg.store.masks import SlideMask
from wsiseg.vector.qupath import WriteResult, read_provenance, write_geojson
from wsiseg.vector.trace import UInt8, trace_mask


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSummary:
    """What came of one mask. `objects` : "annotation" or "detection"."""

    slide_id: str
    features: int
    vertices: int
    size_bytes: int
    objects: str
    seconds: float
    output: str


def run(
    config: ExportConfig,
    *,
    mask: Path,
    output: Path,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> ExportSummary:
    """Write a slide mask as GeoJSON; the same mask and settings give the same bytes.

    Raises
    ------
    StoreError
        `mask` is not a slide mask, is unfinished or damaged.
    OutputExistsError
        `output` was made from another mask or other settings, or is not ours.
    OutputLockedError
        Another process is writing `output`.
    """
    began = time.perf_counter()
    store = SlideMask.open(mask)
    if output.is_dir():
        msg = f"output '{output}' is a folder; name a .geojson or .geojson.gz file"
        raise OutputExistsError(msg)
    with output_lock(output):
        result = _export(config, store, output, overwrite, progress or SilentProgress())
    return ExportSummary(
        slide_id=store.slide_id,
        features=result.features,
        vertices=result.vertices,
        size_bytes=result.size_bytes,
        objects=result.objects,
        seconds=round(time.perf_counter() - began, 2),
        output=str(output),
    )


def _export(
    config: ExportConfig,
    store: SlideMask,
    output: Path,
    overwrite: bool,
    progress: Progress,
) -> WriteResult:
    info = RunInfo.of(
        "export",
        result_settings(config),
        {"mask": digest(fingerprint_of(store.run)), "model": store.model_digest},
    )
    if output.exists() and not overwrite:
        _check_ours(output, info)
    progress.start(f"{store.slide_id}: export", store.raster.height_px, unit="rows")

    def read_labels(box: Box) -> UInt8:
        progress.advance(box.height)
        return store.read(box)

    def read_probability(box: Box) -> UInt8:
        probability = store.read_probability(box)
        assert probability is not None
        return probability

    result = write_geojson(
        output,
        trace_mask(
            read_labels,
            store.raster.box,
            read_probability=read_probability if store.has_probability else None,
            block_rows=store.chunk_px,
        ),
        raster=store.raster,
        classes=store.classes,
        slide=store.slide,
        provenance=_provenance(store, info),
        config=config,
    )
    progress.finish()
    return result


def _provenance(store: SlideMask, info: RunInfo) -> dict[str, Any]:
    return {
        "run": info.to_dict(),
        "slide_id": store.slide_id,
        "mpp": [store.raster.mpp_x, store.raster.mpp_y],
        "downsample": [store.raster.downsample_x, store.raster.downsample_y],
        "segment": store.run,
    }


def _check_ours(output: Path, info: RunInfo) -> None:
    found = read_provenance(output)
    run = found.get("run") if found else None
    if not isinstance(run, dict):
        msg = (
            f"output '{output}' exists and was not written by wsiseg; choose another or pass "
            "--overwrite"
        )
        raise OutputExistsError(msg)
    check_same_run(fingerprint_of(run), info.fingerprint, output=output)
