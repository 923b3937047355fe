"""The figures of a run as TensorBoard shows them; needs the extra `log`."""

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from wsiseg.errors import ConfigError

FOLDER = "tensorboard"

Show = Callable[[Mapping[str, Any]], None]
"""Takes a line of metrics, with its `step`."""


@contextlib.contextmanager
def open_board(run: Path, *, is_on: bool, step: int) -> Iterator[Show]:
    """Give a function that shows lines of metrics, or does nothing if it is not on.

    Parameters
    ----------
    step
        Where the run goes on; what an earlier attempt wrote after it is hidden.

    Raises
    ------
    ConfigError
        TensorBoard is not installed.
    """
    if not is_on:
        yield lambda line: None
        return
    try:
        from torch.utils.tensorboard import SummaryWriter  # noqa: PLC0415 - an extra, and slow
    except ImportError as error:
        msg = "tensorboard: not installed; pip install 'wsiseg[log]' or leave --tensorboard out"
        raise ConfigError(msg) from error
    writer = SummaryWriter(str(run / FOLDER), purge_step=step + 1)

    def show(line: Mapping[str, Any]) -> None:
        for name, value in line.items():
            if name != "step" and isinstance(value, int | float):
                writer.add_scalar(name, value, line["step"])

    try:
        yield show
    finally:
        writer.close()
