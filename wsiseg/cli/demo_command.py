"""`wsiseg demo`."""

from pathlib import Path

import click

from wsiseg.cli.report import TerminalProgress, print_json, print_summary


@click.command("demo")
@click.option(
    "-o",
    "--output",
    type=click.Path(path_type=Path),
    default=Path("wsiseg-demo"),
    show_default=True,
    help="Folder for everything it makes.",
)
@click.option("--json", "as_json", is_flag=True, help="Print the summary as JSON.")
def demo_command(*, output: Path, as_json: bool) -> int:
    """Run the whole pipeline on built-in slides and hold the result against the exact truth."""
    from wsiseg import demo

    result = demo.run(
        output, progress=TerminalProgress(), say=lambda line: click.echo(line, err=True)
    )
    if as_json:
        print_json({"schema_version": 1, "results": result.rows, "seconds": result.seconds})
    else:
        ours, best_trivial = result.rows[0]["dice"], max(r["dice"] for r in result.rows[1:])
        print_summary(result.rows, columns=("answer", "dice", "iou"), title="Gland", as_json=False)
        click.echo(
            f"Dice {ours:.3f} against {best_trivial:.3f} of the best trivial answer: "
            f"{ours - best_trivial:+.3f}"
        )
        took = ", ".join(f"{name} {s:.0f} s" for name, s in result.seconds.items())
        click.echo(f"{took}; {sum(result.seconds.values()):.0f} s in all")
        click.echo(f"Look into {output}; drag {output / 'test.geojson'} onto the slide in QuPath.")
    return 0 if result.beats_trivial else 1
