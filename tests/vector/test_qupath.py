"""What is written is what QuPath opens: byte for byte the same every time, and read back whole."""

import gzip
import itertools
import json
import uuid

import numpy as np
import pytest
import shapely
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stnp

from wsiseg.classes import ClassTable
from wsiseg.geometry import Box, Raster
from wsiseg.settings.export import ExportConfig
from wsiseg.vector.batch import TracedPolygon, batch_of
from wsiseg.vector.check import check_file
from wsiseg.vector.labels import annotation_labels
from wsiseg.vector.qupath import read_provenance, write_geojson
from wsiseg.vector.qupath_read import read_annotations
from wsiseg.vector.rounding import Frame, on_grid
from wsiseg.vector.trace import source_of_array

CLASSES = ClassTable.of_names(["Tumor", "Stroma é"])
PROVENANCE = {"run": {"stage": "export"}, "slide_id": "s1"}
LABELS = stnp.arrays(
    np.uint8,
    st.tuples(st.integers(1, 14), st.integers(1, 14)),
    elements=st.sampled_from([0, 1, 1, 2, 255]),
    fill=st.nothing(),
)


def raster(downsample_x=1.0, downsample_y=None, width=50, height=50):
    return Raster(width, height, 0.5, 0.5, downsample_x, downsample_y or downsample_x)


def write(path, labels, *, on=None, bounds=None, slide_id="s1", probability=None, **config):
    return write_geojson(
        path,
        (lambda _: [batch_of(labels)])
        if isinstance(labels, list)
        else source_of_array(labels, probability),
        raster=on or raster(),
        classes=CLASSES,
        slide={"slide_id": slide_id, "bounds": bounds},
        provenance=PROVENANCE,
        config=ExportConfig(**config),
        metadata={"wsiseg_model": "ab"},
    )


def features(path):
    return json.loads(path.read_bytes())["features"]


def square(label=1, x=3, y=4, size=5):
    labels = np.zeros((20, 20), np.uint8)
    labels[y : y + size, x : x + size] = label
    return labels


def test_a_feature_is_written_as_qupath_wants_it(tmp_path):
    probability = np.full((20, 20), 204, np.uint8)
    result = write(tmp_path / "x.geojson", square(), probability=probability)
    (feature,) = features(tmp_path / "x.geojson")
    assert uuid.UUID(feature.pop("id")).version == 5
    assert feature == {
        "type": "Feature",
        "geometry": {
            "type": "Polygon",
            "coordinates": [[[3, 4], [8, 4], [8, 9], [3, 9], [3, 4]]],
        },
        "properties": {
            "objectType": "annotation",
            "classification": {"name": "Tumor", "color": [200, 0, 0]},
            "isLocked": True,
            "metadata": {"wsiseg_model": "ab"},
            "measurements": {"Area µm^2": 6.25, "Mean probability": 0.8},
        },
    }
    assert (result.features, result.vertices, result.objects) == (1, 5, "annotation")
    assert result.size_bytes == (tmp_path / "x.geojson").stat().st_size
    assert b"[3,4]" in (tmp_path / "x.geojson").read_bytes()


def test_without_probability_there_is_no_such_measurement_and_unlocked_is_not_written(tmp_path):
    write(tmp_path / "x.geojson", square(), locked=False)
    (feature,) = features(tmp_path / "x.geojson")
    assert set(feature["properties"]["measurements"]) == {"Area µm^2"}
    assert "isLocked" not in feature["properties"]


@settings(max_examples=80, deadline=None)
@given(
    LABELS,
    st.sampled_from([1.0, 2.0, 0.25, 4.0012, 1.3333, 16.03]),
    st.sampled_from([1.0, 3.7777]),
    st.sampled_from([None, [40, 7, 100, 100]]),
)
def test_what_is_written_passes_the_check_and_is_read_back_as_the_same_pixels(
    tmp_path_factory, labels, downsample_x, downsample_y, bounds
):
    path = tmp_path_factory.mktemp("round") / "x.geojson"
    height, width = labels.shape
    on = raster(downsample_x, downsample_y, width, height)
    write(path, labels, on=on, bounds=bounds)
    assert check_file(path) == []
    found = read_annotations(path, bounds=None if bounds is None else Box(*bounds))
    expected = np.where(labels == 0, 255, labels)
    assert (annotation_labels(found, CLASSES, on, on.box) == expected).all()


@settings(max_examples=60, deadline=None)
@given(LABELS, st.sampled_from([0.5, 1.0, 3.0]), st.sampled_from([1.0, 4.0012]), st.booleans())
def test_simplified_and_filtered_files_pass_the_check(
    tmp_path_factory, labels, simplify_um, downsample, drops
):
    path = tmp_path_factory.mktemp("simple") / "x.geojson"
    small = 1.0 if drops else 0.0
    write(
        path, np.kron(labels, np.ones((2, 2), np.uint8)),
        on=raster(downsample), simplify_um=simplify_um, min_area_um2=small, min_hole_um2=small,
    )  # fmt: skip
    assert check_file(path) == []


def test_coordinates_have_at_most_two_decimals(tmp_path):
    write(tmp_path / "x.geojson", square(), on=raster(1.23456))
    points = np.array(features(tmp_path / "x.geojson")[0]["geometry"]["coordinates"][0])
    lattice = np.array([[3, 4], [8, 4], [8, 9], [3, 9], [3, 4]])
    assert (points == np.round(lattice * 1.23456, 2)).all()


def test_a_raster_so_fine_that_pixels_vanish_on_the_grid_still_gives_a_valid_file(tmp_path):
    labels = np.random.default_rng(0).integers(0, 3, (30, 30), dtype=np.uint8)
    write(tmp_path / "x.geojson", labels, on=raster(0.004))
    assert check_file(tmp_path / "x.geojson") == []


