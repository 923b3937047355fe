"""What QuPath can bear: budgets of vertices, detections for the many, a warning for the rest."""

import json

import numpy as np
import pytest
from awkward_masks import blobs

from wsiseg.classes import ClassTable
from wsiseg.errors import ConfigError
from wsiseg.geometry import Raster
from wsiseg.settings.export import ExportConfig
from wsiseg.vector.check import check_file
from wsiseg.vector.qupath import WriteResult, write_geojson
from wsiseg.vector.trace import source_of_array

CLASSES = ClassTable.of_names(["Tumor", "Stroma"])
UM_PER_PX = 0.5


def write(path, labels, **config):
    return write_geojson(
        path,
        source_of_array(labels),
        raster=Raster(labels.shape[1], labels.shape[0], UM_PER_PX, UM_PER_PX, 2.0, 2.0),
        classes=CLASSES,
        slide={"slide_id": "s1", "bounds": None},
        provenance={},
        config=ExportConfig(**config),
    )


@pytest.fixture(scope="module")
def labels():
    return np.kron(blobs(np.random.default_rng(0), (60, 70)), np.ones((4, 4), np.uint8))


def test_a_budget_that_the_exact_outlines_keep_changes_nothing(labels, tmp_path):
    exact = write(tmp_path / "a.geojson", labels)
    kept = write(tmp_path / "b.geojson", labels, max_vertices=exact.vertices)
    assert kept.simplify_um == 0
    assert (tmp_path / "a.geojson").read_bytes() == (tmp_path / "b.geojson").read_bytes()


def test_a_smaller_budget_raises_the_tolerance_until_it_is_kept_and_says_so(labels, tmp_path):
    exact = write(tmp_path / "a.geojson", labels)
    budget = exact.vertices // 3
    result = write(tmp_path / "b.geojson", labels, max_vertices=budget)
    assert 0 < result.vertices <= budget
    assert result.simplify_um in {UM_PER_PX * 0.5 * 2**k for k in range(8)}
    assert check_file(tmp_path / "b.geojson") == []
    same = write(tmp_path / "c.geojson", labels, simplify_um=result.simplify_um)
    assert same.vertices == result.vertices
    assert (tmp_path / "b.geojson").read_bytes() == (tmp_path / "c.geojson").read_bytes()
    half = write(tmp_path / "d.geojson", labels, simplify_um=result.simplify_um / 2)
    assert half.vertices > budget, "a finer tolerance would have done"


def test_a_given_tolerance_is_where_a_budget_begins(labels, tmp_path):
    result = write(tmp_path / "a.geojson", labels, simplify_um=0.7, max_vertices=100_000)
    assert result.simplify_um == pytest.approx(0.7)


def test_a_budget_that_cannot_be_kept_is_refused_with_what_to_do(labels, tmp_path):
    with pytest.raises(ConfigError, match=r"max_vertices: .* objects keep .*--min-area-um2"):
        write(tmp_path / "a.geojson", labels, max_vertices=10)
    assert list(tmp_path.iterdir()) == []
    result = write(tmp_path / "a.geojson", labels, max_vertices=200, min_area_um2=1500)
    assert 0 < result.vertices <= 200


def test_of_many_objects_the_small_become_detections_and_the_large_annotations(tmp_path):
    labels = np.zeros((600, 600), np.uint8)
    labels[:200:2, ::2] = 1  # 30,000 objects of a pixel
    labels[300:550, 10:250] = 2  # 120 um x 125 um
    labels[300:400, 300:400] = 2  # 50 um x 50 um
    result = write(tmp_path / "a.geojson", labels)
    kinds: dict[str, list[float]] = {}
    for feature in json.loads((tmp_path / "a.geojson").read_bytes())["features"]:
        properties = feature["properties"]
        kinds.setdefault(properties["objectType"], []).append(
            properties["measurements"]["Area µm^2"]
        )
    assert kinds["annotation"] == [15_000]
    assert max(kinds["detection"]) == 2500
    assert (result.annotations, result.detections) == (1, 30_001)
    assert result.objects == "annotation, detection"
    few = write(tmp_path / "b.geojson", labels[250:])
    assert (few.annotations, few.detections) == (2, 0)


def result(**changes):
    facts = {
        "features": 10,
        "annotations": 10,
        "detections": 0,
        "vertices": 100,
        "most_vertices": 20,
        "size_bytes": 10_000,
        "simplify_um": 0.0,
    }
    return WriteResult(**{**facts, **changes})


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"size_bytes": 300_000_000}, "300 MB need about 6 GB"),
        ({"most_vertices": 600_000}, "one object has 600,000 vertices"),
        ({"annotations": 20_000}, "20,000 annotations"),
    ],
)
def test_what_qupath_would_choke_on_is_said_with_the_remedy(changes, words):
    assert words in result(**changes).warning
    assert "--simplify-um" in result(**changes).warning


def test_an_ordinary_file_has_no_warning():
    assert result().warning == ""
    assert result(features=1_000_000, annotations=0, detections=1_000_000).warning == ""
