"""QuPath's rules for one GeoJSON feature, each a function that says what breaks it.

Some make QuPath refuse the whole file (a ring left open, a polygon that crosses itself, a class
without a colour); others make it drop something without a word (an id that is no UUID).
"""

import math
import re
from collections.abc import Callable, Iterator
from itertools import chain
from typing import Any

import numpy as np
import numpy.typing as npt
import shapely

from wsiseg.vector.qupath_read import MAX_COORDINATE_PX
from wsiseg.vector.rounding import GRID_PX

Found = Iterator[tuple[str, str]]
"""(rule, message) of each thing wrong."""

OBJECT_TYPES = ("annotation", "detection", "cell", "tile", "tmaCore", "root")
OBJECT_TYPE_KEYS = ("objectType", "object_type", "type")
CHILD_KEYS = ("childObjects", "children")

MAX_CHILD_DEPTH = 50
"""Children of children; QuPath reads them by recursion, and no real hierarchy is deeper than 5."""

FORBIDDEN_IN_CLASS = re.compile(r"[:\x00-\x1f\x7f]")
"""QuPath splits "Tumor: Positive" into two levels, which have to be given as `names`."""

_UUID = re.compile(r"[0-9a-fA-F]{8}-(?:[0-9a-fA-F]{4}-){3}[0-9a-fA-F]{12}")

_RINGS_DEPTH = {"Polygon": 2, "MultiPolygon": 3}
_POINTS_DEPTH = {"Point": 0, "MultiPoint": 1, "LineString": 1, "MultiLineString": 2}


def rules_broken(feature: object) -> Found:
    """Yield what is wrong with one feature; its children are not looked at."""
    if not isinstance(feature, dict):
        yield "feature", f"expected an object, got {_short(feature)}"
        return
    if feature.get("type") != "Feature":
        yield "feature", f"type is {_short(feature.get('type'))}, expected 'Feature'"
    if "id" in feature and not is_uuid(feature["id"]):
        yield "id", f"id {_short(feature['id'])} is not a UUID; QuPath replaces it by a random one"
    yield from _geometry(feature)
    properties = feature.get("properties", {})
    if not isinstance(properties, dict):
        yield "properties", f"expected an object, got {_short(properties)}"
        properties = {}
    yield from _object_type(feature, properties)
    for key, check in _PROPERTY_CHECKS.items():
        if key in properties:
            yield from check(properties[key])


def is_uuid(value: object) -> bool:
    """Whether a value is the text of a UUID."""
    return isinstance(value, str) and _UUID.fullmatch(value) is not None


def is_number(value: object) -> bool:
    """Whether a value is a finite JSON number (a boolean is none)."""
    return isinstance(value, int | float) and not isinstance(value, bool) and _is_finite(value)


def is_color(value: object) -> bool:
    """Whether a value is [], null, [packed], [r, g, b] or [r, g, b, a]."""
    if value is None:
        return True
    if not isinstance(value, list) or any(type(part) is not int for part in value):
        return False
    return len(value) < 2 or (len(value) in (3, 4) and all(0 <= part <= 255 for part in value))


def is_measurement(value: object) -> bool:
    """Whether QuPath takes a value as a measurement: numbers, and text that spells one."""
    if isinstance(value, str):
        try:
            float(value)
        except ValueError:
            return False
        return True
    return is_number(value)


def on_grid(shape: shapely.Geometry) -> shapely.Geometry | None:
    """Return a polygon on QuPath's grid, None if that fails; GEOS fails on just what JTS does."""
    with np.errstate(all="ignore"):  # of numbers like 1e-200
        rounded = shapely.transform(shape, lambda points: np.round(points, 2))
        if shapely.is_valid(rounded):  # as snapping would give, in a tenth of the time
            return rounded
    try:
        with np.errstate(all="ignore"):
            return shapely.set_precision(shape, GRID_PX)
    except shapely.errors.GEOSException:
        return None


