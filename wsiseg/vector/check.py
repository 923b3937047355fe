"""Check a GeoJSON file against QuPath's rules, and write a repaired copy."""

import gzip
import json
import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import orjson

from wsiseg.errors import AnnotationError, GeoJSONError
from wsiseg.outputs import write_bytes
from wsiseg.vector.foreign import cells_of, features_of
from wsiseg.vector.qupath_read import read_text
from wsiseg.vector.repair import Repair
from wsiseg.vector.rules import CHILD_KEYS, MAX_CHILD_DEPTH, rules_broken

Json = Any
"""Any JSON value."""


@dataclass(frozen=True, slots=True)
class Violation:
    """A rule that a file breaks. `feature_index` : top-level feature, None for the file itself."""

    feature_index: int | None
    rule: str
    message: str


@dataclass(frozen=True, slots=True)
class FixResult:
    """What `fix_file` changed, and what it had to leave out; one line each."""

    changes: list[str]
    dropped: list[str]


def check_file(path: Path) -> list[Violation]:
    """Return every rule of QuPath that a GeoJSON file breaks; an empty list if it opens.

    Raises
    ------
    GeoJSONError
        There is no such file.
    """
    try:
        text = _text(path)
        document, complaint = _parse(text, path)
    except _NotJSONError as error:
        return [Violation(None, "json", str(error))]
    violations = [] if complaint is None else [Violation(None, "json", complaint)]
    violations += _check_name(path)
    features, wrong = _top_level(document)
    violations += [Violation(None, rule, message) for rule, message in wrong]
    return [*violations, *_check_features(features)]


def fix_file(src: Path, out: Path) -> FixResult:
    """Write a copy of a file that breaks no rule (a FeatureCollection; gzip if `out` ends in .gz).

    Rings are closed, polygons made valid on QuPath's grid, classes given a colour, ids that are
    no UUID or occur twice replaced; what has no usable shape is left out. Whatever is right
    stays as it is.

    Raises
    ------
    GeoJSONError
        There is no such file, or it is no GeoJSON at all.
    """
    try:
        document, complaint = _parse(_text(src), src)
    except _NotJSONError as error:
        msg = f"'{src}': {error}; nothing to repair"
        raise GeoJSONError(msg) from error
    features, wrong = _top_level(document)
    if any(rule == "top-level" for rule, _ in wrong) and not features:
        msg = f"'{src}': {wrong[0][1]}; nothing to repair"
        raise GeoJSONError(msg)
    repair = Repair()
    fixed = {"type": "FeatureCollection", "features": repair.features(features)}
    if isinstance(document, dict) and "features" in document:
        members = {k: v for k, v in document.items() if k not in ("type", "features", "crs")}
        fixed = {"type": "FeatureCollection", **members, "features": fixed["features"]}
    try:
        text = json.dumps(fixed, ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    except RecursionError as error:
        msg = f"'{src}': nested too deeply to repair"
        raise GeoJSONError(msg) from error
    data = text.encode("utf-8", "replace")
    write_bytes(out, gzip.compress(data, mtime=0) if out.name.endswith(".gz") else data)
    changes = [f"file: {message}" for _, message in wrong]
    changes += [] if complaint is None else [f"file: {complaint}"]
    return FixResult([*changes, *repair.changes], repair.dropped)


class _NotJSONError(Exception):
    pass


def _text(path: Path) -> bytes:
    if not path.is_file():
        msg = f"'{path}': no such file" if not path.exists() else f"'{path}': is not a file"
        raise GeoJSONError(msg)
    try:
        return read_text(path, f"'{path.name}'")
    except AnnotationError as error:
        raise _NotJSONError(str(error)) from error


def _parse(text: bytes, path: Path) -> tuple[Json, str | None]:
    """Return the document, and what is wrong if only a lenient reader takes it."""
    try:
        return orjson.loads(text), None
    except orjson.JSONDecodeError as error:
        complaint = f"not strict JSON ({error}), though QuPath reads it"
    try:
        document = json.loads(
            text.decode("utf-8"), parse_constant=str, parse_int=_number, parse_float=_number
        )
    except (ValueError, RecursionError) as error:
        msg = f"'{path.name}' is not JSON: {error}"
        raise _NotJSONError(msg) from error
    return document, complaint


def _number(text: str) -> int | float | str:
    """Return a number that every reader can hold, else its text."""
    if text.lstrip("-").isdigit() and len(text) < 19:
        return int(text)
    value = float(text)
    return value if math.isfinite(value) else text


def _check_name(path: Path) -> list[Violation]:
    with path.open("rb") as file:
        is_gzip = file.read(2) == b"\x1f\x8b"
    if is_gzip == path.name.endswith(".gz"):
        return []
    what = "gzip, but its name does not end in .gz" if is_gzip else "named .gz, but is not gzip"
    return [Violation(None, "file-name", f"the file is {what}; QuPath goes by the name")]


def _top_level(document: Json) -> tuple[list[Json], list[tuple[str, str]]]:
    """Return the features and what is wrong around them."""
    wrong: list[tuple[str, str]] = []
    if not isinstance(document, dict):
        message = f"expected an object or an array, got {str(document)[:40]!r}"
        is_array = isinstance(document, list)
        return (document, []) if is_array else ([], [("top-level", message)])
    if "crs" in document:
        wrong.append(("crs", "has a crs; QuPath counts in pixels and knows none"))
    foreign = cells_of(document)
    if foreign is not None:
        kind, cells = foreign
        message = f"is {kind}'s own format, not GeoJSON; --fix converts its {len(cells)} cells"
        return features_of(cells, document.get("type_map")), [*wrong, ("top-level", message)]
    features = document.get("features")
    if isinstance(features, list):
        if document.get("type") != "FeatureCollection":
            wrong.append(("top-level", "its type is not 'FeatureCollection'"))
        return features, wrong
    if document.get("type") == "Feature":
        return [document], wrong
    if "features" not in document and ("coordinates" in document or "geometries" in document):
        bare = {"type": "Feature", "geometry": document, "properties": {"objectType": "annotation"}}
        return [bare], wrong
    message = "expected a FeatureCollection, an array of features, a Feature or a geometry"
    return [], [*wrong, ("top-level", message)]


def _check_features(features: list[Json]) -> Iterator[Violation]:
    ids: set[str] = set()
    for index, top in enumerate(features):
        waiting = [(top, 0)]
        while waiting:
            feature, depth = waiting.pop()
            if depth > MAX_CHILD_DEPTH:
                message = f"children are nested more than {MAX_CHILD_DEPTH} deep"
                yield Violation(index, "childObjects", message)
                break
            for rule, message in rules_broken(feature):
                yield Violation(index, rule, message if depth == 0 else f"child: {message}")
            if not isinstance(feature, dict):
                continue
            identity = feature.get("id")
            if isinstance(identity, str):
                if identity.lower() in ids:
                    yield Violation(index, "id-duplicate", f"id '{identity[:60]}' occurs twice")
                ids.add(identity.lower())
            waiting.extend((child, depth + 1) for child in reversed(children_of(feature)))


def children_of(feature: dict[str, Any]) -> list[Json]:
    """Return the nested features of one."""
    properties = feature.get("properties")
    found = (properties.get(key) for key in CHILD_KEYS) if isinstance(properties, dict) else ()
    return [child for part in found if isinstance(part, list) for child in part]
