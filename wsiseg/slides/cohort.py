"""Cohort: which slides there are, whose they are, and what each is for."""

import csv
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from wsiseg.config import check_known_keys, digest
from wsiseg.errors import CohortError, ConfigError
from wsiseg.outputs import PARTIAL_SUFFIX
from wsiseg.slides.reader import IMAGE_SUFFIXES, default_slide_id
from wsiseg.slides.resolution import MAX_MPP, MIN_MPP

COLUMNS = ("slide_id", "patient_id", "path", "mpp", "annotation", "split")
SPLITS = ("train", "val", "test")

SLIDE_SUFFIXES = (
    ".svs", ".tif", ".tiff", ".ndpi", ".mrxs", ".scn", ".bif", ".vms", ".vmu", ".svslide", ".czi",
    ".dcm", ".jp2", *IMAGE_SUFFIXES,
)  # fmt: skip
"""What is taken for a slide when a folder is given."""

MAX_CSV_BYTES = 50_000_000


@dataclass(frozen=True, slots=True, kw_only=True)
class CohortEntry:
    """One slide. `mpp` : um/px at level 0, overriding the file. `split` : train, val or test."""

    slide_id: str
    path: Path
    patient_id: str | None = None
    mpp: float | None = None
    annotation: Path | None = None
    split: str | None = None

    @property
    def group_id(self) -> str:
        """What stands for the patient in outputs, or for the slide itself where none is named.

        A digest: the number of a patient goes into no store.
        """
        if self.patient_id is None:
            return f"slide:{self.slide_id}"
        return f"patient:{digest(self.patient_id)[:16]}"

    def may_name(self, path: Path) -> bool:
        """Whether messages may name a file of this slide.

        Not the annotation of a table whose slide_id is a pseudonym: its name may be the patient's.
        """
        return path != self.annotation or self.slide_id == default_slide_id(self.path)


@dataclass(frozen=True, slots=True)
class Cohort:
    """Slides with unique ids; no patient stands in two splits."""

    entries: tuple[CohortEntry, ...]

    def __post_init__(self) -> None:
        _check_consistent((entry, "") for entry in self.entries)

    @classmethod
    def from_csv(cls, path: Path) -> "Cohort":
        """Read a table with the columns of `COLUMNS`; only `path` is required.

        Relative paths start at the table's folder.

        Raises
        ------
        CohortError
            A column is unknown or missing, or a line is wrong; the line number is named.
        """
        where = f"cohort '{path}'"
        try:
            if path.stat().st_size > MAX_CSV_BYTES:
                msg = f"{where}: larger than {MAX_CSV_BYTES} bytes; not a table of slides?"
                raise CohortError(msg)
            with path.open(encoding="utf-8-sig", newline="") as file:
                reader = csv.DictReader(file, restkey="(more)")
                _check_columns(reader.fieldnames or (), where)
                lines = [
                    (_parse_line(row, path.parent, place), f"{place}: ")
                    for row in reader
                    for place in (f"{where}, line {reader.line_num}",)
                ]
        except (OSError, UnicodeDecodeError, csv.Error) as error:
            msg = f"{where}: cannot be read as a CSV table: {error}"
            raise CohortError(msg) from error
        if not lines:
            msg = f"{where}: names no slide"
            raise CohortError(msg)
        _check_consistent(lines)
        return cls(tuple(_whole_patients([entry for entry, _ in lines])))


def _check_consistent(lines: Iterable[tuple[CohortEntry, str]]) -> None:
    """Refuse a slide_id or patient used twice; each entry comes with what begins its error."""
    by_id: dict[str, CohortEntry] = {}
    by_group: dict[str, CohortEntry] = {}
    for entry, place in lines:
        other = by_id.setdefault(entry.slide_id, entry)
        if other is not entry:
            msg = (
                f"{place}slide_id '{entry.slide_id}' stands for two slides, '{other.path}' and "
                f"'{entry.path}'; name them apart in a cohort CSV"
            )
            raise CohortError(msg)
        if entry.split is None:
            continue
        other = by_group.setdefault(entry.group_id, entry)
        if other.split != entry.split:
            msg = (
                f"{place}one patient is in two splits: slide '{other.slide_id}' in {other.split}, "
                f"slide '{entry.slide_id}' in {entry.split}"
            )
            raise CohortError(msg)


def _whole_patients(entries: Sequence[CohortEntry]) -> list[CohortEntry]:
    """Return the entries, each with the split that another slide of the patient names, if any."""
    named = {entry.group_id: entry.split for entry in entries if entry.split is not None}
    return [replace(e, split=e.split or named.get(e.group_id)) for e in entries]


