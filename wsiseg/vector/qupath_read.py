"""Read annotations in any of QuPath's dialects of GeoJSON.

Nested children, keys that occur twice, bare arrays, features or geometries, ellipses, "NaN" as
text and classes in all their spellings are read; what cannot be used is named with the number of
its feature.
"""

import gzip
import json
import logging
import math
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import orjson
import shapely

from wsiseg.errors import AnnotationError
from wsiseg.geometry import Box

logger = logging.getLogger(__name__)

Ring = npt.NDArray[np.float64]

MAX_BYTES = 4 << 30
"""Text that a file may hold."""

MAX_UNPACKED_RATIO = 200
"""Bytes of text that a byte of gzip may unpack to; coordinates give five, zeros a thousand."""

MAX_UNPACKED_FREE_BYTES = 64 << 20
"""Up to this no ratio is asked for: a small file of equal features may well be packed tightly."""

_READ_BYTES = 16 << 20

MAX_CROSSINGS = 2000
"""Of an outline with itself. What a hand draws has a few; the repair of 4,500 takes 5 s, of 10,000
18 s, and a small file can hold millions."""

_SEGMENTS_AT_ONCE = 16

MAX_COORDINATE_PX = 1e9
"""Far beyond any slide, and near enough for areas to be computed without overflow."""

ELLIPSE_POINTS = 128

_TOUCHES_ITSELF = "Ring Self-intersection"
"""What GEOS calls a ring that meets itself in a point; its area is certain, so no mistake."""


@dataclass(frozen=True, slots=True)
class Annotation:
    """One annotation of a file.

    `polygons` : lists of rings float64 (n, 2) of (x, y) in level-0 pixels, closed, the outer one
    first. `index` : the number of its top-level feature in the file.
    """

    class_name: str | None
    polygons: list[list[Ring]]
    index: int


def read_annotations(
    path: Path, *, bounds: Box | None = None, may_name: bool = True
) -> list[Annotation]:
    """Return the area annotations of a QuPath GeoJSON, parents before their children.

    Points and lines have no area and are left out with a warning; polygons that cross themselves
    are repaired with a warning.

    Parameters
    ----------
    bounds
        The slide's bounds (MRXS): QuPath counts from their corner, we from that of level 0.
    may_name
        Whether messages may name the file; see `CohortEntry.may_name`.

    Raises
    ------
    AnnotationError
        The file is missing or is no GeoJSON, or a feature cannot be used.
    """
    place = _place(path, may_name=may_name)
    document = parse_document(read_text(path, place), place)
    offset = (0.0, 0.0) if bounds is None else (float(bounds.x), float(bounds.y))
    annotations = []
    num_without_area = 0
    repaired: list[str] = []
    for index, feature in flat_features(document, place):
        where = f"{place}: feature {index}"
        polygons = []
        for rings in _polygons(feature, where):
            reason = _why_invalid(rings)
            polygons += [rings] if reason is None else _made_valid(rings, where)
            if reason is not None and not reason.startswith(_TOUCHES_ITSELF):
                repaired.append(f"feature {index} ({reason})")
        if not polygons:
            num_without_area += 1
            continue
        moved = [[ring + offset for ring in polygon] for polygon in polygons]
        annotations.append(Annotation(class_name(feature, where), moved, index))
    if repaired:
        more = f" and {len(repaired) - 1} more" if len(repaired) > 1 else ""
        logger.warning("%s: repaired invalid polygons: %s%s", place, repaired[0], more)
    if num_without_area:
        logger.warning("%s: %d features without an area are left out", place, num_without_area)
    return annotations


def _place(path: Path, *, may_name: bool) -> str:
    return f"annotation '{path.name}'" if may_name else "annotation"


def read_text(path: Path, place: str) -> bytes:
    """Return a file's content, unpacked if it is gzip; AnnotationError if it cannot be read."""
    try:
        with path.open("rb") as raw:
            is_gzip = raw.read(2) == b"\x1f\x8b"
        limit = MAX_BYTES
        if is_gzip:
            packed = path.stat().st_size
            limit = min(limit, MAX_UNPACKED_FREE_BYTES + MAX_UNPACKED_RATIO * packed)
        with gzip.open(path) if is_gzip else path.open("rb") as file:
            parts = [file.read(min(_READ_BYTES, limit + 1))]
            while parts[-1] and sum(map(len, parts)) <= limit:
                parts.append(file.read(_READ_BYTES))
    except FileNotFoundError as error:
        where = f" in '{path.parent}'" if path.name in place else ""
        msg = f"{place}: no such file{where}"
        raise AnnotationError(msg) from error
    except (OSError, EOFError, zlib.error) as error:
        reason = getattr(error, "strerror", None) or error  # without the path
        msg = f"{place}: cannot be read: {reason}"
        raise AnnotationError(msg) from error
    text = b"".join(parts)
    if len(text) > limit:
        why = f"unpacks to more than {limit} bytes" if is_gzip else f"larger than {limit} bytes"
        msg = f"{place}: {why}; that is no annotation"
        raise AnnotationError(msg)
    return text.removeprefix(b"\xef\xbb\xbf")


