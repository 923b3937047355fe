"""Repair features until they break none of `wsiseg.vector.rules`; what is right stays."""

import copy
import json
import uuid
from typing import Any

import numpy as np
import shapely

from wsiseg.classes import PALETTE
from wsiseg.vector.features import NAMESPACE
from wsiseg.vector.qupath_read import MAX_COORDINATE_PX
from wsiseg.vector.rounding import GRID_PX
from wsiseg.vector.rules import (
    CHILD_KEYS,
    FORBIDDEN_IN_CLASS,
    MAX_CHILD_DEPTH,
    OBJECT_TYPE_KEYS,
    OBJECT_TYPES,
    is_color,
    is_measurement,
    is_number,
    points_of,
    rules_broken,
)

_GEOMETRY_RULES = {
    "coordinates",
    "geometry",
    "geometry-type",
    "geometry-invalid",
    "geometry-empty",
    "ring-open",
    "ring-short",
}


class Repair:
    """Repairs the features of one file; `changes` and `dropped` say what it did."""

    def __init__(self) -> None:
        self.changes: list[str] = []
        self.dropped: list[str] = []
        self._ids: set[str] = set()

    def features(self, features: list[Any]) -> list[dict[str, Any]]:
        """Return repaired copies; children of a feature that is left out take its place."""
        kept: list[dict[str, Any]] = []
        for index, feature in enumerate(features):
            kept += self._feature(copy.copy(feature), index, depth=0)
        return kept

    def _feature(self, feature: object, index: int, *, depth: int) -> list[dict[str, Any]]:
        if not isinstance(feature, dict):
            self.dropped.append(f"feature {index}: left out: not an object")
            return []
        if depth > MAX_CHILD_DEPTH:
            self.dropped.append(f"feature {index}: left out: nested too deeply")
            return []
        broken = dict(rules_broken(feature))
        properties = feature.get("properties")
        feature["properties"] = properties = (
            dict(properties) if isinstance(properties, dict) else {}
        )
        children = self._children(properties, index, depth)
        if broken:
            why = self._repair_geometry(feature) if _GEOMETRY_RULES & {*broken} else None
            if why is not None:
                self.dropped.append(f"feature {index}: left out: {why}")
                return children
            _repair_properties(feature, properties)
            feature["type"] = "Feature"
            self.changes += [f"feature {index}: {rule}: {text}" for rule, text in broken.items()]
        if children:
            properties[CHILD_KEYS[0]] = children
        self._repair_id(feature, index, is_wrong="id" in broken)
        return [feature]

    def _children(self, properties: dict[str, Any], index: int, depth: int) -> list[dict[str, Any]]:
        found = [properties.pop(key, None) for key in CHILD_KEYS]
        return [
            kept
            for part in found
            if isinstance(part, list)
            for child in part
            for kept in self._feature(copy.copy(child), index, depth=depth + 1)
        ]

    def _repair_id(self, feature: dict[str, Any], index: int, *, is_wrong: bool) -> None:
        identity = feature.get("id")
        is_double = isinstance(identity, str) and identity.lower() in self._ids
        if is_double and not is_wrong:
            self.changes.append(f"feature {index}: id-duplicate: new id for '{identity}'")
        if is_wrong or is_double:
            shape = json.dumps(feature["geometry"], sort_keys=True)
            seed = f"{index}/{len(self._ids)}/{shape}"
            feature["id"] = str(uuid.uuid5(NAMESPACE, seed))
        if "id" in feature:
            self._ids.add(feature["id"].lower())

    @staticmethod
    def _repair_geometry(feature: dict[str, Any]) -> str | None:
        """Put a valid geometry into a feature, or return why there is none."""
        geometry = feature.get("geometry")
        if not isinstance(geometry, dict):
            return "it has no geometry"
        parts = _parts(geometry)
        if not parts:
            return f"no area can be made of its {str(geometry.get('type'))[:40]}"
        with np.errstate(all="ignore"):  # of numbers like 1e-200
            shape = shapely.set_precision(shapely.union_all(parts), GRID_PX)
        polygons = [p for p in shapely.get_parts(shape) if p.geom_type == "Polygon" and p.area > 0]
        if not polygons:
            return "it has no area"
        coordinates = [
            [_rounded(ring) for ring in (polygon.exterior, *polygon.interiors)]
            for polygon in polygons
        ]
        others = {k: v for k, v in geometry.items() if k not in ("geometries", "isEllipse")}
        if geometry.get("isEllipse") is True:
            others["isEllipse"] = True
        single = len(coordinates) == 1
        feature["geometry"] = {
            **others,
            "type": "Polygon" if single else "MultiPolygon",
            "coordinates": coordinates[0] if single else coordinates,
        }
        return None


