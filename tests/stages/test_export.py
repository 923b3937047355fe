"""A slide mask becomes the GeoJSON that QuPath opens; what another run made is never replaced."""

import json

import numpy as np
import pytest
from stores_on_disk import (
    CLASSES,
    begin_mask,
    mask_data,
    run_info,
    slide_dict,
    write_mask,
    write_one,
)

from wsiseg.errors import OutputExistsError, OutputLockedError, StoreError
from wsiseg.outputs import output_lock
from wsiseg.settings.export import ExportConfig
from wsiseg.stages.export import run
from wsiseg.store.masks import SlideMask
from wsiseg.vector.check import check_file
from wsiseg.vector.labels import annotation_labels
from wsiseg.vector.qupath import read_provenance
from wsiseg.vector.qupath_read import read_annotations


@pytest.fixture(scope="module")
def mask(tmp_path_factory):
    return write_mask(tmp_path_factory.mktemp("mask") / "s1.mask.zarr")


def export(mask, output, *, overwrite=False, progress=None, **config):
    return run(
        ExportConfig(**config), mask=mask, output=output, overwrite=overwrite, progress=progress
    )


class Recorder:
    """A progress that counts."""

    def __init__(self):
        self.total = self.done = 0
        self.finished = False

    def start(self, label, total, *, unit, done=0):
        self.total, self.done = total, done

    def advance(self, amount=1, *, note=""):
        self.done += amount

    def finish(self):
        self.finished = True


def test_the_file_passes_the_check_and_is_the_mask_again(mask, tmp_path):
    summary = export(mask, tmp_path / "s1.geojson")
    assert check_file(tmp_path / "s1.geojson") == []
    store = SlideMask.open(mask)
    labels, _ = mask_data()
    found = annotation_labels(
        read_annotations(tmp_path / "s1.geojson"), store.classes, store.raster, store.raster.box
    )
    assert (found == np.where(labels == 0, 255, labels)).all()
    features = json.loads((tmp_path / "s1.geojson").read_bytes())["features"]
    assert (summary.slide_id, summary.features) == ("s1", len(features))
    assert summary.vertices == sum(len(r) for f in features for r in f["geometry"]["coordinates"])
    assert summary.mb == round((tmp_path / "s1.geojson").stat().st_size / 1e6, 3)
    assert summary.note == ""
    assert summary.objects == features[0]["properties"]["objectType"]


def test_area_and_probability_are_those_of_the_mask(mask, tmp_path):
    export(mask, tmp_path / "s1.geojson")
    features = json.loads((tmp_path / "s1.geojson").read_bytes())["features"]
    labels, probability = mask_data()
    for label, entry in enumerate(CLASSES.classes, start=1):
        mine = [
            f["properties"]["measurements"]
            for f in features
            if f["properties"]["classification"]["name"] == entry.name
        ]
        areas = np.array([m["Area µm^2"] for m in mine])
        means = np.array([m["Mean probability"] for m in mine])
        assert areas.sum() == pytest.approx((labels == label).sum() * 0.25)
        assert (areas * means).sum() / areas.sum() == pytest.approx(
            probability[labels == label].mean() / 255, abs=1e-4
        )


def test_the_same_export_gives_the_same_bytes_however_the_mask_was_written(mask, tmp_path):
    export(mask, tmp_path / "a.geojson")
    other = write_mask(tmp_path / "other.mask.zarr", chunk_px=1024)
    export(other, tmp_path / "b.geojson")
    first = (tmp_path / "a.geojson").read_bytes()
    assert first == (tmp_path / "b.geojson").read_bytes()
    export(mask, tmp_path / "a.geojson")
    assert first == (tmp_path / "a.geojson").read_bytes()
    assert not list(tmp_path.glob("*.partial")) + list(tmp_path.glob("*.lock"))


def test_a_mask_without_probability_has_no_such_measurement(tmp_path):
    plain = write_mask(tmp_path / "plain.mask.zarr", probability=False)
    export(plain, tmp_path / "s1.geojson")
    features = json.loads((tmp_path / "s1.geojson").read_bytes())["features"]
    assert {tuple(f["properties"]["measurements"]) for f in features} == {("Area µm^2",)}


