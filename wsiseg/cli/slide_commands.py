"""`wsiseg info` and `wsiseg tile`."""

from pathlib import Path
from typing import Any

import click

from wsiseg.cli.many import many_slides_options, overwrite_option, run_over_slides
from wsiseg.cli.options import config_options
from wsiseg.cli.report import print_json
from wsiseg.settings.tile import TileConfig


@click.command("info")
@click.argument("slides", nargs=-1, required=True)
@click.option("--slide-mpp", type=float, help="um/px at level 0 where the slide states none.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def info_command(*, slides: tuple[str, ...], slide_mpp: float | None, as_json: bool) -> int:
    """Show what SLIDES are: size, um/px, levels, reader. No patient data is shown.

    SLIDES are paths, globs, folders or a cohort CSV.
    """
    from wsiseg.slides.probe import probe_slide, start_probing

    start_probing()  # its imports go on beside ours
    from wsiseg.errors import SlideError
    from wsiseg.slides.cohort import resolve_slides

    rows: list[dict[str, Any]] = []
    failed = False
    for entry in resolve_slides(slides, slide_mpp=slide_mpp).entries:
        try:
            meta = probe_slide(
                entry.path, slide_id=entry.slide_id, slide_mpp=entry.mpp, require_mpp=False
            )
            rows.append(meta.to_dict())
        except SlideError as error:
            failed = True
            rows.append({"slide_id": entry.slide_id, "error": str(error)})
            click.echo(f"error: {error}", err=True)
    if as_json:
        print_json({"schema_version": 1, "slides": rows})
    else:
        for row in rows:
            if "error" not in row:
                _print_slide(row)
    return 1 if failed else 0


def _print_slide(row: dict[str, Any]) -> None:
    mpp = (
        "unknown: pass --slide-mpp"
        if row["mpp_x"] is None
        else (f"{row['mpp_x']:.4g} x {row['mpp_y']:.4g} ({row['mpp_source']})")
    )
    levels = ", ".join(f"{w} x {h}" for w, h in row["level_sizes"])
    click.echo(f"{row['slide_id']}")
    click.echo(f"  size    {row['width_px_l0']} x {row['height_px_l0']} px")
    click.echo(f"  um/px   {mpp}")
    click.echo(f"  levels  {levels}")
    click.echo(f"  reader  {row['reader']}")
    if row["bounds"]:
        x, y, width, height = row["bounds"]
        click.echo(f"  bounds  {width} x {height} px at ({x}, {y})")


@click.command("tile")
@click.argument("slides", nargs=-1, required=True)
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    required=True,
    help="Folder for the stores: OUT/<slide_id>.zarr.",
)
@click.option(
    "--annotations",
    type=click.Path(path_type=Path),
    metavar="FILE|DIR",
    help="QuPath GeoJSON, or a folder of <slide_id>.geojson; what it leaves out is ignored.",
)
@click.option(
    "--labels",
    type=click.Path(path_type=Path),
    metavar="DIR",
    help="Folder of mask images <slide_id>.png with the label in each pixel.",
)
@click.option(
    "--classes",
    "classes_file",
    type=click.Path(path_type=Path),
    metavar="FILE",
    help="Class table (see configs/classes); default: the annotations' own classes.",
)
@config_options(TileConfig, "tile")
@overwrite_option
@many_slides_options
def tile_command(  # noqa: PLR0913 - one argument per option
    *,
    slides: tuple[str, ...],
    output: Path,
    annotations: Path | None,
    labels: Path | None,
    classes_file: Path | None,
    config: TileConfig,
    overwrite: bool,
    workers: int,
    scheduler: str | None,
    as_json: bool,
) -> int:
    """Cut the tissue of SLIDES into tiles, one zarr store per slide.

    SLIDES are paths, globs, folders or a cohort CSV. Plain images (PNG, JPEG, TIFF) are slides too
    once --slide-mpp gives their resolution.
    """
    from wsiseg.slides.probe import start_probing

    if workers == 1 and scheduler is None and len(slides) == 1 and Path(slides[0]).is_file():
        start_probing()  # its imports go on beside ours; of several slides each process has its own
    from wsiseg.cli.labels import find_labels
    from wsiseg.slides.cohort import resolve_slides
    from wsiseg.stages.tile import run

    cohort = resolve_slides(slides, slide_mpp=config.slide_mpp)
    jobs = find_labels(
        cohort.entries,
        config,
        output=output,
        annotations=annotations,
        labels=labels,
        classes_file=classes_file,
        overwrite=overwrite,
        workers=workers,
    )
    return run_over_slides(
        run,
        jobs,
        slide_ids=[e.slide_id for e in cohort.entries],
        label="tile",
        columns=("tiles", "labelled_tiles", "mpp", "megapixels", "seconds", "note"),
        workers=workers,
        scheduler=scheduler,
        as_json=as_json,
    )
