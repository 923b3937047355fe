"""StoreWriter: the way into and out of a store that is being written, whatever it holds.

Lock, unfinished folder, resume, seal and final name; what is in the folder is the subclass's.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import zarr

from wsiseg import outputs
from wsiseg.errors import StoreError
from wsiseg.runinfo import check_same_run, fingerprint_of
from wsiseg.store import layout
from wsiseg.store.ledger import METADATA, Journal


class StoreWriter(ABC):
    """Writes a store unit by unit; a context manager that holds the output's lock.

    The work lies at `<path>.partial` and is renamed by `finish`.
    """

    def __init__(
        self,
        path: Path,
        attributes: dict[str, Any],
        *,
        overwrite: bool,
        foreign: Mapping[str, Any] | None = None,
    ) -> None:
        """Keep what `__enter__` needs.

        Parameters
        ----------
        attributes
            Ours of the group.
        foreign
            Attributes of the group that other programs read, by their keys.
        """
        self._path = path
        self._partial = outputs.partial_path(path)
        self._attributes = attributes
        self._foreign = foreign or {}
        self._overwrite = overwrite
        self._lock = ExitStack()

    def __enter__(self) -> Self:
        """Take the lock and open or begin the unfinished store."""
        with ExitStack() as lock:
            lock.enter_context(outputs.output_lock(self._path))
            if self._overwrite or not (self._partial / METADATA).exists():
                outputs.discard(self._partial)
                self._begin()
            else:
                self._check_resumable()
            self._open(zarr.open_group(self._partial, mode="r+"))
            self._journal = Journal(self._partial)
            self._lock = lock.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Drop the lock; unfinished work stays for the next run to go on with."""
        self._lock.__exit__(kind, error, trace)

    @abstractmethod
    def finish(self) -> None:
        """Seal the store and give it its final name."""

    @abstractmethod
    def _create_arrays(self, group: zarr.Group) -> None:
        """Begin a store: make its arrays in its new group."""

    @abstractmethod
    def _check_unfinished(self, attributes: dict[str, Any]) -> None:
        """Go on with the unfinished store of the same run that has `attributes`, or refuse to."""

    @abstractmethod
    def _open(self, group: zarr.Group) -> None:
        """Take from the group what writing needs."""

    def _begin(self) -> None:
        """Make the folder under a name that no resume looks for, then rename it."""
        new = outputs.partial_path(self._path.with_name(self._path.name + ".new"))
        outputs.remove_tree(new)
        attributes = {layout.ATTRIBUTES: self._attributes, **self._foreign}
        self._create_arrays(zarr.create_group(new, attributes=attributes))
        new.rename(self._partial)

    def _check_resumable(self) -> None:
        wanted = self._attributes
        found = layout.read_attributes(self._partial, wanted["kind"])
        check_same_run(
            fingerprint_of(found["run"]), fingerprint_of(wanted["run"]), output=self._partial
        )
        if found["format_version"] != wanted["format_version"]:
            msg = f"store '{self._partial}': begun by another wsiseg; start with --overwrite"
            raise StoreError(msg)
        self._check_unfinished(found)

    def _check_all_done(self, units: str, pending: Sequence[object]) -> None:
        if pending:
            msg = f"store '{self._path}': {units} {pending[:5]} are not written yet"
            raise StoreError(msg)

    def _seal(self) -> None:
        self._journal.finalise()
        outputs.promote_folder(self._partial, self._path)