def test_an_output_of_another_run_is_refused_and_named(mask, tmp_path):
    output = tmp_path / "s1.geojson"
    export(mask, output)
    before = output.read_bytes()
    with pytest.raises(OutputExistsError, match=r"locked: True -> False.*--overwrite"):
        export(mask, output, locked=False)
    other = write_mask(tmp_path / "other.mask.zarr", threshold=3)
    with pytest.raises(OutputExistsError, match=r"inputs\.mask"):
        export(other, output)
    assert output.read_bytes() == before
    export(other, output, overwrite=True)
    assert output.read_bytes() != before


def test_a_file_that_is_not_ours_is_refused(mask, tmp_path):
    output = tmp_path / "s1.geojson"
    output.write_text('{"type": "FeatureCollection", "features": []}')
    with pytest.raises(OutputExistsError, match="not written by wsiseg"):
        export(mask, output)
    export(mask, output, overwrite=True)
    assert check_file(output) == []


def test_a_folder_is_no_output(mask, tmp_path):
    for overwrite in (True, False):
        with pytest.raises(OutputExistsError, match="is a folder"):
            export(mask, tmp_path, overwrite=overwrite)


def test_two_cannot_write_the_same_output(mask, tmp_path):
    with output_lock(tmp_path / "s1.geojson"), pytest.raises(OutputLockedError):
        export(mask, tmp_path / "s1.geojson")


def test_what_is_no_finished_mask_is_refused_and_nothing_is_written(tmp_path):
    with pytest.raises(StoreError):
        export(tmp_path / "none.mask.zarr", tmp_path / "s1.geojson")
    (tmp_path / "text").write_text("no mask")
    with pytest.raises(StoreError):
        export(tmp_path / "text", tmp_path / "s1.geojson")
    labels, probability = mask_data()
    with begin_mask(tmp_path / "half.mask.zarr") as writer:
        write_one(writer, 0, 0, labels, probability)
    with pytest.raises(StoreError):
        export(tmp_path / "half.mask.zarr", tmp_path / "s1.geojson")
    assert not (tmp_path / "s1.geojson").exists()


def test_the_provenance_says_what_was_done_and_holds_no_path(mask, tmp_path):
    export(mask, tmp_path / "s1.geojson")
    provenance = read_provenance(tmp_path / "s1.geojson")
    assert provenance is not None
    assert provenance["slide_id"] == "s1"
    assert provenance["segment"]["stage"] == "test"
    assert provenance["run"]["config"]["simplify_um"] == 0
    assert str(tmp_path) not in (tmp_path / "s1.geojson").read_text()
    assert str(mask.parent) not in (tmp_path / "s1.geojson").read_text()


def test_the_bounds_of_the_slide_are_subtracted(tmp_path):
    path = tmp_path / "mrxs.mask.zarr"
    labels = np.ones((10, 10), np.uint8)
    with SlideMask.create(
        path,
        raster=SlideMask.open(write_mask(tmp_path / "x.mask.zarr", width=10, height=10)).raster,
        slide={**slide_dict(), "bounds": [4, 6, 10, 10]},
        classes=CLASSES,
        run=run_info(),
        model_digest="ab",
        with_probability=False,
    ) as writer:
        writer.write_chunk(0, 0, labels, None)
        writer.finish()
    corners = {}
    for origin in ("auto", "level0", "bounds"):
        export(path, tmp_path / f"{origin}.geojson", origin=origin)
        (feature,) = json.loads((tmp_path / f"{origin}.geojson").read_bytes())["features"]
        corners[origin] = feature["geometry"]["coordinates"][0][0]
    assert corners == {"auto": [-4, -6], "level0": [0, 0], "bounds": [-4, -6]}


def test_progress_counts_the_rows(mask, tmp_path):
    progress = Recorder()
    export(mask, tmp_path / "s1.geojson.gz", progress=progress)
    assert (progress.total, progress.done, progress.finished) == (130, 130, True)
