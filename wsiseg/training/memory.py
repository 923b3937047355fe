"""A step that needs more memory than there is: one error that says what learns the same in less."""

import contextlib
from collections.abc import Iterator
from pathlib import Path

from wsiseg.errors import TrainingMemoryError
from wsiseg.memory import in_one_line, is_out_of_memory
from wsiseg.training.resume import TrainState


@contextlib.contextmanager
def memory_errors_explained(folder: Path, state: TrainState) -> Iterator[None]:
    """Raise TrainingMemoryError for a want of memory inside.

    Nothing is tried again with less: a batch of another size is another run.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        msg = (
            f"training '{folder}': out of memory after {state.step} steps ({in_one_line(error)}); "
            "go on with the same command where there is more, or begin again with --overwrite and "
            "half the --batch-size and --set optim.accumulate=2, which learn the same"
        )
        raise TrainingMemoryError(msg) from error
