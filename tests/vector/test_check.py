"""`wsiseg check`: every rule is found, with the feature that breaks it, and repaired."""

import copy
import gzip
import json
import math
from typing import Any

import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from wsiseg.errors import GeoJSONError
from wsiseg.vector.check import check_file, fix_file
from wsiseg.vector.qupath_read import read_annotations

SQUARE = [[0, 0], [10, 0], [10, 10], [0, 10], [0, 0]]


def feature(**changes):
    made: dict[str, Any] = {
        "type": "Feature",
        "id": "5f0c5a3e-91a5-4b5e-8d4e-6f2b8f1f3c11",
        "geometry": {"type": "Polygon", "coordinates": [SQUARE]},
        "properties": {
            "objectType": "annotation",
            "classification": {"name": "Tumor", "color": [200, 0, 0]},
            "measurements": {"Area µm^2": 100.0},
        },
    }
    for key, value in changes.items():
        place = made["properties"] if key in PROPERTIES else made
        if value is ABSENT:
            del place[key]
        else:
            place[key] = value
    return made


ABSENT = object()
PROPERTIES = {
    "objectType",
    "classification",
    "measurements",
    "metadata",
    "name",
    "isLocked",
    "color",
    "childObjects",
}


def polygon(*rings):
    return {"type": "Polygon", "coordinates": list(rings)}


def write(path, *features):
    path.write_text(json.dumps({"type": "FeatureCollection", "features": list(features)}))
    return path


def rules(path):
    return {(v.feature_index, v.rule) for v in check_file(path)}


BROKEN = {
    "ring-open": [feature(geometry=polygon(SQUARE[:-1]))],
    "ring-short": [
        feature(geometry=polygon([[0, 0], [1, 1], [0, 0]])),
        feature(geometry=polygon(SQUARE, [[2, 2], [2, 2]])),
    ],
    "geometry-invalid": [
        feature(geometry=polygon([[0, 0], [9, 9], [9, 0], [0, 9], [0, 0]])),
        feature(geometry=polygon(SQUARE, [[20, 20], [22, 20], [22, 22], [20, 20]])),
        feature(
            geometry={
                "type": "MultiPolygon",
                "coordinates": [[SQUARE], [[[5, 5], [15, 5], [15, 15], [5, 15], [5, 5]]]],
            }
        ),
    ],
    "geometry-empty": [feature(geometry=polygon([[0, 0], [5, 0], [9, 0], [0, 0]]))],
    "geometry-type": [
        feature(
            geometry={"type": "GeometryCollection", "geometries": [polygon(SQUARE)]},
        ),
        feature(geometry={"type": "Circle", "coordinates": [1, 2]}),
    ],
    "geometry": [feature(geometry=None), feature(geometry=ABSENT), feature(geometry=[1])],
    "coordinates": [
        feature(geometry=polygon([[0, 0], [math.nan, 0], [9, 9], [0, 9], [0, 0]])),
        feature(geometry=polygon([[0, 0], [1e300, 0], [9, 9], [0, 9], [0, 0]])),
        feature(geometry=polygon([["0", "0"], *SQUARE])),
        feature(geometry=polygon(7)),
        feature(geometry={"type": "Polygon", "coordinates": []}),
        feature(geometry={"type": "MultiPolygon", "coordinates": 3}),
        feature(geometry={"type": "Point", "coordinates": [1]}),
        feature(geometry={"type": "LineString", "coordinates": None}),
        feature(geometry={"type": "MultiLineString", "coordinates": 5}),
    ],
    "class-color": [
        feature(classification={"name": "Tumor"}),
        feature(classification={"name": "Tumor", "color": "red"}),
        feature(classification={"name": "Tumor", "color": [1, 2, 300]}),
        feature(classification={"name": "Tumor", "color": [1, 2]}),
    ],
    "class-name": [
        feature(classification={"name": "Tumor: Positive", "color": [1, 2, 3]}),
        feature(classification={"name": "a\nb", "color": [1, 2, 3]}),
        feature(classification="Tumor:x"),
        feature(classification=" "),
    ],
    "class": [
        feature(classification=None),
        feature(classification=3),
        feature(classification={"name": None, "color": [1, 2, 3]}),
        feature(classification={"names": [], "color": [1, 2, 3]}),
    ],
    "name": [feature(name=None), feature(name=4)],
    "color": [feature(color=None), feature(color="red")],
    "isLocked": [feature(isLocked="yes")],
    "objectType": [
        feature(objectType=ABSENT),
        feature(objectType="anotation"),
        {**feature(objectType=ABSENT), "objectType": "detection"},
    ],
    "id": [feature(id="PathAnnotationObject"), feature(id=5), feature(id=None)],
    "measurements": [
        feature(measurements={"a": None}),
        feature(measurements={"a": True}),
        feature(measurements={"a": "much"}),
        feature(measurements=3),
    ],
    "metadata": [feature(metadata={"a": [1]}), feature(metadata=[])],
    "childObjects": [feature(childObjects={"a": 1})],
    "properties": [feature(properties=None), feature(properties=[])],
    "feature": [{**feature(), "type": "feature"}, 7, None],
}


