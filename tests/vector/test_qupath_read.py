"""Annotations are read in every dialect that QuPath writes or wrote; what is wrong is named."""

import gzip
import json
import logging
import math

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st

from wsiseg.errors import AnnotationError
from wsiseg.geometry import Box
from wsiseg.vector.qupath_read import read_annotations, read_class_names

SQUARE = [[0, 0], [10, 0], [10, 10], [0, 10], [0, 0]]
HOLE = [[2, 2], [4, 2], [4, 4], [2, 4], [2, 2]]
BOW_TIE = [[0, 0], [9, 9], [9, 0], [0, 9], [0, 0]]


def polygon(*rings, **members):
    return {"type": "Polygon", "coordinates": list(rings), **members}


def feature(geometry, classification=None, **properties):
    if classification is not None:
        properties["classification"] = classification
    return {"type": "Feature", "geometry": geometry, "properties": properties}


def read(tmp_path, document, **options):
    path = tmp_path / "x.geojson"
    path.write_text(document if isinstance(document, str) else json.dumps(document))
    return read_annotations(path, **options)


def area(annotation):
    return sum(shapely.Polygon(p[0], p[1:]).area for p in annotation.polygons)


@pytest.mark.parametrize(
    ("classification", "name"),
    [
        ("Tumor", "Tumor"),
        ({"name": "Tumor", "color": [1, 2, 3]}, "Tumor"),
        ({"name": "Tumor", "colorRGB": -377282}, "Tumor"),
        ({"names": ["Tumor", "Positive"], "color": []}, "Tumor: Positive"),
        ({"name": "Tumor: Positive"}, "Tumor: Positive"),
        (None, None),
        ({}, None),
        ("", None),
    ],
)
def test_a_class_is_read_in_every_spelling(tmp_path, classification, name):
    (annotation,) = read(tmp_path, feature(polygon(SQUARE), classification))
    assert annotation.class_name == name
    assert read_class_names(tmp_path / "x.geojson") == ({name} if name else set())


@pytest.mark.parametrize("container", ["collection", "array", "feature", "geometry"])
def test_every_container_is_read(tmp_path, container):
    one = feature(polygon(SQUARE, HOLE))
    document = {
        "collection": {"type": "FeatureCollection", "features": [one]},
        "array": [one],
        "feature": one,
        "geometry": polygon(SQUARE, HOLE),
    }[container]
    (annotation,) = read(tmp_path, document)
    assert annotation.index == 0
    (rings,) = annotation.polygons
    assert [r.tolist() for r in rings] == [SQUARE, HOLE]
    assert all(r.dtype == np.float64 for r in rings)


def test_children_come_after_their_parent_with_its_number(tmp_path):
    child = feature(polygon(SQUARE), "b", childObjects=[feature(polygon(SQUARE), "c")])
    document = [
        feature(polygon(SQUARE), "a", childObjects=[child]),
        feature(polygon(SQUARE), "d", children=[feature(polygon(SQUARE), "e")]),
    ]
    found = read(tmp_path, document)
    assert [(a.class_name, a.index) for a in found] == [
        ("a", 0), ("b", 0), ("c", 0), ("d", 1), ("e", 1)]  # fmt: skip


def test_children_of_something_without_a_shape_are_read(tmp_path):
    root = feature({}, objectType="root", childObjects=[feature(polygon(SQUARE), "a")])
    assert [a.class_name for a in read(tmp_path, root)] == ["a"]


def test_keys_that_occur_twice_are_read(tmp_path):
    text = json.dumps(feature(polygon(SQUARE), "a", metadata={"k": "v"}))
    text = text.replace('"metadata"', '"metadata": {"k": "v"}, "metadata"')
    assert [a.class_name for a in read(tmp_path, text)] == ["a"]


def test_measurements_that_are_no_numbers_do_not_matter(tmp_path):
    text = json.dumps(feature(polygon(SQUARE), "a", measurements={"m": "NaN", "n": math.inf}))
    assert len(read(tmp_path, text)) == 1


