"""`wsiseg evaluate`, `wsiseg check` and `wsiseg verify`."""

from pathlib import Path
from typing import Any

import click

from wsiseg.cli.options import config_options
from wsiseg.cli.report import print_json, print_summary
from wsiseg.settings.evaluate import EvaluateConfig

json_option = click.option("--json", "as_json", is_flag=True, help="Print JSON.")


@click.command("evaluate")
@click.argument("prediction", type=click.Path(path_type=Path))
@click.argument("truth", type=click.Path(path_type=Path))
@click.option("-o", "--output", type=click.Path(path_type=Path), help="Write all metrics as JSON.")
@config_options(EvaluateConfig, "evaluate")
@json_option
def evaluate_command(
    *, prediction: Path, truth: Path, output: Path | None, config: EvaluateConfig, as_json: bool
) -> int:
    """Hold PREDICTION against TRUTH: mask stores, GeoJSON files, images or folders of images."""
    from wsiseg.stages.evaluate import run, summary_rows

    result = run(config, prediction=prediction, truth=truth, output=output)
    if as_json:
        print_json({"schema_version": 1, **result})
        return 0
    rows: list[dict[str, Any]] = summary_rows(result)
    print_summary(rows, columns=tuple(rows[0]), title="evaluate", as_json=False)
    return 0


@click.command("check")
@click.argument("file", type=click.Path(path_type=Path))
@click.option(
    "--fix",
    type=click.Path(path_type=Path),
    metavar="OUT",
    help="Write a repaired copy and say what was changed.",
)
@json_option
def check_command(*, file: Path, fix: Path | None, as_json: bool) -> int:
    """Say which of QuPath's rules a GeoJSON FILE breaks, with the number of the feature."""
    from wsiseg.vector.check import check_file, fix_file

    violations = check_file(file)
    report: dict[str, Any] = {
        "schema_version": 1,
        "file": file.name,
        "valid": not violations,
        "violations": [
            {"feature": v.feature_index, "rule": v.rule, "message": v.message} for v in violations
        ],
    }
    if fix is not None:
        fixed = fix_file(file, fix)
        report["fixed"] = {"output": str(fix), "changes": fixed.changes, "dropped": fixed.dropped}
    if as_json:
        print_json(report)
    else:
        for v in violations:
            place = "file" if v.feature_index is None else f"feature {v.feature_index}"
            click.echo(f"{place}: {v.rule}: {v.message}")
        click.echo(
            f"{file}: " + (f"{len(violations)} problems" if violations else "QuPath opens it")
        )
        if fix is not None:
            for line in (*fixed.changes, *fixed.dropped):
                click.echo(f"  {line}")
            click.echo(f"wrote {fix}")
    return 1 if violations and fix is None else 0


@click.command("verify")
@click.argument("stores", nargs=-1, required=True, type=click.Path(path_type=Path))
@json_option
def verify_command(*, stores: tuple[Path, ...], as_json: bool) -> int:
    """Check every byte of STORES (tiles or masks) against their ledgers."""
    from wsiseg.errors import StoreError
    from wsiseg.store.verify import verify_store

    rows: list[dict[str, Any]] = []
    for store in stores:
        try:
            problems = [f"{p.file}: {p.what}" for p in verify_store(store)]
        except StoreError as error:
            problems = [str(error)]
        rows.append(
            {
                "store": str(store),
                "status": "damaged" if problems else "whole",
                "problems": len(problems),
            }
        )
        for problem in problems:
            click.echo(f"error: {store}: {problem}", err=True)
    print_summary(rows, columns=("store", "status", "problems"), title="verify", as_json=as_json)
    return 1 if any(row["problems"] for row in rows) else 0