@pytest.mark.parametrize(
    ("rule", "wrong"),
    [
        pytest.param(rule, f, id=f"{rule}-{i}")
        for rule, wrong in BROKEN.items()
        for i, f in enumerate(wrong)
    ],
)
def test_a_broken_rule_is_found_in_its_feature_and_repaired(tmp_path, rule, wrong):
    good = feature(id="00000000-0000-4000-8000-000000000000")
    path = write(tmp_path / "x.geojson", good, wrong)
    assert (1, rule) in rules(path)
    assert all(v.feature_index in (1, None) and v.message for v in check_file(path))

    result = fix_file(path, tmp_path / "fixed.geojson")
    assert check_file(tmp_path / "fixed.geojson") == []
    assert result.changes or result.dropped
    assert any("feature 1" in line for line in (*result.changes, *result.dropped))
    fixed = json.loads((tmp_path / "fixed.geojson").read_bytes())["features"]
    assert fixed[0] == good
    assert len(fixed) == 2 or result.dropped


@pytest.mark.parametrize(
    "right",
    [
        feature(),
        feature(id=ABSENT),
        feature(classification="Tumor"),
        feature(classification={"names": ["Tumor", "Positive"], "color": [1, 2, 3]}),
        feature(classification={"name": "Tumor", "colorRGB": -377282}),
        feature(classification={"name": "Tumor", "color": None}),
        feature(classification={"name": "Tumor", "color": [-65536]}),
        feature(measurements={"a": "NaN", "b": "-inf", "c": "Infinity", "d": 3, "e": "4.5"}),
        feature(measurements=[{"name": "a", "value": 1}]),
        feature(metadata={"a": "b", "c": 1}),
        feature(isLocked=True, name="n", color=[1, 2, 3]),
        feature(color=-65536),
        feature(geometry={}),
        feature(geometry={"type": "Point", "coordinates": [1, 2]}),
        feature(geometry={"type": "MultiLineString", "coordinates": [[[1, 2], [3, 4.5]]]}),
        feature(geometry={**polygon(SQUARE), "plane": {"c": -1, "z": 0, "t": 0}}),
        feature(geometry=polygon(SQUARE[::-1])),
        feature(geometry=polygon(SQUARE, [[0, 0], [5, 0], [5, 5], [0, 0]])),
    ],
)
def test_what_qupath_takes_is_not_complained_of(tmp_path, right):
    path = write(tmp_path / "x.geojson", right)
    assert check_file(path) == []
    assert fix_file(path, tmp_path / "y.geojson").changes == []
    assert json.loads((tmp_path / "y.geojson").read_bytes())["features"] == [right]


def test_every_container_that_qupath_reads_is_accepted(tmp_path):
    for name, document in {
        "array": [feature()],
        "feature": feature(),
        "geometry": polygon(SQUARE),
        "collection": {"type": "FeatureCollection", "features": [], "made_by": "me"},
    }.items():
        (tmp_path / f"{name}.geojson").write_text(json.dumps(document))
        assert check_file(tmp_path / f"{name}.geojson") == [], name


def test_what_is_wrong_with_the_file_itself_is_said_once(tmp_path):
    for content, rule in {
        "": "json",
        "{": "json",
        "[" * 100_000: "json",
        "\x00\x01": "json",
        '{"type": "FeatureCollection"}': "top-level",
        '{"features": []}': "top-level",
        "3": "top-level",
        '{"type": "FeatureCollection", "features": [], "crs": {"a": 1}}': "crs",
    }.items():
        (tmp_path / "x.geojson").write_text(content)
        assert rules(tmp_path / "x.geojson") == {(None, rule)}, content[:60]


def test_gzip_has_to_be_told_by_the_name(tmp_path):
    text = json.dumps([feature()]).encode()
    (tmp_path / "a.geojson").write_bytes(gzip.compress(text))
    (tmp_path / "b.geojson.gz").write_bytes(text)
    (tmp_path / "c.geojson.gz").write_bytes(gzip.compress(text))
    (tmp_path / "d.geojson.gz").write_bytes(gzip.compress(text)[:-20])
    assert rules(tmp_path / "a.geojson") == {(None, "file-name")}
    assert rules(tmp_path / "b.geojson.gz") == {(None, "file-name")}
    assert rules(tmp_path / "c.geojson.gz") == set()
    assert rules(tmp_path / "d.geojson.gz") == {(None, "json")}
    fix_file(tmp_path / "a.geojson", tmp_path / "e.geojson.gz")
    assert check_file(tmp_path / "e.geojson.gz") == []


def test_double_ids_are_found_and_replaced_by_the_same_ones_every_time(tmp_path):
    path = write(tmp_path / "x.geojson", feature(), feature(), feature())
    assert rules(path) == {(1, "id-duplicate"), (2, "id-duplicate")}
    fix_file(path, tmp_path / "a.geojson")
    fix_file(path, tmp_path / "b.geojson")
    assert check_file(tmp_path / "a.geojson") == []
    assert (tmp_path / "a.geojson").read_bytes() == (tmp_path / "b.geojson").read_bytes()