def points_of(value: object) -> npt.NDArray[np.float64] | None:
    """Return a ring or line of a file as float64 (n, 2), None if it is no list of points."""
    if not isinstance(value, list) or {*map(type, value)} - {list}:
        return None
    sizes = {*map(len, value)}
    if sizes and min(sizes) < 2:
        return None
    if {*map(type, chain.from_iterable(value))} - {int, float}:
        return None
    pairs = value if sizes == {2} else [p[:2] for p in value]
    try:
        return np.array(pairs, np.float64).reshape(-1, 2)
    except OverflowError:
        return None


def _are_near(points: npt.NDArray[np.float64]) -> bool:
    return bool((np.abs(points) <= MAX_COORDINATE_PX).all())


def _is_finite(value: float) -> bool:
    try:
        return math.isfinite(value)
    except OverflowError:
        return False


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _geometry(feature: dict[str, Any]) -> Found:
    geometry = feature.get("geometry")
    if not isinstance(geometry, dict):
        what = "null" if geometry is None else _short(geometry)
        yield "geometry", f"geometry is {what}, expected an object; QuPath refuses the file"
        return
    if not geometry:
        return  # an object without a shape, such as the root
    kind = geometry.get("type")
    if kind == "GeometryCollection":
        yield "geometry-type", "QuPath cannot read a GeometryCollection"
    elif isinstance(kind, str) and kind in _RINGS_DEPTH:
        yield from _polygons(geometry, _RINGS_DEPTH[kind])
    elif isinstance(kind, str) and kind in _POINTS_DEPTH:
        yield from _points(geometry, _POINTS_DEPTH[kind])
    else:
        yield "geometry-type", f"{_short(kind)} is no type of geometry that QuPath knows"


def _points(geometry: dict[str, Any], depth: int) -> Found:
    coordinates = geometry.get("coordinates")
    lines: Any = [[coordinates]] if depth == 0 else [coordinates] if depth == 1 else coordinates
    if not isinstance(lines, list):
        lines = [None]
    for line in lines:
        points = points_of(line)
        if points is None or not _are_near(points):
            yield "coordinates", f"not points of two finite numbers: {_short(line)}"
            return


def _polygons(geometry: dict[str, Any], depth: int) -> Found:
    coordinates = geometry.get("coordinates")
    parts: Any = [coordinates] if depth == 2 else coordinates
    if (
        not isinstance(parts, list)
        or not parts
        or not all(isinstance(p, list) and p for p in parts)
    ):
        yield "coordinates", f"{geometry['type']} without rings: {_short(coordinates)}"
        return
    broken = False
    shapes = []
    all_rings: list[npt.NDArray[np.float64]] = []
    for part in parts:
        rings = [points_of(ring) for ring in part]
        found = [problem for ring in rings for problem in _ring(ring)]
        yield from found
        broken |= bool(found)
        if not found:
            shapes.append(shapely.Polygon(rings[0], rings[1:]))
            all_rings += [ring for ring in rings if ring is not None]
    if broken or geometry.get("isEllipse") is True:
        return  # of an ellipse only the bounding box counts
    shape = shapes[0] if len(shapes) == 1 else shapely.MultiPolygon(shapes)
    rounded = on_grid(shape)
    if rounded is None:
        reason = shapely.is_valid_reason(shape)
        yield "geometry-invalid", f"{reason}; QuPath 0.6 and later refuse the whole file"
    elif shapely.is_empty(rounded):
        yield "geometry-empty", f"nothing is left after rounding to {GRID_PX} px"
    else:
        tip = next((found for found in map(_spike, all_rings) if found is not None), None)
        if tip is not None:
            yield "geometry-invalid", f"spike to {tip}; QuPath 0.6 and later refuse the whole file"


def _spike(points: npt.NDArray[np.float64]) -> list[float] | None:
    """Return the tip of a ring's way out and straight back, on which JTS fails and GEOS may not."""
    steps = np.diff(points, axis=0)
    steps = steps[(steps != 0).any(axis=1)]
    after = np.roll(steps, -1, axis=0)
    turns_back = (steps[:, 0] * after[:, 1] == steps[:, 1] * after[:, 0]) & (
        (steps * after).sum(axis=1) < 0
    )
    if not turns_back.any():
        return None
    tip: list[float] = (points[0] + steps[: turns_back.argmax() + 1].sum(axis=0)).tolist()
    return tip


