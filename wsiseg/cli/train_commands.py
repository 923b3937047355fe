"""`wsiseg pretrain` and `wsiseg finetune`."""

import dataclasses
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from wsiseg.cli.many import overwrite_option
from wsiseg.cli.options import config_options
from wsiseg.cli.report import TerminalProgress, print_summary
from wsiseg.progress import SilentProgress
from wsiseg.settings.model import UNET_PRESETS
from wsiseg.settings.training import FinetuneConfig, PretrainConfig

if TYPE_CHECKING:
    from wsiseg.stages.finetune import FinetuneSummary
    from wsiseg.stages.pretrain import PretrainSummary
    from wsiseg.training.ranks import Ranks

json_option = click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")


def _preset_values(context: click.Context, parameter: click.Parameter, name: str | None) -> Any:  # noqa: ANN401 - click's signature
    """Turn --preset into values that the file and other flags are laid over."""
    return None if name is None else dataclasses.asdict(UNET_PRESETS[name])


preset_option = click.option(
    "--preset",
    type=click.Choice(tuple(UNET_PRESETS)),
    callback=_preset_values,
    help="Size of the network; 'parity' is the released one.",
)

output_option = click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, help="Folder of the run."
)


@click.command("pretrain")
@click.argument("tiles", nargs=-1, required=True)
@output_option
@preset_option
@config_options(PretrainConfig, "pretrain")
@overwrite_option
@json_option
def pretrain_command(
    *, tiles: tuple[str, ...], output: Path, config: PretrainConfig, overwrite: bool, as_json: bool
) -> int:
    """Learn tissue from unlabelled TILES (stores or folders of them) by denoising diffusion."""
    from wsiseg.stages.pretrain import run

    ranks = ranks_of_torchrun()
    summary = run(
        config,
        stores=find_stores(tiles),
        output=output,
        overwrite=overwrite and restarts() == 0,
        progress=TerminalProgress() if ranks.is_first else SilentProgress(),
        ranks=ranks,
    )
    return _report(summary, ranks, title="pretrain", as_json=as_json)


@click.command("finetune")
@click.argument("tiles", nargs=-1, required=True)
@output_option
@click.option(
    "--pretrained",
    type=click.Path(path_type=Path),
    metavar="RUN",
    help="Run folder of `wsiseg pretrain` to start from.",
)
@click.option("--from-scratch", is_flag=True, help="Start from random weights.")
@preset_option
@config_options(FinetuneConfig, "finetune")
@overwrite_option
@json_option
def finetune_command(
    *,
    tiles: tuple[str, ...],
    output: Path,
    pretrained: Path | None,
    from_scratch: bool,
    config: FinetuneConfig,
    overwrite: bool,
    as_json: bool,
) -> int:
    """Learn to segment from the labelled ones among TILES (stores or folders of them)."""
    from wsiseg.stages.finetune import run

    ranks = ranks_of_torchrun()
    if (pretrained is None) != from_scratch:
        raise click.UsageError("give either --pretrained RUN or --from-scratch")
    summary = run(
        config,
        stores=find_stores(tiles),
        output=output,
        pretrained=pretrained,
        overwrite=overwrite and restarts() == 0,
        progress=TerminalProgress() if ranks.is_first else SilentProgress(),
        ranks=ranks,
    )
    return _report(summary, ranks, title="finetune", as_json=as_json)


def _report(
    summary: "PretrainSummary | FinetuneSummary", ranks: "Ranks", *, title: str, as_json: bool
) -> int:
    """Print the summary once, whatever the number of processes; return the exit code."""
    row = dataclasses.asdict(summary)
    if ranks.is_first:
        print_summary([row], columns=tuple(row), title=title, as_json=as_json)
    return 0


def ranks_of_torchrun() -> "Ranks":
    """Return this process's place among those that torchrun started, if it did."""
    from wsiseg.training.ranks import ALONE, Ranks

    names = ("RANK", "WORLD_SIZE", "LOCAL_RANK")
    if not all(os.environ.get(name, "").isdecimal() for name in names):
        return ALONE
    rank, size, local = (int(os.environ[name]) for name in names)
    return Ranks(rank=rank, size=size, local=local, attempt=restarts())


def restarts() -> int:
    """Return how often torchrun has started the processes again, after one of them had died."""
    text = os.environ.get("TORCHELASTIC_RESTART_COUNT", "")
    return int(text) if text.isdecimal() else 0


def find_stores(tiles: tuple[str, ...]) -> list[Path]:
    """Return the tile stores that paths and folders name, sorted; unfinished ones are refused."""
    stores: list[Path] = []
    for text in tiles:
        path = Path(text)
        if path.name.endswith(".zarr"):
            stores.append(path)
            continue
        if not path.is_dir():
            raise click.UsageError(f"{path}: no such tile store or folder")
        unfinished = sorted(path.glob("*.zarr.partial"))
        if unfinished:
            raise click.UsageError(
                f"{path}: {unfinished[0].name} is unfinished; run `wsiseg tile` again first"
            )
        found = sorted(p for p in path.glob("*.zarr") if not p.name.endswith(".mask.zarr"))
        if not found:
            raise click.UsageError(f"{path}: holds no tile store (*.zarr)")
        stores += found
    return list(dict.fromkeys(stores))
