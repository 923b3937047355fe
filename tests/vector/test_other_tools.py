"""Files of other tools, and the shapes that QuPath refuses: found, named and repaired."""

import json
import math

import pytest
import shapely

from wsiseg.errors import GeoJSONError
from wsiseg.vector.check import check_file, fix_file
from wsiseg.vector.qupath_read import read_annotations

SQUARE = [[0, 0], [10, 0], [10, 10], [0, 10], [0, 0]]
HOLE = [[2, 2], [4, 2], [4, 4], [2, 4], [2, 2]]


def moved(ring, x, y):
    return [[a + x, b + y] for a, b in ring]


def polygon(*rings):
    return {"type": "Polygon", "coordinates": list(rings)}


def multi(*parts):
    return {"type": "MultiPolygon", "coordinates": [[part] for part in parts]}


def feature(geometry, name="Tumor"):
    return {
        "type": "Feature",
        "geometry": geometry,
        "properties": {
            "objectType": "annotation",
            "classification": {"name": name, "color": [1, 2, 3]},
        },
    }


def write(path, document):
    path.write_text(json.dumps(document))
    return path


def area(path):
    return sum(
        shapely.Polygon(rings[0], rings[1:]).area
        for annotation in read_annotations(path)
        for rings in annotation.polygons
    )


# The shapes tried against QuPath's own geometry library: what it refuses, and what it takes.
SHAPES = {
    "bow-tie": (polygon([[0, 0], [9, 9], [9, 0], [0, 9], [0, 0]]), "geometry-invalid", 40.5),
    "spike": (
        polygon([[0, 0], [10, 0], [10, 10], [20, 10], [10, 10], [0, 10], [0, 0]]),
        "geometry-invalid",
        100,
    ),
    "hole outside shell": (polygon(SQUARE, moved(HOLE, 20, 0)), "geometry-invalid", None),
    "overlapping parts": (multi(SQUARE, moved(SQUARE, 5, 5)), "geometry-invalid", 175),
    "touches itself": (
        polygon([[0, 0], [4, 0], [4, 4], [8, 4], [8, 8], [4, 8], [4, 4], [0, 4], [0, 0]]),
        None,
        32,
    ),
    "hole shares an edge": (
        polygon(SQUARE, [[0, 2], [4, 2], [4, 4], [0, 4], [0, 2]]),
        None,
        92,
    ),
    "parts share an edge": (multi(SQUARE, moved(SQUARE, 10, 0)), None, 200),
    "repeated points": (polygon([[0, 0], [0, 0], *SQUARE[1:]]), None, 100),
    "clockwise": (polygon(SQUARE[::-1]), None, 100),
    "duplicate parts": (multi(SQUARE, SQUARE), None, 100),
    "collapsed": (polygon([[0, 0], [5, 0], [9, 0], [0, 0]]), "geometry-empty", None),
    "unclosed": (polygon(SQUARE[:-1]), "ring-open", 100),
    "three points": (polygon([[0, 0], [9, 0], [0, 0]]), "ring-short", None),
}


@pytest.mark.parametrize(("geometry", "rule", "whole"), SHAPES.values(), ids=SHAPES)
def test_a_shape_is_judged_as_by_qupath_and_repaired_to_the_same_area(
    tmp_path, geometry, rule, whole
):
    path = write(tmp_path / "x.geojson", [feature(polygon(SQUARE)), feature(geometry)])
    assert [(v.feature_index, v.rule) for v in check_file(path)] == ([(1, rule)] if rule else [])
    result = fix_file(path, tmp_path / "y.geojson")
    assert check_file(tmp_path / "y.geojson") == []
    kept = json.loads((tmp_path / "y.geojson").read_bytes())["features"]
    assert kept[0] == feature(polygon(SQUARE))
    if rule is None:
        assert kept[1] == feature(geometry)
        assert result.changes == result.dropped == []
    elif whole is None and len(kept) == 1:
        assert "feature 1" in result.dropped[0]
    elif whole is not None:
        assert area(tmp_path / "y.geojson") == 100 + whole


def tiatoolbox():
    """As `_semantic_segmentations_as_qupath_json` of tiatoolbox 2.1 writes it."""
    ring = [(float(x), float(y)) for x, y in SQUARE]
    return {
        "type": "FeatureCollection",
        "features": [
            {
                "type": "Feature",
                "geometry": {"type": kind, "coordinates": coordinates},
                "id": f"class_1_{i}",
                "properties": {"classification": {"name": "Tumour", "color": [31, 119, 180]}},
                "objectType": "annotation",
                "name": "Tumour",
                "class_value": 1,
            }
            for i, (kind, coordinates) in enumerate(
                [
                    ("Polygon", [ring]),
                    ("MultiPolygon", [[ring], [moved(SQUARE, 30, 0)]]),
                    ("Polygon", [[[0, 0], [9, 9], [9, 0], [0, 9], [0, 0]]]),
                ]
            )
        ],
    }


