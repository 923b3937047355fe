"""Ledger: which units of a store are finished, and the checksum of every file in it.

While a store is written, each finished unit (a shard, a chunk) is one line of a journal, synced to
disk after its data; what the journal does not hold is done again. When all is done, all data are
synced and the journal becomes `ledger.json`, the single mark of a finished store: it lists the size
and sha256 of every file, so that a flipped bit, a truncated, a missing and a foreign file are all
found later.

zarr-python before 3.2 fills a missing chunk with zeros and says nothing, hence the need.
"""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from wsiseg import outputs
from wsiseg.config import digest
from wsiseg.errors import StoreCorruptError, StoreError

JOURNAL = "ledger.jsonl"
LEDGER = "ledger.json"
METADATA = "zarr.json"
LEDGER_VERSION = 1
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Problem:
    """One file of a store that is not as it was written."""

    file: str
    what: str


@dataclass(frozen=True, slots=True)
class FileRecord:
    """Size and sha256 of a file."""

    size_bytes: int
    sha256: str

    @classmethod
    def of(cls, path: Path) -> "FileRecord":
        """Read a file and describe it."""
        with path.open("rb") as file:
            return cls.of_parts(iter(lambda: file.read(_BLOCK_BYTES), b""))

    @classmethod
    def of_parts(cls, parts: Iterable[bytes]) -> "FileRecord":
        """Describe the file that consists of parts, one after the other."""
        hasher = hashlib.sha256()
        size = 0
        for part in parts:
            hasher.update(part)
            size += len(part)
        return cls(size, hasher.hexdigest())


class Journal:
    """The ledger of a store that is being written; one process holds it at a time."""

    def __init__(self, folder: Path) -> None:
        """Open or begin the journal of `folder`, dropping what a crash left half done.

        A unit counts only if its files are still as recorded: a machine that lost power may have
        kept the journal's line and lost the data it speaks of.
        """
        self._folder = folder
        self._files: dict[str, FileRecord] = {}
        self._units: set[str] = set()
        for orphan in folder.rglob(f"*{outputs.PARTIAL_SUFFIX}"):
            outputs.remove_tree(orphan)
        self.is_sealed = self._find_seal()
        """Whether the ledger is written: nothing but the final name is missing."""
        for unit, files in _entries(folder / JOURNAL):
            if all(_problem(folder, name, record) is None for name, record in files.items()):
                self._files |= files
                self._units.add(unit)

    def _find_seal(self) -> bool:
        ledger = self._folder / LEDGER
        if ledger.exists() and find_problems(self._folder):
            ledger.unlink()
        return ledger.exists()

    def is_done(self, unit: str) -> bool:
        """Whether `unit` was committed."""
        return self.is_sealed or unit in self._units

    def commit(self, units: Mapping[str, Mapping[Path, FileRecord]]) -> None:
        """Record that units consist of files, which are complete; returns once that is durable.

        All of them with one sync. Who is killed before it may find some of them recorded and others
        not, each as if committed alone.
        """
        lines: list[bytes] = []
        recorded: dict[str, FileRecord] = {}
        for unit, files in units.items():
            records = {p.relative_to(self._folder).as_posix(): r for p, r in files.items()}
            text = {name: [r.size_bytes, r.sha256] for name, r in records.items()}
            line = {"unit": unit, "files": text, "check": _check(unit, text)}
            lines.append(json.dumps(line).encode() + b"\n")
            recorded |= records
        with (self._folder / JOURNAL).open("ab") as journal:
            journal.write(b"".join(lines))
            journal.flush()
            os.fsync(journal.fileno())
        self._files |= recorded
        self._units |= units.keys()

    def finalise(self) -> None:
        """Write `ledger.json` over every file of the folder and drop the journal."""
        if not self.is_sealed:
            files = {}
            for path in _data_files(self._folder):
                name = path.relative_to(self._folder).as_posix()
                files[name] = self._files.get(name) or FileRecord.of(path)
                outputs.fsync_file(path)
            table = {name: [r.size_bytes, r.sha256] for name, r in sorted(files.items())}
            content = {"ledger_version": LEDGER_VERSION, "files": table, "digest": digest(table)}
            outputs.write_json(self._folder / LEDGER, content)
            self.is_sealed = True
        (self._folder / JOURNAL).unlink(missing_ok=True)