def _rounded(ring: shapely.LinearRing) -> list[list[float]]:
    points: list[list[float]] = np.round(np.asarray(ring.coords), 2).tolist()
    return points


def _parts(geometry: dict[str, Any]) -> list[shapely.Geometry]:
    """Return the valid polygons in a geometry, those of collections included."""
    shapes: list[shapely.Geometry] = []
    waiting: list[Any] = [geometry]
    while waiting:
        here = waiting.pop()
        if not isinstance(here, dict):
            continue
        inner, coordinates = here.get("geometries"), here.get("coordinates")
        if isinstance(inner, list):
            waiting.extend(reversed(inner))
        if not isinstance(coordinates, list):
            continue
        if here.get("type") == "Polygon":
            shapes += _polygon(coordinates)
        elif here.get("type") == "MultiPolygon":
            shapes += [p for part in coordinates if isinstance(part, list) for p in _polygon(part)]
    return shapes


def _polygon(rings: list[Any]) -> list[shapely.Geometry]:
    """Return a polygon made valid, without points that are none and rings that are too short."""
    usable = []
    for i, ring in enumerate(rings):
        points = points_of([p for p in ring if _is_point(p)] if isinstance(ring, list) else None)
        if points is not None and len(points) >= 3:
            usable.append(points)
        elif i == 0:
            return []
    if not usable:
        return []
    shape = shapely.make_valid(shapely.Polygon(usable[0], usable[1:]))
    return [p for p in shapely.get_parts(shapely.get_parts(shape)) if p.geom_type == "Polygon"]


def _is_point(value: object) -> bool:
    return (
        isinstance(value, list)
        and len(value) >= 2
        and all(is_number(c) and abs(c) <= MAX_COORDINATE_PX for c in value[:2])
    )


def _repair_properties(feature: dict[str, Any], properties: dict[str, Any]) -> None:
    beside = [feature.pop(key, None) for key in OBJECT_TYPE_KEYS[:2]]
    inside = [properties.get(key) for key in OBJECT_TYPE_KEYS]
    known = [t for t in (*inside, *beside) if isinstance(t, str) and t in OBJECT_TYPES]
    first = next((key for key in OBJECT_TYPE_KEYS if key in properties), OBJECT_TYPE_KEYS[0])
    if properties.get(first) not in OBJECT_TYPES:
        properties[OBJECT_TYPE_KEYS[0]] = known[0] if known else OBJECT_TYPES[0]
    if "classification" in properties:
        _repair_class(properties)
    if not isinstance(properties.get("name"), str):
        properties.pop("name", None)
    color = properties.get("color")
    if type(color) is not int and (color is None or not is_color(color)):
        properties.pop("color", None)
    if not isinstance(properties.get("isLocked"), bool):
        properties.pop("isLocked", None)
    if "measurements" in properties:
        properties["measurements"] = _measurements(properties["measurements"])
    if "metadata" in properties:
        properties["metadata"] = _metadata(properties["metadata"])


def _repair_class(properties: dict[str, Any]) -> None:
    """Give a class a colour, and split its name at ':' into the levels that QuPath means."""
    found = properties.pop("classification")
    entry = dict(found) if isinstance(found, dict) else {"name": found}
    names = entry.get("names") if isinstance(entry.get("names"), list) else [entry.get("name")]
    levels = [
        level.strip()
        for name in names or []
        if isinstance(name, str)
        for level in FORBIDDEN_IN_CLASS.split(name)
        if level.strip()
    ]
    if not levels:
        return
    if isinstance(found, str) and levels == [found]:
        properties["classification"] = found
        return
    color: Any = entry.get("color")
    if not is_color(color) or color is None:
        color = [entry["colorRGB"]] if type(entry.get("colorRGB")) is int else None
    if color is None:
        color = list(PALETTE[sum(": ".join(levels).encode("utf-8", "replace")) % len(PALETTE)])
    named = {"name": levels[0]} if len(levels) == 1 else {"names": levels}
    properties["classification"] = {**named, "color": color}


def _measurements(value: object) -> dict[str, Any]:
    if isinstance(value, list):
        items = [(i.get("name"), i.get("value")) for i in value if isinstance(i, dict)]
    else:
        items = list(value.items()) if isinstance(value, dict) else []
    return {str(key): number for key, number in items if is_measurement(number)}


def _metadata(value: object) -> dict[str, Any]:
    items = value.items() if isinstance(value, dict) else ()
    return {k: v for k, v in items if v is not None and not isinstance(v, dict | list)}