def parse_document(text: bytes, place: str) -> Any:  # noqa: ANN401 - any JSON value
    """Parse JSON, also with the bare NaN and Infinity that lenient writers leave in it."""
    try:
        return orjson.loads(text)
    except orjson.JSONDecodeError:
        pass
    try:
        return json.loads(text.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        msg = f"{place}: not GeoJSON: {error}"
        raise AnnotationError(msg) from error


def flat_features(document: Any, place: str) -> Iterator[tuple[int, dict[str, Any]]]:  # noqa: ANN401
    """Yield (number of the top-level feature, feature), parents before their children."""
    for index, feature in enumerate(top_features(document, place)):
        waiting = [feature]
        while waiting:
            here = waiting.pop()
            if not isinstance(here, dict):
                msg = f"{place}: feature {index}: expected an object, got {str(here)[:40]!r}"
                raise AnnotationError(msg)
            yield index, here
            properties = here.get("properties")
            properties = properties if isinstance(properties, dict) else {}
            children = properties.get("childObjects") or properties.get("children") or []
            if not isinstance(children, list):
                msg = f"{place}: feature {index}: childObjects is not a list"
                raise AnnotationError(msg)
            waiting.extend(reversed(children))


def top_features(document: Any, place: str) -> list[Any]:  # noqa: ANN401
    """Return the features of a collection, an array, one feature or a bare geometry."""
    if isinstance(document, list):
        return document
    if isinstance(document, dict):
        if isinstance(document.get("features"), list):
            features: list[Any] = document["features"]
            return features
        if document.get("type") == "Feature":
            return [document]
        if "coordinates" in document or "geometries" in document:
            return [{"type": "Feature", "geometry": document, "properties": {}}]
    msg = f"{place}: not GeoJSON: expected a FeatureCollection, an array or a Feature"
    raise AnnotationError(msg)


def class_name(feature: dict[str, Any], where: str) -> str | None:
    """Return a feature's class, the levels of a derived one joined as QuPath shows them."""
    properties = feature.get("properties")
    found = properties.get("classification") if isinstance(properties, dict) else None
    if isinstance(found, dict):
        found = found.get("names") or found.get("name")
    if isinstance(found, list) and all(isinstance(part, str) for part in found):
        found = ": ".join(found)
    if found is None or isinstance(found, str):
        # Half of a surrogate pair is legal in JSON, but no text that could be written again.
        return found.encode("utf-8", "replace").decode("utf-8") if found else None
    msg = f"{where}: its classification is {_short(found)!r}, expected a name"
    raise AnnotationError(msg)


def read_class_names(path: Path, *, may_name: bool = True) -> set[str]:
    """Return the classes of all area annotations of a file, without looking at their outlines.

    Raises
    ------
    AnnotationError
        The file is missing or is no GeoJSON, or a classification is not one.
    """
    place = _place(path, may_name=may_name)
    found: set[str] = set()
    for index, feature in flat_features(parse_document(read_text(path, place), place), place):
        geometry = feature.get("geometry")
        kind = geometry.get("type") if isinstance(geometry, dict) else None
        name = class_name(feature, f"{place}: feature {index}")
        if name is not None and kind in ("Polygon", "MultiPolygon", "GeometryCollection"):
            found.add(name)
    return found


def _polygons(feature: dict[str, Any], where: str) -> list[list[Ring]]:
    """Return the polygons of a feature, closed, holes kept; none for points and lines."""
    polygons: list[list[Ring]] = []
    waiting = [feature.get("geometry")]
    while waiting:
        geometry = waiting.pop()
        if not geometry:
            continue
        if not isinstance(geometry, dict):
            msg = f"{where}: its geometry is {str(geometry)[:40]!r}, expected an object"
            raise AnnotationError(msg)
        inner = geometry.get("geometries")
        if geometry.get("type") == "GeometryCollection" and isinstance(inner, list):
            waiting.extend(reversed(inner))
            continue
        for part in _parts(geometry, where):
            rings = [_ring(ring, where) for ring in part]
            polygons.append([_ellipse(rings[0])] if geometry.get("isEllipse") else rings)
    return polygons


def _parts(geometry: dict[str, Any], where: str) -> list[list[Any]]:
    """Return the polygons of one geometry as they stand in the file."""
    kind, coordinates = geometry.get("type"), geometry.get("coordinates")
    if kind not in ("Polygon", "MultiPolygon"):
        return []
    parts = [coordinates] if kind == "Polygon" else coordinates
    if not isinstance(parts, list) or not all(isinstance(p, list) and p for p in parts):
        msg = f"{where}: its {kind} has no coordinates"
        raise AnnotationError(msg)
    return parts


def _ring(points: Any, where: str) -> Ring:  # noqa: ANN401 - comes from a file
    try:
        ring = _fast_ring(points)
        if ring is None:
            ring = np.array([[float(p[0]), float(p[1])] for p in points], np.float64)
    except (TypeError, ValueError, IndexError, KeyError, OverflowError) as error:
        msg = f"{where}: a coordinate is not a pair of numbers ({_short(error)})"
        raise AnnotationError(msg) from error
    if len(ring) < 3:
        msg = f"{where}: a ring has {len(ring)} points, it needs at least 3"
        raise AnnotationError(msg)
    if not np.isfinite(ring).all():
        msg = f"{where}: a coordinate is not a finite number"
        raise AnnotationError(msg)
    if np.abs(ring).max() > MAX_COORDINATE_PX:
        msg = f"{where}: a coordinate is {np.abs(ring).max():.3g} px, beyond any slide"
        raise AnnotationError(msg)
    return ring if (ring[0] == ring[-1]).all() else np.concatenate([ring, ring[:1]])


def _fast_ring(points: Any) -> Ring | None:  # noqa: ANN401 - comes from a file
    """Return a ring of plain pairs of numbers, None if it needs a closer look."""
    if not isinstance(points, list) or {*map(type, points)} != {list}:
        return None
    if {*map(len, points)} != {2} or {*map(type, chain.from_iterable(points))} - {int, float}:
        return None
    return np.array(points, np.float64)


def _short(value: object) -> str:
    text = str(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _ellipse(box: Ring) -> Ring:
    """Return the ellipse in the bounding box of a ring; QuPath stores nothing else of it."""
    low, high = box.min(axis=0), box.max(axis=0)
    angles = np.linspace(0, 2 * math.pi, ELLIPSE_POINTS, endpoint=False)
    circle = np.stack([np.cos(angles), np.sin(angles)], axis=1)
    ring: Ring = (low + high) / 2 + circle * (high - low) / 2
    return np.concatenate([ring, ring[:1]])


def _why_invalid(rings: list[Ring]) -> str | None:
    polygon = shapely.Polygon(rings[0], rings[1:])
    return None if polygon.is_valid else shapely.is_valid_reason(polygon)


def _made_valid(rings: list[Ring], where: str) -> list[list[Ring]]:
    if _crosses_itself_more_than(MAX_CROSSINGS, rings):
        msg = (
            f"{where}: its outline crosses itself more than {MAX_CROSSINGS} times; draw it again "
            "in QuPath, or remove it"
        )
        raise AnnotationError(msg)
    shape = shapely.make_valid(shapely.Polygon(rings[0], rings[1:]))
    return [
        [np.asarray(part.exterior.coords), *(np.asarray(hole.coords) for hole in part.interiors)]
        for part in shapely.get_parts(shapely.get_parts(shape))
        if isinstance(part, shapely.Polygon) and part.area > 0
    ]


def _crosses_itself_more_than(limit: int, rings: list[Ring]) -> bool:
    """Count crossings a few segments at a time, as all of them may be the square of the points."""
    ends = np.concatenate([np.stack([ring[:-1], ring[1:]], axis=1) for ring in rings])
    segments = np.asarray(shapely.linestrings(ends))
    tree = shapely.STRtree(segments)
    count = 0
    for first in range(0, len(segments), _SEGMENTS_AT_ONCE):
        part = segments[first : first + _SEGMENTS_AT_ONCE]
        count += tree.query(part, predicate="crosses").shape[1]
        if count > 2 * limit:  # each pair is found from both sides
            return True
    return False