def test_an_outline_that_rounding_breaks_is_split():
    spike = np.array([[0, 0], [2500, 0], [2500, 2500], [1250, 1], [0, 2500]])
    hole = np.array([[250, 250], [500, 250], [500, 500]])
    square_ = np.array([[0, 0], [2, 0], [2, 2], [0, 2]])  # 0.008 px: becomes 0.01 px or nothing
    batch = batch_of([TracedPolygon(1, (square_,), 4, 0.5), TracedPolygon(2, (spike, hole), 50, 1)])
    found = on_grid(batch, Frame(0.004, 0.004, 0, 0), has_right_angles=False)
    assert found.source.tolist() == [0, 1, 1]
    for first, end in zip(found.polygon_starts[:-1], found.polygon_starts[1:], strict=True):
        ends = found.ring_starts[first : end + 1]
        rings = [found.hundredths[a:b] for a, b in itertools.pairwise(ends)]
        assert shapely.Polygon(rings[0], rings[1:]).is_valid


@pytest.mark.parametrize(
    ("origin", "bounds", "corner"),
    [
        ("auto", None, [3, 4]),
        ("auto", [1, 2, 9, 9], [2, 2]),
        ("bounds", [1, 2, 9, 9], [2, 2]),
        ("bounds", None, [3, 4]),
        ("level0", [1, 2, 9, 9], [3, 4]),
    ],
)
def test_the_origin_is_the_corner_of_what_qupath_shows(tmp_path, origin, bounds, corner):
    write(tmp_path / "x.geojson", square(), origin=origin, bounds=bounds)
    assert features(tmp_path / "x.geojson")[0]["geometry"]["coordinates"][0][0] == corner


def many(count):
    labels = np.zeros((2 * ((count + 99) // 100), 200), np.uint8)
    labels[::2, ::2].flat[:count] = 1
    return labels


@pytest.mark.parametrize(
    ("count", "objects", "expected"),
    [
        (5000, "auto", "annotation"),
        (5001, "auto", "detection"),
        (5001, "annotation", "annotation"),
        (3, "detection", "detection"),
    ],
)
def test_many_objects_become_detections(tmp_path, count, objects, expected):
    result = write(tmp_path / "x.geojson", many(count), objects=objects)
    written = features(tmp_path / "x.geojson")
    assert {f["properties"]["objectType"] for f in written} == {expected} == {result.objects}
    assert len(written) == result.features == count
    assert len({f["id"] for f in written}) == count


def test_the_same_run_gives_the_same_bytes_plain_and_packed(tmp_path):
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, (60, 60), dtype=np.uint8)
    for name in ("a.geojson", "b.geojson", "a.geojson.gz", "b.geojson.gz"):
        write(tmp_path / name, labels)
    plain, packed = tmp_path / "a.geojson", tmp_path / "a.geojson.gz"
    assert plain.read_bytes() == (tmp_path / "b.geojson").read_bytes()
    assert packed.read_bytes() == (tmp_path / "b.geojson.gz").read_bytes()
    assert gzip.decompress(packed.read_bytes()) == plain.read_bytes()
    assert packed.read_bytes()[4:8] == b"\0\0\0\0"
    assert check_file(packed) == []
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a.geojson", "a.geojson.gz", "b.geojson", "b.geojson.gz"]  # fmt: skip


def test_ids_depend_on_slide_class_and_outline_only(tmp_path):
    def id_of(**options):
        labels = square(options.pop("label", 1), options.pop("x", 3))
        write(tmp_path / "x.geojson", labels, **options)
        return features(tmp_path / "x.geojson")[0]["id"]

    assert id_of() == id_of(locked=False) == id_of(objects="detection")
    assert len({id_of(), id_of(slide_id="s2"), id_of(label=2), id_of(x=4)}) == 4


def test_the_provenance_is_a_member_of_the_collection_and_found_again(tmp_path):
    for name in ("x.geojson", "x.geojson.gz"):
        write(tmp_path / name, square())
        assert read_provenance(tmp_path / name) == PROVENANCE
    assert json.loads((tmp_path / "x.geojson").read_bytes())["wsiseg"] == PROVENANCE


def test_files_of_others_have_no_provenance(tmp_path):
    path = tmp_path / "x.geojson"
    assert read_provenance(path) is None
    for content in (b"", b"\x1f\x8b", b"{}", b"[]", b'{"wsiseg": 3}', b"\xff" * 50):
        path.write_bytes(content)
        assert read_provenance(path) is None


def test_no_polygons_make_an_empty_collection(tmp_path):
    result = write(tmp_path / "x.geojson", np.zeros((4, 4), np.uint8))
    assert features(tmp_path / "x.geojson") == []
    assert check_file(tmp_path / "x.geojson") == []
    assert (result.features, result.vertices) == (0, 0)


def test_an_error_on_the_way_leaves_what_was_there(tmp_path):
    def breaks(with_junctions):
        yield from source_of_array(square())(with_junctions)
        raise RuntimeError("disk")

    path = tmp_path / "x.geojson"
    write(path, square())
    before = path.read_bytes()
    with pytest.raises(RuntimeError):
        write_geojson(
            path, breaks, raster=raster(), classes=CLASSES,
            slide={"slide_id": "s1", "bounds": None}, provenance={}, config=ExportConfig(),
        )  # fmt: skip
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["x.geojson"]


def test_polygons_lie_within_the_slide(tmp_path):
    on = raster(2.0, width=20, height=20)
    write(tmp_path / "x.geojson", np.ones((20, 20), np.uint8), on=on)
    (annotation,) = read_annotations(tmp_path / "x.geojson")
    assert shapely.Polygon(annotation.polygons[0][0]).bounds == (0, 0, 40, 40)