def read_ledger(folder: Path) -> dict[str, FileRecord]:
    """Return the files of a finished store.

    Raises
    ------
    StoreError
        There is no ledger: the store is unfinished, or not one of ours.
    StoreCorruptError
        The ledger itself is damaged.
    """
    path = folder / LEDGER
    if not path.is_file():
        msg = f"store '{folder}': has no {LEDGER}; it is unfinished or was not made by wsiseg"
        raise StoreError(msg)
    try:
        data = path.read_bytes()
        content = json.loads(data)
        table = content["files"]
        if content["ledger_version"] > LEDGER_VERSION:
            msg = f"store '{folder}': its ledger is newer than this wsiseg; upgrade wsiseg"
            raise StoreError(msg)
        if content["digest"] != digest(table) or data != outputs.json_text(content).encode():
            msg = f"store '{folder}': {LEDGER} is damaged (its own checksum differs)"
            raise StoreCorruptError(msg)
        return {name: FileRecord(int(size), str(sha)) for name, (size, sha) in table.items()}
    except (OSError, ValueError, KeyError, TypeError, RecursionError) as error:
        if isinstance(error, StoreError):
            raise
        msg = f"store '{folder}': {LEDGER} cannot be read ({error})"
        raise StoreCorruptError(msg) from error


def check_sizes(folder: Path, files: dict[str, FileRecord]) -> None:
    """Raise StoreCorruptError for the first file that is missing or has another size.

    Done at every opening, since a missing chunk would read as zeros. Costs one `stat` per file, and
    the reading of the few that hold metadata: chunks have checksums of their own, those have none.
    """
    for name, record in files.items():
        is_metadata = name.rsplit("/", 1)[-1] == METADATA
        problem = (
            _problem(folder, name, record) if is_metadata else _size_problem(folder / name, record)
        )
        if problem is not None:
            msg = f"store '{folder}': {name}: {problem}; make the store again"
            raise StoreCorruptError(msg)


def find_problems(folder: Path) -> list[Problem]:
    """Compare every byte of a finished store with its ledger; an empty list means whole."""
    try:
        files = read_ledger(folder)
    except StoreCorruptError as error:
        return [Problem(LEDGER, str(error))]
    problems = []
    for name, record in files.items():
        what = _problem(folder, name, record)
        if what is not None:
            problems.append(Problem(name, what))
    for path in _data_files(folder):
        name = path.relative_to(folder).as_posix()
        if name not in files:
            problems.append(Problem(name, "is not in the ledger: not written by wsiseg"))
    return problems


def _data_files(folder: Path) -> Iterator[Path]:
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.relative_to(folder).as_posix() not in (JOURNAL, LEDGER):
            yield path


def _entries(journal: Path) -> Iterator[tuple[str, dict[str, FileRecord]]]:
    """Yield the units of a journal with their files; a line that is not whole counts for nothing.

    That is a last line cut by a crash, which is removed so that the next one stands alone, or a
    damaged one. Either way the unit is done again.
    """
    if not journal.exists():
        return
    data = journal.read_bytes()
    whole = data[: data.rfind(b"\n") + 1]
    if whole != data:
        os.truncate(journal, len(whole))
    for line in whole.splitlines():
        try:
            entry = json.loads(line)
            unit, files = entry["unit"], entry["files"]
            if entry["check"] == _check(unit, files):
                yield unit, {name: FileRecord(*record) for name, record in files.items()}
        except (ValueError, KeyError, TypeError, RecursionError):
            continue


def _check(unit: str, files: dict[str, Any]) -> str:
    return digest({"unit": unit, "files": files})


def _size_problem(path: Path, record: FileRecord) -> str | None:
    try:
        size = path.stat().st_size
    except OSError:
        return "is missing"
    if size != record.size_bytes:
        return f"has {size} bytes instead of {record.size_bytes}"
    return None


def _problem(folder: Path, name: str, record: FileRecord) -> str | None:
    path = folder / name
    what = _size_problem(path, record)
    if what is None and FileRecord.of(path) != record:
        what = "has other bytes than were written (checksum differs)"
    return what
