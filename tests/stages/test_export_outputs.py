"""What stands beside the GeoJSON, each opened by a reader that is not ours."""

import json
import sqlite3
from typing import Any

import numpy as np
import openslide
import pandas
import pytest
import shapely
import tifffile
from stores_on_disk import CLASSES, begin_mask, mask_data, run_info, slide_dict, write_mask

from wsiseg.errors import ExportError
from wsiseg.settings.export import ExportConfig, ExtraOutputs
from wsiseg.stages.export import run
from wsiseg.store.masks import SlideMask
from wsiseg.store.ome_tiff import write_ome_tiff
from wsiseg.vector import annotation_store

ALL = ExtraOutputs(csv=True, ome_tiff=True, annotation_store=True)
OUTPUTS = ("s1.geojson", "s1.objects.csv", "s1.classes.csv", "s1.db", "s1.ome.tiff")


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    folder = tmp_path_factory.mktemp("exported")
    run(
        ExportConfig(),
        mask=write_mask(folder / "s1.mask.zarr"),
        output=folder / "s1.geojson",
        extra=ALL,
    )
    return folder


def features_in(folder) -> list[dict[str, Any]]:
    features: list[dict[str, Any]] = json.loads((folder / "s1.geojson").read_bytes())["features"]
    return features


def test_all_are_there_and_nothing_else(exported):
    assert {p.name for p in exported.iterdir()} == {"s1.mask.zarr", *OUTPUTS}


def test_pandas_reads_a_row_per_object_with_the_ids_and_measurements_of_the_geojson(exported):
    table = pandas.read_csv(exported / "s1.objects.csv")
    features = features_in(exported)
    assert table["id"].tolist() == [f["id"] for f in features]
    for row, feature in zip(table.to_dict("records"), features, strict=True):
        properties = feature["properties"]
        shape: Any = shapely.geometry.shape(feature["geometry"])
        assert row["class"] == properties["classification"]["name"]
        assert row["object_type"] == properties["objectType"]
        assert row["area_um2"] == properties["measurements"]["Area µm^2"]
        assert row["mean_probability"] == properties["measurements"]["Mean probability"]
        assert row["area_um2"] == pytest.approx(shape.area * 0.25**2)
        assert row["perimeter_um"] == pytest.approx(shape.exterior.length * 0.25)
        assert row["holes"] == len(shape.interiors)
        assert [row["centroid_x_px"], row["centroid_y_px"]] == pytest.approx(
            shape.centroid.coords[0], abs=0.006
        )
        edges = [row[k] for k in ("left_px", "top_px", "right_px", "bottom_px")]
        assert edges == list(shape.bounds)


def test_pandas_reads_a_row_per_class_with_the_areas_of_the_mask(exported):
    table = pandas.read_csv(exported / "s1.classes.csv").set_index("class")
    labels, probability = mask_data()
    assert list(table.index) == ["Tumor", "Stroma"]
    assert table["area_percent"].sum() == pytest.approx(100, abs=1e-3)
    for label, name in enumerate(table.index, start=1):
        assert table["label"][name] == label
        assert table["area_um2"][name] == (labels == label).sum() * 0.25
        assert table["mean_probability"][name] == pytest.approx(
            probability[labels == label].mean() / 255, abs=1e-4
        )
    assert table["objects"].sum() == len(features_in(exported))


def test_without_probability_and_without_objects_the_tables_have_empty_places(tmp_path):
    with begin_mask(tmp_path / "s1.mask.zarr", width=10, height=10, probability=False) as writer:
        labels = np.zeros((10, 10), np.uint8)
        labels[2:4, 2:4] = 2
        writer.write_chunk(0, 0, labels)
        writer.finish()
    run(
        ExportConfig(), mask=tmp_path / "s1.mask.zarr", output=tmp_path / "s1.geojson.gz", extra=ALL
    )
    objects = pandas.read_csv(tmp_path / "s1.objects.csv")
    classes = pandas.read_csv(tmp_path / "s1.classes.csv")
    assert objects["mean_probability"].isna().tolist() == [True]
    assert classes["mean_probability"].isna().all()
    assert classes["objects"].tolist() == [0, 1]
    assert classes["area_percent"].tolist() == [0, 100]


def test_tifffile_reads_every_level_of_the_pyramid_with_its_resolution(exported):
    mask = SlideMask.open(exported / "s1.mask.zarr")
    with tifffile.TiffFile(exported / "s1.ome.tiff") as tiff:
        assert tiff.is_ome
        (series,) = tiff.series
        assert len(series.levels) == mask.num_levels
        assert series.levels[0].asarray().dtype == np.uint8
        assert (series.levels[0].asarray() == mask.read(mask.raster.box)).all()
        assert tiff.ome_metadata is not None
        assert 'PhysicalSizeX="0.5"' in tiff.ome_metadata
        assert 'PhysicalSizeXUnit="µm"' in tiff.ome_metadata


