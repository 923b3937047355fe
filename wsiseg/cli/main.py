"""The entry point: the command group, signals, and the one place where errors become exit codes.

0 all done, 1 something failed (named in the summary), 2 usage, 130 interrupted, 143 terminated.
"""

import importlib
import logging
import sys
from typing import NoReturn

import click

from wsiseg import __version__
from wsiseg.errors import WsisegError
from wsiseg.interrupts import Interrupts, Terminated
from wsiseg.memory import in_one_line, is_out_of_memory

COMMANDS = {
    "info": ("wsiseg.cli.slide_commands", "What a slide is: size, resolution, levels, reader."),
    "doctor": ("wsiseg.cli.doctor_command", "What works on this machine."),
    "tile": ("wsiseg.cli.slide_commands", "Slides to tile stores."),
    "pretrain": ("wsiseg.cli.train_commands", "Learn from unlabelled tiles by diffusion."),
    "finetune": ("wsiseg.cli.train_commands", "Learn to segment from labelled tiles."),
    "segment": ("wsiseg.cli.segment_commands", "Slides to masks, GeoJSON and overlays."),
    "export": ("wsiseg.cli.segment_commands", "A slide mask to GeoJSON."),
    "evaluate": ("wsiseg.cli.check_commands", "Hold predictions against the truth."),
    "check": ("wsiseg.cli.check_commands", "Will QuPath open this GeoJSON? Repair it."),
    "verify": ("wsiseg.cli.check_commands", "Is this store whole?"),
    "import-checkpoint": ("wsiseg.cli.import_command", "The released code's weights to a run."),
    "demo": ("wsiseg.cli.demo_command", "The whole pipeline on a built-in slide."),
}
"""Command -> module and one-line help, in the order of the pipeline. The module is imported only
when its command runs, so that `wsiseg --help` answers at once."""


class LazyGroup(click.Group):
    """A group that imports a command's module when the command is asked for."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        """Return the commands in the order of the pipeline."""
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        """Import and return one command."""
        if cmd_name not in COMMANDS:
            return None
        module = importlib.import_module(COMMANDS[cmd_name][0])
        command = getattr(module, f"{cmd_name.replace('-', '_')}_command")
        if not isinstance(command, click.Command):
            msg = f"{module.__name__}.{cmd_name}_command is not a click command"
            raise TypeError(msg)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        """Write the list of commands without importing any of them."""
        with formatter.section("Commands"):
            formatter.write_dl([(name, text) for name, (_, text) in COMMANDS.items()])


@click.command(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(__version__, prog_name="wsiseg")
@click.option("-v", "--verbose", is_flag=True, help="Say more; tracebacks of failed slides.")
@click.option("-q", "--quiet", is_flag=True, help="Only errors.")
def cli(*, verbose: bool, quiet: bool) -> None:
    """Segment whole slides: pretrained on your own tissue, few labels, masks back in QuPath.

    \b
    wsiseg tile slides/ -o tiles
    wsiseg pretrain tiles -o runs/pretrain
    wsiseg finetune tiles -o runs/nuclei --pretrained runs/pretrain
    wsiseg segment slide.svs --model runs/nuclei
    """  # noqa: D301 - \b is click's mark for a verbatim paragraph
    level = logging.DEBUG if verbose else logging.ERROR if quiet else logging.WARNING
    logging.basicConfig(level=logging.WARNING, format="%(levelname)s: %(message)s", force=True)
    logging.getLogger("wsiseg").setLevel(level)
    for library in ("tifffile", "PIL"):  # what they say of a damaged file, we say; theirs quotes it
        logging.getLogger(library).setLevel(logging.CRITICAL)


def main() -> NoReturn:
    """Run the command line and exit with its code."""
    interrupts = Interrupts()
    with interrupts.handling():
        code = _run(interrupts)
    sys.exit(code)


def _run(interrupts: Interrupts) -> int:
    try:
        result = cli.main(prog_name="wsiseg", standalone_mode=False)
    except click.exceptions.Exit as error:
        return error.exit_code
    except click.ClickException as error:
        error.show()
        return error.exit_code
    except (WsisegError, OSError, KeyboardInterrupt, click.Abort) as error:
        if interrupts.is_terminated and isinstance(error, KeyboardInterrupt | click.Abort):
            error = Terminated()  # click makes an Abort of any KeyboardInterrupt
        message, code = _message_and_code(error)
        logging.getLogger("wsiseg").debug("traceback", exc_info=True)
        click.echo(message, err=True)
        return code
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        logging.getLogger("wsiseg").debug("traceback", exc_info=True)
        click.echo(f"error: out of memory ({in_one_line(error)}); use a larger machine", err=True)
        return 1
    return result if isinstance(result, int) else 0


def _message_and_code(error: BaseException) -> tuple[str, int]:
    if isinstance(error, WsisegError):
        return f"error: {error}", error.exit_code
    if isinstance(error, OSError):
        where = f": {error.filename}" if error.filename else ""
        return f"error: {error.strerror or error}{where}", 1
    word, code = ("terminated", 143) if isinstance(error, Terminated) else ("interrupted", 130)
    return f"{word}; run the same command again to go on", code
