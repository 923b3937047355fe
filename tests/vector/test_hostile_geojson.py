"""GeoJSON that means harm: read and repaired, or refused with the number of its feature."""

import gzip
import json
import re
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from soak import examples

from wsiseg.classes import ClassTable
from wsiseg.errors import AnnotationError
from wsiseg.vector.check import check_file, fix_file
from wsiseg.vector.labels import check_annotations
from wsiseg.vector.qupath_read import read_annotations

SQUARE = [[0, 0], [10, 0], [10, 10], [0, 10], [0, 0]]
NAMES = (
    "__proto__",
    "constructor",
    "<img src=x onerror=alert(1)>",
    "\u202egnp.exe",
    "a\u200bb",
    "\ud800",
    "../../etc/passwd",
    "N" * 4_000_000,
    "",
    "\x00",
    "{{7*7}}",
    "'; DROP TABLE annotations; --",
)
NUMBERS = st.sampled_from(
    [0, 1, 5.5, -3, 1e308, -1e308, 1e-308, 10**30, float("nan"), float("inf"), "NaN", "7", True]
) | st.floats(-100, 100)
POINTS: st.SearchStrategy[Any] = st.lists(NUMBERS, min_size=0, max_size=4) | st.sampled_from(
    [None, 7, "xy", {}]
)
RINGS = st.lists(POINTS, max_size=6) | st.sampled_from(
    [SQUARE, SQUARE[:-1], SQUARE[::-1], None, [[0, 0], [9, 9], [9, 0], [0, 9], [0, 0]]]
)
COORDINATES = st.recursive(RINGS, lambda inner: st.lists(inner, max_size=3), max_leaves=6)
GEOMETRIES: st.SearchStrategy[Any] = st.recursive(
    st.sampled_from([None, {}, [], "Polygon", {"type": "Polygon"}])
    | st.fixed_dictionaries(
        {
            "type": st.sampled_from(
                ["Polygon", "MultiPolygon", "Point", "LineString", "GeometryCollection", None, 3]
            ),
            "coordinates": COORDINATES,
        },
        optional={"isEllipse": st.booleans(), "plane": st.none()},
    ),
    lambda inner: st.fixed_dictionaries(
        {"type": st.just("GeometryCollection"), "geometries": st.lists(inner, max_size=3)}
    ),
    max_leaves=4,
)
CLASSES: st.SearchStrategy[Any] = st.sampled_from(
    [n for n in NAMES if len(n) < 100]
) | st.sampled_from([None, 3, [], {}])
PROPERTIES: st.SearchStrategy[Any] = st.none() | st.fixed_dictionaries(
    {},
    optional={
        "classification": CLASSES | st.fixed_dictionaries({"name": CLASSES, "color": NUMBERS}),
        "measurements": st.dictionaries(st.text(max_size=3), NUMBERS, max_size=2),
        "childObjects": st.sampled_from([None, [], [None], [{}], {"a": 1}]),
        "objectType": CLASSES,
        "__proto__": st.just({"polluted": True}),
    },
)
FEATURES = st.fixed_dictionaries(
    {"geometry": GEOMETRIES, "properties": PROPERTIES},
    optional={"type": st.sampled_from(["Feature", None]), "id": CLASSES},
)


@pytest.mark.parametrize("num", [200, 100_000])
def test_an_outline_that_crosses_itself_thousands_of_times_is_refused(tmp_path, num):
    """Its repair would take from seconds to years."""
    ring = np.random.default_rng(0).random((num, 2)) * 1000
    ring[-1] = ring[0]
    square = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [SQUARE]}}
    tangle = {"type": "Feature", "geometry": {"type": "Polygon", "coordinates": [ring.tolist()]}}
    (tmp_path / "a.geojson").write_text(json.dumps([square, tangle]))
    with pytest.raises(AnnotationError, match="feature 1: its outline crosses itself more than"):
        read_annotations(tmp_path / "a.geojson")