def test_a_multipolygon_is_one_annotation_of_several_polygons(tmp_path):
    far = [[x + 20, y] for x, y in SQUARE]
    (annotation,) = read(
        tmp_path, feature({"type": "MultiPolygon", "coordinates": [[SQUARE, HOLE], [far]]})
    )
    assert [len(p) for p in annotation.polygons] == [2, 1]


def test_polygons_in_a_collection_of_geometries_are_read_in_order(tmp_path):
    far = [[x + 20, y] for x, y in SQUARE]
    inner = {"type": "GeometryCollection", "geometries": [polygon(SQUARE)]}
    for _ in range(200):
        inner = {"type": "GeometryCollection", "geometries": [inner]}
    document = {"type": "GeometryCollection", "geometries": [inner, polygon(far)]}
    (annotation,) = read(tmp_path, feature(document))
    assert [p[0][0].tolist() for p in annotation.polygons] == [[0, 0], [20, 0]]


def test_an_ellipse_is_not_its_bounding_box(tmp_path):
    box = [[10, 20], [30, 20], [30, 30], [10, 30], [10, 20]]
    (annotation,) = read(tmp_path, feature(polygon(box, isEllipse=True)))
    (ring,) = annotation.polygons[0]
    assert area(annotation) == pytest.approx(math.pi * 10 * 5, rel=2e-3)
    assert ring.min(axis=0) == pytest.approx([10, 20])
    assert ring.max(axis=0) == pytest.approx([30, 30])
    assert (ring[0] == ring[-1]).all()


def test_an_open_ring_is_closed(tmp_path):
    (annotation,) = read(tmp_path, feature(polygon(SQUARE[:-1])))
    assert annotation.polygons[0][0].tolist() == SQUARE


def test_coordinates_may_be_text_and_may_have_a_third_number(tmp_path):
    (annotation,) = read(tmp_path, feature(polygon([["0", 0, 7], [9, "0.5"], [9.25, 9]])))
    assert annotation.polygons[0][0].tolist() == [[0, 0], [9, 0.5], [9.25, 9], [0, 0]]


def test_the_bounds_of_a_slide_are_added(tmp_path):
    (annotation,) = read(tmp_path, feature(polygon(SQUARE)), bounds=Box(100, 1000, 50, 50))
    assert annotation.polygons[0][0][0].tolist() == [100, 1000]


@pytest.mark.parametrize("name", ["x.geojson", "x.geojson.gz", "x.json"])
def test_gzip_is_told_by_the_content(tmp_path, name):
    text = json.dumps(feature(polygon(SQUARE))).encode()
    (tmp_path / name).write_bytes(gzip.compress(text))
    assert len(read_annotations(tmp_path / name)) == 1
    (tmp_path / name).write_bytes(b"\xef\xbb\xbf" + text)
    assert len(read_annotations(tmp_path / name)) == 1


def test_points_and_lines_are_left_out_with_one_warning(tmp_path, caplog):
    point = feature({"type": "Point", "coordinates": [1, 2]}, "p")
    line = feature({"type": "LineString", "coordinates": [[1, 2], [3, 4]]}, "l")
    with caplog.at_level(logging.WARNING):
        found = read(tmp_path, [point, feature(polygon(SQUARE), "a"), line])
    assert [(a.class_name, a.index) for a in found] == [("a", 1)]
    assert [r.getMessage() for r in caplog.records] == [
        "annotation 'x.geojson': 2 features without an area are left out"
    ]
    assert read_class_names(tmp_path / "x.geojson") == {"a"}


def test_polygons_that_cross_themselves_are_repaired_with_one_warning(tmp_path, caplog):
    crossing = {"type": "MultiPolygon", "coordinates": [[BOW_TIE], [BOW_TIE]]}
    with caplog.at_level(logging.WARNING):
        first, second, third = read(
            tmp_path, [feature(polygon(SQUARE)), feature(polygon(BOW_TIE)), feature(crossing)]
        )
    assert (area(first), area(second), area(third)) == (100, 40.5, 81)
    (record,) = caplog.records
    assert "'x.geojson'" in record.getMessage()
    assert "feature 1 (Self-intersection" in record.getMessage()
    assert record.getMessage().endswith("and 2 more")


