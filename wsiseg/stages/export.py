"""Slide mask to the GeoJSON that QuPath opens, and to what other programs open."""

import time
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsiseg.config import digest, result_settings
from wsiseg.errors import OutputExistsError
from wsiseg.geometry import Box
from wsiseg.outputs import output_lock
from wsiseg.progress import Progress, SilentProgress
from wsiseg.runinfo import RunInfo, check_same_run, fingerprint_of
from wsiseg.settings.export import (
    ANNOTATION_STORE,
    CLASSES_CSV,
    OBJECTS_CSV,
    OME_TIFF,
    ExportConfig,
    ExtraOutputs,
    beside_geojson,
)
from wsiseg.store.masks import SlideMask
from wsiseg.store.ome_tiff import write_ome_tiff
from wsiseg.vector.annotation_store import annotation_store
from wsiseg.vector.batch import Traced
from wsiseg.vector.objects import ObjectSink, object_table
from wsiseg.vector.qupath import WriteResult, origin_l0, read_provenance, write_geojson
from wsiseg.vector.trace import UInt8, trace_batches


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportSummary:
    """What came of one mask.

    `objects` : "annotation", "detection" or both. `simplify_um` : tolerance used, which
    `max_vertices` may have raised. `note` : what QuPath would choke on, if anything.
    """

    slide_id: str
    features: int
    vertices: int
    mb: float
    objects: str
    simplify_um: float
    seconds: float
    output: str
    note: str = ""


def run(
    config: ExportConfig,
    *,
    mask: Path,
    output: Path,
    extra: ExtraOutputs | None = None,
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
    ConfigError
        `config.max_vertices` cannot be kept.
    ExportError
        This Python cannot write an annotation store.
    """
    began = time.perf_counter()
    store = SlideMask.open(mask)
    if output.is_dir():
        msg = f"output '{output}' is a folder; name a .geojson or .geojson.gz file"
        raise OutputExistsError(msg)
    with output_lock(output):
        result = _export(
            config, store, output, extra or ExtraOutputs(), overwrite, progress or SilentProgress()
        )
    return ExportSummary(
        slide_id=store.slide_id,
        features=result.features,
        vertices=result.vertices,
        mb=round(result.size_bytes / 1e6, 3),
        objects=result.objects,
        simplify_um=round(result.simplify_um, 4),
        seconds=round(time.perf_counter() - began, 2),
        output=str(output),
        note=result.warning,
    )


def _export(
    config: ExportConfig,
    store: SlideMask,
    output: Path,
    extra: ExtraOutputs,
    overwrite: bool,
    progress: Progress,
) -> WriteResult:
    info = RunInfo.of(
        "export",
        result_settings(config),
        {"mask": digest(fingerprint_of(store.run)), "model": store.model_digest},
    )
    if not overwrite:
        check_replaceable(output, extra)
        if output.exists():
            check_same_run(_run_of(output), info.fingerprint, output=output)
    with ExitStack() as stack:
        sinks: list[ObjectSink] = []
        if extra.csv:
            sinks.append(
                stack.enter_context(
                    object_table(
                        beside_geojson(output, OBJECTS_CSV),
                        beside_geojson(output, CLASSES_CSV),
                        raster=store.raster,
                        classes=store.classes,
                    )
                )
            )
        if extra.annotation_store:
            path = beside_geojson(output, ANNOTATION_STORE)
            offset = origin_l0(store.slide, config.origin)
            sinks.append(
                stack.enter_context(annotation_store(path, classes=store.classes, offset=offset))
            )
        result = write_geojson(
            output,
            lambda with_junctions: _traced(store, progress, with_junctions=with_junctions),
            raster=store.raster,
            classes=store.classes,
            slide=store.slide,
            provenance=_provenance(store, info),
            config=config,
            metadata={"wsiseg_model": store.model_digest[:16]},
            sinks=sinks,
        )
    if extra.ome_tiff:
        write_ome_tiff(beside_geojson(output, OME_TIFF), store)
    progress.finish()
    return result


def _traced(store: SlideMask, progress: Progress, *, with_junctions: bool) -> Iterator[Traced]:
    progress.start(f"{store.slide_id}: export", store.raster.height_px, unit="rows")

    def read_labels(box: Box) -> UInt8:
        progress.advance(box.height)
        return store.read(box)

    def read_probability(box: Box) -> UInt8:
        probability = store.read_probability(box)
        assert probability is not None
        return probability

    return trace_batches(
        read_labels,
        store.raster.box,
        read_probability=read_probability if store.has_probability else None,
        block_rows=store.chunk_px,
        with_junctions=with_junctions,
    )


def _provenance(store: SlideMask, info: RunInfo) -> dict[str, Any]:
    return {
        "run": info.to_dict(),
        "slide_id": store.slide_id,
        "mpp": [store.raster.mpp_x, store.raster.mpp_y],
        "downsample": [store.raster.downsample_x, store.raster.downsample_y],
        "segment": store.run,
    }


def check_replaceable(geojson: Path, extra: ExtraOutputs) -> None:
    """Raise OutputExistsError if a file is in the way that may not be an older one of ours.

    The GeoJSON is written first, so that what stands beside one of ours is ours as well.
    """
    if geojson.exists():
        _run_of(geojson)
        return
    for path in extra.paths(geojson):
        if path.exists():
            msg = (
                f"output '{path}' exists without the '{geojson.name}' that it would belong to; "
                "choose another or pass --overwrite"
            )
            raise OutputExistsError(msg)


def _run_of(geojson: Path) -> dict[str, Any]:
    found = read_provenance(geojson)
    run = found.get("run") if found else None
    if not isinstance(run, dict):
        msg = (
            f"output '{geojson}' exists and was not written by wsiseg; choose another or pass "
            "--overwrite"
        )
        raise OutputExistsError(msg)
    return fingerprint_of(run)