def _check_columns(columns: Iterable[str], where: str) -> None:
    columns = tuple(columns)
    try:
        check_known_keys(columns, COLUMNS, where)
    except ConfigError as error:
        raise CohortError(str(error).replace("unknown key", "unknown column")) from error
    doubled = [column for column in columns if columns.count(column) > 1]
    if doubled:
        msg = f"{where}: has the column '{doubled[0]}' twice"
        raise CohortError(msg)
    if "path" not in columns:
        msg = f"{where}: has no column 'path' (columns: {', '.join(columns) or 'none'})"
        raise CohortError(msg)


def _parse_line(row: Mapping[str, str | None], folder: Path, where: str) -> CohortEntry:
    if "(more)" in row:
        msg = f"{where}: has more values than the table has columns"
        raise CohortError(msg)
    text = {key: (value or "").strip() for key, value in row.items()}
    if not text["path"] or "\0" in text["path"]:
        msg = f"{where}: path {text['path']!r} cannot be the name of a file"
        raise CohortError(msg)
    path = folder / text["path"]
    slide_id = text.get("slide_id") or default_slide_id(path)
    if slide_id != default_slide_id(Path(slide_id + ".x")):
        msg = f"{where}: slide_id {slide_id!r} cannot be the name of a file"
        raise CohortError(msg)
    split = text.get("split") or None
    if split not in (None, *SPLITS):
        msg = f"{where}: split {split!r} is not one of {', '.join(SPLITS)}"
        raise CohortError(msg)
    annotation = text.get("annotation")
    return CohortEntry(
        slide_id=slide_id,
        path=path,
        patient_id=text.get("patient_id") or None,
        mpp=_parse_mpp(text.get("mpp", ""), where),
        annotation=folder / annotation if annotation else None,
        split=split,
    )


def _parse_mpp(text: str, where: str) -> float | None:
    if not text:
        return None
    try:
        mpp = float(text)
    except ValueError:
        mpp = math.nan
    if not MIN_MPP <= mpp <= MAX_MPP:
        msg = f"{where}: mpp {text!r} is not a number from {MIN_MPP} to {MAX_MPP:.0f} (um/px)"
        raise CohortError(msg)
    return mpp


def resolve_slides(inputs: Sequence[str | Path], *, slide_mpp: float | None = None) -> Cohort:
    """Return the slides that paths, globs, folders and cohort CSVs name, in this order.

    A path that does not exist is kept: it fails as that slide, not as the whole command.

    Parameters
    ----------
    slide_mpp
        um/px at level 0 of the slides for which no table gives one.

    Raises
    ------
    CohortError
        A glob or a folder has no slide, or two slides have one id.
    """
    entries: dict[Path, CohortEntry] = {}
    for text in inputs:
        for entry in _entries_of(Path(text)):
            entries.setdefault(entry.path.absolute(), entry)
    return Cohort(
        tuple(replace(e, mpp=slide_mpp) if e.mpp is None else e for e in entries.values())
    )


def _entries_of(path: Path) -> list[CohortEntry]:
    if path.suffix.lower() == ".csv":
        return list(Cohort.from_csv(path).entries)
    if path.exists() or not _is_glob(path):
        if not _is_folder_of_slides(path):
            return [CohortEntry(slide_id=default_slide_id(path), path=path)]
        found = sorted(p for p in path.iterdir() if _looks_like_slide(p))
        what = f"folder '{path}': holds no slide"
    else:
        root = Path(path.anchor) if path.is_absolute() else Path()
        pattern = str(path.relative_to(path.anchor)) if path.is_absolute() else str(path)
        found = sorted(p for p in root.glob(pattern) if not p.name.endswith(PARTIAL_SUFFIX))
        what = f"'{path}': no file matches"
    if not found:
        msg = f"{what}; slides end in {', '.join(SLIDE_SUFFIXES[:6])}, ..."
        raise CohortError(msg)
    return [CohortEntry(slide_id=default_slide_id(p), path=p) for p in found]


def _is_glob(path: Path) -> bool:
    return any(c in str(path) for c in "*?[")


def _is_folder_of_slides(path: Path) -> bool:
    """Whether a path is a folder to look into: `slide.svs/` is a slide that cannot be opened."""
    return path.is_dir() and path.suffix.lower() not in (*SLIDE_SUFFIXES, ".zarr")


def _looks_like_slide(path: Path) -> bool:
    return path.suffix.lower() in SLIDE_SUFFIXES and not path.name.startswith(".")