def _ring(points: npt.NDArray[np.float64] | None) -> Found:
    if points is None:
        yield "coordinates", "a ring is not a list of points of two numbers"
    elif not _are_near(points):
        yield "coordinates", "a coordinate is not a finite number, or absurdly far away"
    elif len(points) < 4:
        yield "ring-short", f"a ring has {len(points)} points, it needs at least 4"
    elif (points[0] != points[-1]).any():
        yield (
            "ring-open",
            f"a ring is not closed: it ends at {points[-1].tolist()}, not where it began",
        )


def _object_type(feature: dict[str, Any], properties: dict[str, Any]) -> Found:
    key = next((k for k in OBJECT_TYPE_KEYS if k in properties), None)
    if key is None:
        if any(k in feature for k in OBJECT_TYPE_KEYS[:2]):
            yield "objectType", "objectType stands beside properties, not in them"
        else:
            yield "objectType", "objectType is missing in properties; QuPath takes an annotation"
    elif properties[key] not in OBJECT_TYPES:
        yield "objectType", f"{_short(properties[key])} is none of {', '.join(OBJECT_TYPES)}"


def _classification(value: object) -> Found:
    if isinstance(value, str):
        yield from _class_name(value)
        return
    if not isinstance(value, dict):
        yield "class", f"classification is {_short(value)}, expected a name or an object"
        return
    names = value["names"] if isinstance(value.get("names"), list) else [value.get("name")]
    if not names:
        yield "class", "names is empty"
    for name in names:
        yield from _class_name(name)
    if "color" not in value and not is_number(value.get("colorRGB")):
        yield "class-color", f"class {_short(names)} has no color; QuPath refuses the whole file"
    elif not is_color(value.get("color")):
        yield "class-color", f"color {_short(value['color'])} is not [r, g, b]"


def _class_name(name: object) -> Found:
    if not isinstance(name, str):
        yield "class", f"the name of a class is {_short(name)}, expected text"
    elif not name.strip() or FORBIDDEN_IN_CLASS.search(name):
        yield "class-name", f"class {_short(name)} is empty or holds ':' or a control character"


def _name(value: object) -> Found:
    if not isinstance(value, str):
        yield "name", f"name is {_short(value)}, expected text; leave it out instead"


def _color(value: object) -> Found:
    if type(value) is not int and (value is None or not is_color(value)):
        yield "color", f"color is {_short(value)}, expected [r, g, b]; leave it out instead"


def _is_locked(value: object) -> Found:
    if not isinstance(value, bool):
        yield "isLocked", f"isLocked is {_short(value)}, expected true or false"


def _measurements(value: object) -> Found:
    if isinstance(value, dict):
        items = list(value.items())
    elif isinstance(value, list) and all(isinstance(i, dict) and "name" in i for i in value):
        items = [(i["name"], i.get("value")) for i in value]  # as QuPath wrote them before 0.4
    else:
        yield "measurements", f"expected {{name: number}}, got {_short(value)}"
        return
    for key, number in items:
        if not is_measurement(number):
            yield "measurements", f"{_short(key)} is {_short(number)}, expected a number"


def _metadata(value: object) -> Found:
    if not isinstance(value, dict):
        yield "metadata", f"expected an object, got {_short(value)}"
        return
    for key, entry in value.items():
        if entry is None or isinstance(entry, dict | list):
            yield "metadata", f"{_short(key)} is {_short(entry)}, expected text or a number"


def _children(value: object) -> Found:
    if not isinstance(value, list):
        yield "childObjects", f"expected a list of features, got {_short(value)}"


_PROPERTY_CHECKS: dict[str, Callable[[object], Found]] = {
    "classification": _classification,
    "name": _name,
    "color": _color,
    "isLocked": _is_locked,
    "measurements": _measurements,
    "metadata": _metadata,
    **dict.fromkeys(CHILD_KEYS, _children),
}