def test_children_are_checked_and_repaired_and_outlive_their_parent(tmp_path):
    child = feature(id="11111111-0000-4000-8000-000000000000", name=None)
    path = write(tmp_path / "x.geojson", feature(childObjects=[child]))
    assert rules(path) == {(0, "name")}
    assert "child" in check_file(path)[0].message
    fix_file(path, tmp_path / "y.geojson")
    assert check_file(tmp_path / "y.geojson") == []
    (kept,) = json.loads((tmp_path / "y.geojson").read_bytes())["features"]
    assert len(kept["properties"]["childObjects"]) == 1

    path = write(tmp_path / "x.geojson", feature(geometry=None, childObjects=[child]))
    assert fix_file(path, tmp_path / "y.geojson").dropped
    (kept,) = json.loads((tmp_path / "y.geojson").read_bytes())["features"]
    assert kept["id"] == child["id"]


def test_absurdly_nested_children_are_refused_and_cut(tmp_path):
    nested = feature(id=ABSENT)
    for _ in range(120):
        nested = feature(id=ABSENT, childObjects=[nested])
    path = write(tmp_path / "x.geojson", nested)
    assert rules(path) == {(0, "childObjects")}
    fix_file(path, tmp_path / "y.geojson")
    assert check_file(tmp_path / "y.geojson") == []


def test_bare_nan_and_endless_numbers_are_made_strict_json(tmp_path):
    text = json.dumps([feature()]).replace("100.0", 'NaN, "b": 1e999, "c": -' + "9" * 400)
    (tmp_path / "x.geojson").write_text(text)
    assert rules(tmp_path / "x.geojson") == {(None, "json")}
    fix_file(tmp_path / "x.geojson", tmp_path / "y.geojson")
    assert check_file(tmp_path / "y.geojson") == []


def test_a_repaired_bow_tie_keeps_its_area(tmp_path):
    bow_tie = polygon([[0, 0], [10, 10], [10, 0], [0, 10], [0, 0]])
    path = write(tmp_path / "x.geojson", feature(geometry=bow_tie))
    fix_file(path, tmp_path / "y.geojson")
    (annotation,) = read_annotations(tmp_path / "y.geojson")
    assert sum(shapely.Polygon(p[0]).area for p in annotation.polygons) == 50
    assert annotation.class_name == "Tumor"


def test_a_colon_in_a_class_becomes_two_levels(tmp_path):
    path = write(tmp_path / "x.geojson", feature(classification="Tumor: Positive"))
    fix_file(path, tmp_path / "y.geojson")
    (fixed,) = json.loads((tmp_path / "y.geojson").read_bytes())["features"]
    assert fixed["properties"]["classification"]["names"] == ["Tumor", "Positive"]


def test_a_file_that_is_not_there_or_not_geojson_is_one_error(tmp_path):
    with pytest.raises(GeoJSONError, match="no such file"):
        check_file(tmp_path / "none.geojson")
    with pytest.raises(GeoJSONError, match="not a file"):
        check_file(tmp_path)
    (tmp_path / "x.geojson").write_text("nonsense")
    with pytest.raises(GeoJSONError, match=r"x\.geojson.*nothing to repair"):
        fix_file(tmp_path / "x.geojson", tmp_path / "y.geojson")
    (tmp_path / "x.geojson").write_text("3")
    with pytest.raises(GeoJSONError, match="nothing to repair"):
        fix_file(tmp_path / "x.geojson", tmp_path / "y.geojson")
    assert not (tmp_path / "y.geojson").exists()


VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**30), 10**30)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from([SQUARE, [SQUARE], polygon(SQUARE), "Feature", "Polygon", "annotation"]),
    lambda inner: (
        st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=8,
)


def leaves(value, path=()):
    yield path
    if isinstance(value, dict | list):
        for key, inner in value.items() if isinstance(value, dict) else enumerate(value):
            yield from leaves(inner, (*path, key))


FULL = feature(
    childObjects=[feature(id="11111111-0000-4000-8000-000000000000")],
    name="n",
    isLocked=True,
    color=[1, 2, 3],
    metadata={"a": "b"},
)


@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_whatever_is_put_in_a_feature_is_repaired_or_left_out(tmp_path_factory, data):
    folder = tmp_path_factory.mktemp("any")
    wrong = {"feature": copy.deepcopy(FULL)}
    for _ in range(data.draw(st.integers(1, 3))):
        *where, last = data.draw(
            st.sampled_from([("feature", *p) for p in leaves(wrong["feature"])])
        )
        place = wrong
        for key in where:
            place = place[key]
        place[last] = copy.deepcopy(data.draw(VALUES))
    path = write(folder / "x.geojson", wrong["feature"])
    check_file(path)
    fix_file(path, folder / "y.geojson")
    assert check_file(folder / "y.geojson") == []