def test_a_pyramid_has_all_its_levels_and_openslide_reads_the_labels(tmp_path):
    rng = np.random.default_rng(0)
    labels = np.kron(rng.integers(0, 3, (150, 130), dtype=np.uint8), np.ones((10, 10), np.uint8))
    height, width = labels.shape
    path = tmp_path / "s1.mask.zarr"
    with begin_mask(path, width=width, height=height, chunk_px=2048, probability=False) as writer:
        writer.write_chunk(0, 0, labels)
        writer.finish()
    mask = SlideMask.open(path)
    size = write_ome_tiff(tmp_path / "s1.ome.tiff", mask)
    assert size == (tmp_path / "s1.ome.tiff").stat().st_size
    with tifffile.TiffFile(tmp_path / "s1.ome.tiff") as tiff:
        levels = [level.asarray() for level in tiff.series[0].levels]
    assert [level.shape for level in levels] == [(1500, 1300), (750, 650)]
    assert (levels[0] == labels).all()
    assert (levels[1] == labels[::2, ::2]).all()
    with openslide.OpenSlide(tmp_path / "s1.ome.tiff") as slide:
        assert slide.dimensions == (width, height)
        assert float(slide.properties["openslide.mpp-x"]) == pytest.approx(0.5)
        region = np.asarray(slide.read_region((0, 0), 0, (width, height)))
    assert (region[..., 0] == labels).all()


def test_the_same_mask_gives_the_same_tiff_and_tables(exported, tmp_path):
    mask = write_mask(tmp_path / "s1.mask.zarr", chunk_px=128)
    run(ExportConfig(), mask=mask, output=tmp_path / "s1.geojson", extra=ALL)
    for name in OUTPUTS:
        if name != "s1.db":  # SQLite leaves what it likes between the rows
            assert (tmp_path / name).read_bytes() == (exported / name).read_bytes(), name
    assert rows_of_store(tmp_path / "s1.db") == rows_of_store(exported / "s1.db")


def rows_of_store(path):
    with sqlite3.connect(path) as connection:
        return connection.execute("SELECT * FROM annotations JOIN rtree USING (id)").fetchall()


def test_the_annotation_store_holds_the_objects_in_level_0_also_of_a_slide_with_bounds(tmp_path):
    path = tmp_path / "s1.mask.zarr"
    raster = SlideMask.open(write_mask(tmp_path / "x.mask.zarr", width=10, height=10)).raster
    with SlideMask.create(
        path,
        raster=raster,
        slide={**slide_dict(), "bounds": [4, 6, 10, 10]},
        classes=CLASSES,
        run=run_info(),
        model_digest="ab",
        with_probability=False,
    ) as writer:
        writer.write_chunk(0, 0, np.ones((10, 10), np.uint8), None)
        writer.finish()
    run(ExportConfig(), mask=path, output=tmp_path / "s1.geojson", extra=ALL)
    with sqlite3.connect(tmp_path / "s1.db") as connection:
        (bounds,) = connection.execute("SELECT min_x, max_x, min_y, max_y FROM rtree").fetchall()
    assert bounds == (0, 20, 0, 20)
    (feature,) = features_in(tmp_path)
    assert feature["geometry"]["coordinates"][0][0] == [-4, -6]


def test_a_python_that_cannot_make_a_store_says_so_and_nothing_is_left(tmp_path, monkeypatch):
    monkeypatch.setattr(
        annotation_store, "_STORE_SCHEMA", "CREATE VIRTUAL TABLE rtree USING no_such_module(id)"
    )
    mask = write_mask(tmp_path / "s1.mask.zarr")
    with pytest.raises(ExportError, match=r"no such module.*--annotation-store"):
        run(ExportConfig(), mask=mask, output=tmp_path / "s1.geojson", extra=ALL)
    assert [p.name for p in tmp_path.iterdir()] == ["s1.mask.zarr"]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_tiatoolbox_reads_the_annotation_store(exported, monkeypatch):
    storage = pytest.importorskip("tiatoolbox.annotation.storage")
    if not hasattr(sqlite3.Connection, "enable_load_extension"):
        # Its only use there is to ask how SQLite was compiled, which needs no extension.
        def compile_options():
            with sqlite3.connect(":memory:") as connection:
                return [o for (o,) in connection.execute("pragma compile_options")]

        monkeypatch.setattr(storage.SQLiteStore, "compile_options", staticmethod(compile_options))
    features = {f["id"]: f for f in features_in(exported)}
    store = storage.SQLiteStore(exported / "s1.db")
    assert len(store) == len(features)
    for key, annotation in store.items():
        feature = features[key]
        assert annotation.geometry.equals(shapely.geometry.shape(feature["geometry"]))
        assert annotation.properties["type"] == feature["properties"]["classification"]["name"]
    tumours = store.query((0, 0, 100, 100), where="props['type'] == 'Tumor'")
    assert tumours
    assert {a.properties["class"] for a in tumours.values()} == {1}
    store.close()
