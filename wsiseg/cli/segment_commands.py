"""`wsiseg segment` and `wsiseg export`."""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import click

from wsiseg.cli.many import (
    Command,
    LessMemory,
    many_slides_options,
    overwrite_option,
    run_over_slides,
)
from wsiseg.cli.options import config_options
from wsiseg.progress import Progress
from wsiseg.settings.export import GEOJSON_SUFFIXES, ExportConfig, ExtraOutputs
from wsiseg.settings.segment import SegmentConfig


def is_geojson(path: Path) -> bool:
    """Whether a path names a GeoJSON file, plain or gzipped."""
    return path.name.endswith(GEOJSON_SUFFIXES)


def extra_outputs_options(command: Command) -> Command:
    """Add --csv, --ome-tiff and --annotation-store, given to the command as `extra`."""

    @functools.wraps(command)
    def wrapper(
        *args: Any,  # noqa: ANN401 - click passes any value
        csv: bool,
        ome_tiff: bool,
        annotation_store: bool,
        **kwargs: Any,  # noqa: ANN401 - click passes any value
    ) -> object:
        extra = ExtraOutputs(csv=csv, ome_tiff=ome_tiff, annotation_store=annotation_store)
        return command(*args, extra=extra, **kwargs)

    decorated: Command = wrapper
    for name, text in (
        ("--annotation-store", "Also X.db: tiatoolbox's SQLite annotation store."),
        ("--ome-tiff", "Also X.ome.tiff: the mask as a pyramid."),
        ("--csv", "Also X.objects.csv and X.classes.csv: a row per object, and per class."),
    ):
        decorated = click.option(name, is_flag=True, help=text)(decorated)
    return decorated


@click.command("segment")
@click.argument("slides", nargs=-1, required=True)
@click.option(
    "--model",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Run folder of `wsiseg finetune`. [default: the packaged model of nuclei in H&E]",
)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path(),
    help="Folder for <slide_id>.geojson, .mask.zarr and .png, or X.geojson[.gz] for one "
    "slide. [default: the current folder]",
)
@extra_outputs_options
@config_options(SegmentConfig, "segment", export=ExportConfig)
@overwrite_option
@many_slides_options
def segment_command(  # noqa: PLR0913 - click passes each option by its name
    *,
    slides: tuple[str, ...],
    model: Path | None,
    output: Path,
    extra: ExtraOutputs,
    config: SegmentConfig,
    export: ExportConfig,
    overwrite: bool,
    workers: int,
    scheduler: str | None,
    as_json: bool,
) -> int:
    """Segment SLIDES with a model and write GeoJSON that QuPath opens, a mask and an overlay.

    SLIDES are paths, globs, folders or a cohort CSV. What is finished is kept; the GeoJSON and what
    else is asked for beside it are made from the mask.
    """
    from wsiseg.slides.probe import start_probing

    if workers == 1 and scheduler is None and len(slides) == 1 and Path(slides[0]).is_file():
        start_probing()  # its imports go on beside ours; of several slides each process has its own
    from wsiseg.cli.segment_job import LOWERED, SegmentJob, run, with_less_memory
    from wsiseg.models.checkpoint import load_checkpoint
    from wsiseg.models.packaged import packaged_model
    from wsiseg.slides.cohort import resolve_slides

    model = model or packaged_model()
    load_checkpoint(model, kind="segmenter")  # a wrong model is one error, not one per slide
    entries = resolve_slides(slides, slide_mpp=config.slide_mpp).entries
    if is_geojson(output) and len(entries) != 1:
        raise click.UsageError(f"-o {output}: one file for {len(entries)} slides; give a folder")
    jobs = [
        SegmentJob(
            entry=entry,
            config=config,
            export=export,
            extra=extra,
            model=model,
            overwrite=overwrite,
            geojson=output if is_geojson(output) else output / f"{entry.slide_id}.geojson",
        )
        for entry in entries
    ]
    return run_over_slides(
        run,
        jobs,
        slide_ids=[e.slide_id for e in entries],
        label="segment",
        columns=(
            "features",
            "vertices",
            "geojson_mb",
            "area_mm2",
            "seam_score",
            "network_waits",
            "seconds",
            "note",
        ),
        workers=workers,
        scheduler=scheduler,
        as_json=as_json,
        less_memory=LessMemory(
            job=with_less_memory, lowered=LOWERED, remedy="a smaller --batch-size (on a GPU)"
        ),
    )


@dataclasses.dataclass(frozen=True, slots=True, kw_only=True)
class ExportJob:
    """One slide mask to export; sent to a worker as it is."""

    mask: Path
    config: ExportConfig
    output: Path
    overwrite: bool
    extra: ExtraOutputs


def run_export(job: ExportJob, *, progress: Progress | None = None) -> object:
    """Export one slide mask."""
    from wsiseg.stages.export import run

    return run(
        job.config,
        mask=job.mask,
        output=job.output,
        extra=job.extra,
        overwrite=job.overwrite,
        progress=progress,
    )


@click.command("export")
@click.argument("masks", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path(),
    help="X.geojson[.gz] for one mask, or a folder.",
)
@extra_outputs_options
@config_options(ExportConfig, "export")
@overwrite_option
@many_slides_options
def export_command(
    *,
    masks: tuple[Path, ...],
    output: Path,
    extra: ExtraOutputs,
    config: ExportConfig,
    overwrite: bool,
    workers: int,
    scheduler: str | None,
    as_json: bool,
) -> int:
    """Write slide MASKS (<slide_id>.mask.zarr) as GeoJSON for QuPath."""
    if is_geojson(output) and len(masks) != 1:
        raise click.UsageError(f"-o {output}: one file for {len(masks)} masks; give a folder")
    ids = [m.name.removesuffix(".zarr").removesuffix(".mask") for m in masks]
    jobs = [
        ExportJob(
            mask=mask,
            config=config,
            overwrite=overwrite,
            output=output if is_geojson(output) else output / f"{slide_id}.geojson",
            extra=extra,
        )
        for mask, slide_id in zip(masks, ids, strict=True)
    ]
    return run_over_slides(
        run_export,
        jobs,
        slide_ids=ids,
        label="export",
        columns=("features", "vertices", "mb", "objects", "seconds", "note"),
        workers=workers,
        scheduler=scheduler,
        as_json=as_json,
    )
