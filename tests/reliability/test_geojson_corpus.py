"""U4: small hostile annotations in tests/corpus/geojson, each with what is made of it.

All but those whose point is another hold a square as feature 0, which is sound.
"""

from pathlib import Path

import pytest

from wsiseg.errors import AnnotationError, GeoJSONError
from wsiseg.vector.check import check_file, fix_file
from wsiseg.vector.qupath_read import read_annotations

CORPUS = Path(__file__).parents[1] / "corpus" / "geojson"

READ = {
    "array": (2, []),
    "bare-geometry": (1, []),
    "bow-tie": (2, [(1, "geometry-invalid")]),
    "byte-order-mark": (1, []),
    "children-60-deep": (62, [(1, "childObjects")]),
    "clockwise": (2, []),
    "control-characters": (2, [(1, "class-name")]),
    "duplicate-keys": (2, []),
    "geometry-collection": (2, [(1, "geometry-type")]),
    "half-a-surrogate": (2, [(None, "json")]),
    "half-a-surrogate-without-colour": (2, [(None, "json"), (1, "class-color")]),
    "hole-outside": (2, [(1, "geometry-invalid")]),
    "markup": (2, []),
    "mixed-dimensions": (2, []),
    "named-crs": (1, [(None, "crs")]),
    "null-geometry": (1, [(1, "geometry")]),
    "proto": (2, []),
    "right-to-left": (2, []),
    "three-dimensions": (2, []),
    "traversal": (2, []),
    "unclosed": (2, [(1, "ring-open")]),
    "without-area": (1, [(1, "geometry-empty")]),
}
"""Name -> number of annotations, and what `wsiseg check` says as (feature, rule)."""

REFUSED = {
    "beyond-any-slide": (r"feature 1: .*1e\+308 px, beyond any slide", [(1, "coordinates")]),
    "coordinates-too-deep": ("feature 1: .*not a pair of numbers", [(1, "coordinates")]),
    "infinity": ("feature 1: .*not a finite number", [(None, "json"), (1, "coordinates")]),
    "nan": ("feature 1: .*not a finite number", [(None, "json"), (1, "coordinates")]),
    "null-feature": ("feature 1: expected an object, got 'None'", [(1, "feature")]),
    "number-1e400": ("feature 1: .*not a finite number", [(None, "json"), (1, "coordinates")]),
    "text-coordinates": ("feature 1: .*not a pair of numbers", [(1, "coordinates")]),
    "two-points": ("feature 1: a ring has 2 points", [(1, "ring-short")]),
}
"""Name -> the error, which names the feature; `wsiseg check --fix` leaves that feature out."""

NO_GEOJSON = {
    "brackets-20000-deep": ("not GeoJSON: maximum recursion depth", "json"),
    "cut-off": ("not GeoJSON: Unterminated string", "json"),
    "not-utf-8": ("not GeoJSON: 'utf-8' codec can't decode byte 0xe9", "json"),
    "topology": ("expected a FeatureCollection, an array or a Feature", "top-level"),
    "utf-16": ("not GeoJSON: 'utf-8' codec can't decode byte 0xff", "json"),
}
"""Name -> the error, and the one rule that the file as a whole breaks."""


def rules(path):
    return [(violation.feature_index, violation.rule) for violation in check_file(path)]


def test_every_file_of_the_corpus_has_its_outcome():
    assert {p.stem for p in CORPUS.iterdir()} == {*READ, *REFUSED, *NO_GEOJSON}


@pytest.mark.parametrize("name", READ)
def test_what_can_be_used_is_read_and_what_is_wrong_is_fixed(tmp_path, name):
    path, fixed = CORPUS / f"{name}.geojson", tmp_path / "fixed.geojson"
    num_annotations, broken = READ[name]
    assert len(read_annotations(path)) == num_annotations
    assert rules(path) == broken
    fix_file(path, fixed)
    assert rules(fixed) == []


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_used_is_refused_by_feature_and_left_out_by_a_fix(tmp_path, name):
    path, fixed = CORPUS / f"{name}.geojson", tmp_path / "fixed.geojson"
    message, broken = REFUSED[name]
    with pytest.raises(AnnotationError, match=rf"'{name}\.geojson': {message}"):
        read_annotations(path)
    assert rules(path) == broken
    assert len(fix_file(path, fixed).dropped) == 1
    assert len(read_annotations(fixed)) == 1


@pytest.mark.parametrize("name", NO_GEOJSON)
def test_what_is_no_geojson_is_one_error_and_nothing_to_fix(tmp_path, name):
    path = CORPUS / f"{name}.geojson"
    message, rule = NO_GEOJSON[name]
    with pytest.raises(AnnotationError, match=rf"'{name}\.geojson': .*{message}"):
        read_annotations(path)
    assert rules(path) == [(None, rule)]
    with pytest.raises(GeoJSONError, match="nothing to repair"):
        fix_file(path, tmp_path / "fixed.geojson")
    assert list(tmp_path.iterdir()) == []