def test_a_ring_that_only_touches_itself_is_no_mistake(tmp_path, caplog):
    eight = [[0, 0], [4, 0], [4, 4], [8, 4], [8, 8], [4, 8], [4, 4], [0, 4], [0, 0]]
    with caplog.at_level(logging.WARNING):
        (annotation,) = read(tmp_path, feature(polygon(eight)))
    assert area(annotation) == 32
    assert all(shapely.Polygon(p[0], p[1:]).is_valid for p in annotation.polygons)
    assert not caplog.records


@pytest.mark.parametrize(
    ("geometry", "words"),
    [
        (polygon([[0, 0], [math.nan, 0], [9, 9], [0, 0]]), "not a finite number"),
        (polygon([[0, 0], ["NaN", 0], [9, 9], [0, 0]]), "not a finite number"),
        (polygon([[0, 0], [-math.inf, 0], [9, 9], [0, 0]]), "not a finite number"),
        (polygon([[0, 0], [1e12, 0], [9, 9], [0, 0]]), "beyond any slide"),
        (polygon([[0, 0], [10**400, 0], [9, 9], [0, 0]]), "not a pair of numbers"),
        (polygon([[0, 0], [1], [9, 9], [0, 0]]), "not a pair of numbers"),
        (polygon([[0, 0], None, [9, 9], [0, 0]]), "not a pair of numbers"),
        (polygon([[0, 0], [1, 1]]), "has 2 points"),
        (polygon(), "no coordinates"),
        (polygon(None), "not a pair of numbers"),
        ({"type": "Polygon"}, "no coordinates"),
        ({"type": "MultiPolygon", "coordinates": [1]}, "no coordinates"),
        ("nowhere", "expected an object"),
    ],
)
def test_a_wrong_feature_is_named_with_its_number_and_file(tmp_path, geometry, words):
    with pytest.raises(AnnotationError, match=r"annotation 'x\.geojson': feature 1: ") as caught:
        read(tmp_path, [feature(polygon(SQUARE)), feature(geometry)])
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    "document",
    [
        "",
        "{",
        "nonsense",
        "\x00\x00",
        "3",
        '{"a": 1}',
        '{"type": "FeatureCollection", "features": 3}',
        "[" * 200_000,
        '{"a":' * 200_000,
        "[1]",
        [feature(polygon(SQUARE), childObjects=3)],
        [feature(polygon(SQUARE), childObjects=[3])],
        [feature(polygon(SQUARE), classification=3)],
    ],
)
def test_what_is_no_geojson_is_one_error(tmp_path, document):
    with pytest.raises(AnnotationError, match=r"annotation 'x\.geojson'") as caught:
        read(tmp_path, document)
    assert len(str(caught.value)) < 300


def test_unreadable_files_are_one_error(tmp_path):
    with pytest.raises(AnnotationError, match="no such file"):
        read_annotations(tmp_path / "none.geojson")
    with pytest.raises(AnnotationError, match="cannot be read"):
        read_annotations(tmp_path)
    whole = gzip.compress(json.dumps(feature(polygon(SQUARE))).encode())
    for name, content in {
        "cut": whole[:-12],
        "flipped": whole[:20] + bytes([whole[20] ^ 255]) + whole[21:],
        "pickle": b"\x80\x04cos\nsystem\n(S'true'\ntR.",
        "png": b"\x89PNG\r\n\x1a\n" + bytes(range(256)),
    }.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(AnnotationError, match=name):
            read_annotations(tmp_path / name)


@settings(max_examples=150, deadline=None)
@given(st.binary(max_size=200) | st.text(max_size=80).map(lambda t: t.encode("utf-8", "ignore")))
def test_any_bytes_are_annotations_or_one_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("any") / "x.geojson"
    path.write_bytes(content)
    try:
        assert isinstance(read_annotations(path), list)
    except AnnotationError as error:
        assert "x.geojson" in str(error)
