"""Check every byte of a store, of either kind, against its ledger."""

from pathlib import Path

from wsiseg.errors import StoreCorruptError, StoreError
from wsiseg.store import layout
from wsiseg.store.ledger import LEDGER, Problem, find_problems
from wsiseg.store.masks import SlideMask
from wsiseg.store.tiles import TileStore


def verify_store(path: Path) -> list[Problem]:
    """Return what is wrong with a finished store; an empty list means whole.

    Raises
    ------
    StoreError
        The folder is no store, is unfinished, or is of a newer format: there is nothing to check.
    """
    if not path.is_dir() or not (path / LEDGER).is_file():
        _raise_not_a_store(path)
    problems = find_problems(path)
    if not problems:  # The bytes are as written; was what was written a store?
        try:
            (SlideMask if _is_mask(path) else TileStore).open(path)
        except StoreCorruptError as error:
            problems.append(Problem("zarr.json", str(error)))
    return problems


def _is_mask(path: Path) -> bool:
    try:
        layout.read_attributes(path, "mask")
    except StoreError:
        return False
    return True


def _raise_not_a_store(path: Path) -> None:
    if path.is_dir() and (path / "zarr.json").exists():
        msg = (
            f"store '{path}': has no {LEDGER}; it is unfinished or was not made by wsiseg; run the "
            "command that makes it again"
        )
        raise StoreError(msg)
    layout.read_attributes(path, "tiles")
    msg = f"store '{path}': not a store of wsiseg"
    raise StoreError(msg)
