"""Find the models that come with the package, so that `wsiseg segment` works with no `--model`."""

from pathlib import Path

from wsiseg.errors import CheckpointError

FOLDER = Path(__file__).resolve().parent.parent / "pretrained"

DEFAULT_MODEL = "nuclei"


def packaged_model(name: str = DEFAULT_MODEL, *, folder: Path = FOLDER) -> Path:
    """Return the run folder of a packaged model.

    Raises
    ------
    CheckpointError
        It is not there: an installation without its data files.
    """
    path = folder / name
    if not (path / "model.json").is_file():
        msg = (
            f"the packaged model '{name}' is missing from this installation (expected in "
            f"'{path}'); install wsiseg again, or give --model RUN, the run folder of "
            "`wsiseg finetune`"
        )
        raise CheckpointError(msg)
    return path