def cellvit():
    """As CellViT++ writes it: a bare array, all cells of a class in one MultiPolygon."""
    return [
        {
            "type": "Feature",
            "id": "9c1c2f9a-2f55-4c5f-8f7e-1d5b3f1e0a11",
            "geometry": multi(SQUARE, moved(SQUARE, 8, 8), moved(SQUARE, 50, 0), SQUARE[:-1]),
            "properties": {
                "objectType": "annotation",
                "classification": {"name": "Neoplastic", "color": [255, 0, 0]},
            },
        },
        {
            "type": "Feature",
            "id": "9c1c2f9a-2f55-4c5f-8f7e-1d5b3f1e0a12",
            "geometry": {"type": "MultiPoint", "coordinates": [[5.0, 5.0], [13.0, 13.0]]},
            "properties": {
                "objectType": "annotation",
                "classification": {"name": "Connective", "color": [0, 0, 255]},
            },
        },
    ]


def hovernet():
    """As HoVer-Net writes it: its own JSON, not GeoJSON."""
    return {
        "mag": 40,
        "nuc": {
            "1": {
                "bbox": [[0, 0], [10, 10]],
                "centroid": [5.0, 5.0],
                "contour": SQUARE[:-1],
                "type_prob": 0.9,
                "type": 2,
            },
            "2": {"centroid": [3.0, 3.0], "contour": [[0, 0], [1, 1]], "type_prob": 1, "type": 0},
        },
    }


def cellvit_cells():
    return {
        "wsi_metadata": {"magnification": 40},
        "type_map": {"1": "Neoplastic"},
        "cells": [{"contour": SQUARE[:-1], "type": 1, "type_prob": 0.75}, {"type": 1}, 7],
    }


def old_qupath():
    """As QuPath 0.2 and wsinfer write it: the type as id, measurements as a list."""
    return [
        {
            "type": "Feature",
            "id": "PathAnnotationObject",
            "geometry": polygon(SQUARE),
            "properties": {
                "classification": {"name": "Tumor", "colorRGB": -3670016},
                "isLocked": False,
                "measurements": [{"name": "prob", "value": 0.5}],
            },
        }
    ]


def trident():
    """As geopandas writes it for TRIDENT: a crs, and no object type or class."""
    return {
        "type": "FeatureCollection",
        "crs": {"type": "name", "properties": {"name": "urn:ogc:def:crs:EPSG::3857"}},
        "features": [
            {"type": "Feature", "properties": {"tissue_id": 0}, "geometry": polygon(SQUARE, HOLE)}
        ],
    }


@pytest.mark.parametrize(
    ("document", "found", "classes", "whole"),
    [
        (tiatoolbox(), {"id", "objectType", "geometry-invalid"}, ["Tumour"] * 3, 340.5),
        (cellvit(), {"ring-open"}, ["Neoplastic"], 296),
        (hovernet(), {"top-level", "ring-short"}, ["type 2"], 100),
        (
            cellvit_cells(),
            {"top-level", "coordinates", "ring-short", "feature"},
            ["Neoplastic"],
            100,
        ),
        (old_qupath(), {"id", "objectType"}, ["Tumor"], 100),
        (trident(), {"crs", "objectType"}, [None], 96),
    ],
    ids=["tiatoolbox", "cellvit", "hovernet", "cellvit-cells", "old-qupath", "trident"],
)
def test_the_defects_of_other_tools_are_found_and_repaired(
    tmp_path, document, found, classes, whole
):
    path = write(tmp_path / "x.geojson", document)
    violations = check_file(path)
    assert {v.rule for v in violations} <= found
    assert violations
    assert all(v.feature_index is not None or v.rule in ("crs", "top-level") for v in violations)
    result = fix_file(path, tmp_path / "y.geojson")
    assert result.changes
    assert check_file(tmp_path / "y.geojson") == []
    assert [a.class_name for a in read_annotations(tmp_path / "y.geojson")] == classes
    assert area(tmp_path / "y.geojson") == whole


def test_cells_of_other_tools_become_detections_with_class_and_probability(tmp_path):
    path = write(tmp_path / "x.json", hovernet())
    (message,) = [v.message for v in check_file(path) if v.rule == "top-level"]
    assert "HoVer-Net" in message
    assert "--fix" in message
    result = fix_file(path, tmp_path / "y.geojson")
    (cell,) = json.loads((tmp_path / "y.geojson").read_bytes())["features"]
    assert cell["geometry"]["coordinates"] == [SQUARE]
    assert cell["properties"]["objectType"] == "detection"
    assert cell["properties"]["measurements"] == {"Type probability": 0.9}
    assert "feature 1: left out" in result.dropped[0]


def test_a_file_of_cells_without_one_has_nothing_to_repair(tmp_path):
    path = write(tmp_path / "x.json", {"nuc": {}})
    with pytest.raises(GeoJSONError, match="nothing to repair"):
        fix_file(path, tmp_path / "y.geojson")


def test_what_qupath_exports_passes_and_is_read(tmp_path):
    child = feature(polygon(HOLE), "Nucleus")
    parent = feature({**polygon(SQUARE), "isEllipse": True, "plane": {"c": -1, "z": 0, "t": 0}})
    parent["properties"] |= {
        "childObjects": [child],
        "measurements": {"a": "NaN", "b": "Infinity", "c": 1.5},
        "metadata": {"k": "v"},
    }
    text = json.dumps([parent]).replace('"metadata"', '"metadata": {"k": "v"}, "metadata"')
    (tmp_path / "x.geojson").write_text(text)
    assert check_file(tmp_path / "x.geojson") == []
    outer, inner = read_annotations(tmp_path / "x.geojson")
    assert shapely.Polygon(outer.polygons[0][0]).area == pytest.approx(math.pi * 25, rel=2e-3)
    assert (inner.class_name, inner.index) == ("Nucleus", 0)
