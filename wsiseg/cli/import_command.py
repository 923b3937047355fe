"""`wsiseg import-checkpoint`."""

import dataclasses
from pathlib import Path

import click

from wsiseg.classes import ClassTable
from wsiseg.cli.many import overwrite_option
from wsiseg.cli.report import print_summary
from wsiseg.settings.released import ImportConfig


@click.command("import-checkpoint")
@click.argument("official", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the run."
)
@click.option(
    "--mpp",
    type=float,
    required=True,
    help="um/px of the tiles it was trained on, which the file does not say: about 0.25 for "
    "MoNuSeg, 0.62 for GlaS.",
)
@click.option(
    "--tile-size", type=int, default=256, show_default=True, help="Side of those tiles in px."
)
@click.option(
    "--classes",
    "classes_file",
    type=click.Path(path_type=Path, exists=True, dir_okay=False),
    metavar="FILE",
    help="Class table (YAML) of a segmentation network, in the order of its outputs after "
    "background. Without it 3 outputs are a pretrained network, other numbers a segmenter.",
)
@overwrite_option
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def import_checkpoint_command(
    *,
    official: Path,
    output: Path,
    mpp: float,
    tile_size: int,
    classes_file: Path | None,
    overwrite: bool,
    as_json: bool,
) -> int:
    """Convert OFFICIAL.pth, a checkpoint of the code released with the paper, to a run folder.

    No code in the file is run. The folder then serves `finetune --pretrained` or
    `segment --model` like one of our own.
    """
    from wsiseg.stages.import_checkpoint import run

    summary = run(
        ImportConfig(mpp=mpp, tile_size_px=tile_size),
        checkpoint=official,
        output=output,
        classes=None if classes_file is None else ClassTable.from_yaml(classes_file),
        overwrite=overwrite,
    )
    row = dataclasses.asdict(summary)
    print_summary([row], columns=tuple(row), title="import-checkpoint", as_json=as_json)
    return 0
