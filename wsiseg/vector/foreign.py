"""Cells in the own formats of HoVer-Net and CellViT++, as GeoJSON features.

Both are JSON, but no GeoJSON: an object with the cells under "nuc" (by number) or "cells" (a
list), each with "contour", "type" and "type_prob". QuPath opens neither.
"""

from typing import Any

from wsiseg.classes import PALETTE


def cells_of(document: object) -> tuple[str, list[Any]] | None:
    """Return (format, cells) of a document in such a format, None for any other."""
    if not isinstance(document, dict) or "features" in document:
        return None
    found = document.get("nuc")
    if isinstance(found, dict):
        return "HoVer-Net", list(found.values())
    found = document.get("cells")
    return ("CellViT++", found) if isinstance(found, list) else None


def features_of(cells: list[Any], names: object) -> list[Any]:
    """Return a feature for each cell, not repaired yet.

    `names` : the document's "type_map", which names the types, if it has one.
    """
    known = names if isinstance(names, dict) else {}
    return [_feature(cell, known) if isinstance(cell, dict) else cell for cell in cells]


def _feature(cell: dict[str, Any], names: dict[str, Any]) -> dict[str, Any]:
    contour = cell.get("contour")
    closed = [*contour, contour[0]] if isinstance(contour, list) and contour else []
    properties: dict[str, Any] = {"objectType": "detection"}
    kind = cell.get("type")
    if type(kind) is int:
        name = names.get(str(kind), f"type {kind}")
        properties["classification"] = {"name": name, "color": list(PALETTE[kind % len(PALETTE)])}
    probability = cell.get("type_prob")
    if type(probability) is float:
        properties["measurements"] = {"Type probability": probability}
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [closed]},
        "properties": properties,
    }