@examples(pr=500, night=100_000)
@given(st.lists(FEATURES, max_size=3))
def test_any_features_are_read_or_refused_by_number_and_can_be_repaired(tmp_path_factory, features):
    folder = tmp_path_factory.getbasetemp() / "hostile"
    folder.mkdir(exist_ok=True)
    path = folder / "x.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    try:
        read_annotations(path)
    except AnnotationError as error:
        (number,) = re.findall(r"feature (\d+): ", str(error))
        assert int(number) < len(features)
        assert len(str(error)) < 400
    for violation in check_file(path):
        assert violation.rule == "json" or (violation.feature_index or 0) < max(1, len(features))
        assert len(violation.message) < 400
    fix_file(path, folder / "y.geojson")
    assert check_file(folder / "y.geojson") == []


def test_a_small_file_that_unpacks_to_gigabytes_is_refused_before_it_does(tmp_path):
    path = tmp_path / "bomb.geojson.gz"
    path.write_bytes(25 * gzip.compress(b" " * (16 << 20)))  # members one after the other
    assert path.stat().st_size < 1 << 20
    with pytest.raises(AnnotationError, match="unpacks to more than"):
        read_annotations(path)
    (violation,) = check_file(path)
    assert "unpacks to more than" in violation.message


def test_a_million_vertices_are_read_and_checked(tmp_path):
    rows = [[[x, y] for x in range(0, 1000, 10)] for y in range(0, 20_000, 2)]
    comb = [[-1, 0]]
    for i, row in enumerate(rows):
        comb += row if i % 2 == 0 else row[::-1]
    ring = [*comb, [-5, 20_000], comb[0]]
    assert len(ring) > 1_000_000
    path = tmp_path / "x.geojson"
    path.write_text(
        json.dumps(
            {
                "type": "Feature",
                "geometry": {"type": "Polygon", "coordinates": [ring]},
                "properties": {"objectType": "annotation"},
            }
        )
    )
    assert len(read_annotations(path)) == 1
    check_file(path)


@pytest.mark.parametrize("name", NAMES, ids=range(len(NAMES)))
def test_a_class_of_any_name_is_data_and_its_message_is_short(tmp_path, name):
    path = tmp_path / "x.geojson"
    document = {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": [SQUARE]},
        "properties": {"objectType": "annotation", "classification": {"name": name, "color": []}},
    }
    path.write_text(json.dumps(document))
    annotations = read_annotations(path)
    if annotations[0].class_name is not None:
        with pytest.raises(AnnotationError, match=r"feature 0: class .* is not in") as caught:
            check_annotations(
                annotations,
                ClassTable.of_names(["Tumor"]),
                slide_id="s",
                width_px_l0=20,
                height_px_l0=20,
            )
        assert len(str(caught.value)) < 400
        assert str(caught.value).isprintable()
    assert all(len(v.message) < 400 for v in check_file(path))
    fix_file(path, tmp_path / "y.geojson")
    assert check_file(tmp_path / "y.geojson") == []


@pytest.mark.parametrize(
    "content",
    [
        b'{"type":"FeatureCollection","features":[' + b'{"properties":{"childObjects":[' * 100_000,
        b'{"a":' * 100_000,
        b"\xff\xfe" + "[]".encode("utf-16-le"),
        b"\xc3\x28",
        b"[1e400]",
        b'{"features": null}',
        b"\x1f\x8b",
    ],
    ids=["deep-children", "deep", "utf-16", "bad-utf-8", "huge-number", "null", "empty-gzip"],
)
def test_what_is_no_geojson_is_one_error_and_one_violation(tmp_path, content):
    path = tmp_path / "x.geojson"
    path.write_bytes(content)
    with pytest.raises(AnnotationError, match=r"x\.geojson") as caught:
        read_annotations(path)
    assert len(str(caught.value)) < 400
    assert check_file(path)
