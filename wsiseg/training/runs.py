"""The folder of a training run: whose it is, whether it is finished, and what every run leaves."""

import contextlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from wsiseg import outputs
from wsiseg.config import to_dict
from wsiseg.errors import OutputExistsError, StoreError
from wsiseg.models.checkpoint import META_NAME
from wsiseg.runinfo import RunInfo, check_same_run, fingerprint_of
from wsiseg.store.tiles import TileStore
from wsiseg.training.curves import write_curves
from wsiseg.training.data import check_stores_agree
from wsiseg.training.loop import METRICS_NAME
from wsiseg.training.ranks import ALONE, Ranks
from wsiseg.training.resume import remove_points

RUN_NAME = "run.json"


@dataclass(frozen=True, slots=True)
class RunFolder:
    """An open run folder. `is_finished` : a run of the same settings ended here before."""

    path: Path
    is_finished: bool


@contextlib.contextmanager
def open_run(
    path: Path,
    info: RunInfo,
    config: object,
    *,
    section: str,
    overwrite: bool,
    ranks: Ranks = ALONE,
) -> Iterator[RunFolder]:
    """Hold the lock of a run folder, begun or taken up again; of several processes, the first does.

    The checkpoint is what marks a run as finished, so whoever has the folder writes it last of
    all; the resume points are dropped here then.

    Raises
    ------
    OutputExistsError
        The folder holds another run, or something that is not ours.
    """
    if not ranks.is_first:
        yield RunFolder(path, is_finished=bool(ranks.from_first(0)))
        return
    with outputs.output_lock(path):
        if overwrite:
            _check_is_run(path)
            outputs.discard(path)
        if _is_begun(path):
            _check_is_run(path)
            found = json.loads((path / RUN_NAME).read_text(encoding="utf-8"))
            check_same_run(fingerprint_of(found), info.fingerprint, output=path)
            if (path / META_NAME).exists():
                remove_points(path)
                ranks.from_first(1)
                yield RunFolder(path, is_finished=True)
                return
        path.mkdir(parents=True, exist_ok=True)
        outputs.write_json(path / RUN_NAME, info.to_dict())
        text = yaml.safe_dump({section: to_dict(config)}, sort_keys=False)
        outputs.write_text(path / "config.yaml", text)
        ranks.from_first(0)
        yield RunFolder(path, is_finished=False)
        remove_points(path)


def _is_begun(path: Path) -> bool:
    """Whether there is more than what a run leaves that was killed in its first moment."""
    if not path.is_dir():
        return path.exists()
    return any(not inner.name.endswith(outputs.PARTIAL_SUFFIX) for inner in path.iterdir())


def _check_is_run(path: Path) -> None:
    if _is_begun(path) and not (path / RUN_NAME).is_file():
        msg = f"output '{path}' exists and is not a run of wsiseg; choose another"
        raise OutputExistsError(msg)


def draw_run(path: Path, *, title: str) -> None:
    """Draw the curves of a run."""
    write_curves(path / METRICS_NAME, path / "curves.png", title=title)


def open_stores(paths: Sequence[Path]) -> list[TileStore]:
    """Open stores, checked to agree; StoreError names the one that cannot be used."""
    if not paths:
        msg = "no tile store given; make some with `wsiseg tile`"
        raise StoreError(msg)
    stores = [TileStore.open(path) for path in sorted(paths, key=lambda p: p.name)]
    check_stores_agree(stores)
    return stores


def store_inputs(stores: Sequence[TileStore]) -> dict[str, str]:
    """Return what identifies the content of stores, for the fingerprint of a run."""
    return {f"tiles/{store.slide_id}": store.content_digest for store in stores}
