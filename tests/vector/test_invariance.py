"""A thousand awkward masks: exact, valid and the same bytes, however they are cut and resumed."""

import json

import numpy as np
import pytest
import shapely
from awkward_masks import KINDS, awkward_mask
from hypothesis import given
from hypothesis import strategies as st
from soak import examples

from wsiseg.classes import ClassTable
from wsiseg.geometry import Box, Raster
from wsiseg.settings.export import ExportConfig
from wsiseg.vector.batch import joined
from wsiseg.vector.check import check_file
from wsiseg.vector.labels import annotation_labels
from wsiseg.vector.qupath import write_geojson
from wsiseg.vector.qupath_read import read_annotations
from wsiseg.vector.simplify import simplify_shared
from wsiseg.vector.trace import source_of_array, trace_batches

CLASSES = ClassTable.of_names(["Tumor", "Stroma"])
SEEDS = st.integers(0, 2**32 - 1)
KIND = st.sampled_from(KINDS)


def write(path, source, shape, *, downsample=1.0, **config):
    write_geojson(
        path,
        source,
        raster=Raster(shape[1], shape[0], 0.5, 0.5, downsample, downsample),
        classes=CLASSES,
        slide={"slide_id": "s1", "bounds": None},
        provenance={},
        config=ExportConfig(**config),
    )
    return path.read_bytes()


def cut(labels, probability, *, block_rows, large_vertices):
    """Trace in blocks of rows; polygons with many holes are spilled to a file."""
    height, width = labels.shape
    return lambda with_junctions: trace_batches(
        lambda box: labels[box.y : box.bottom],
        Box(0, 0, width, height),
        read_probability=lambda box: probability[box.y : box.bottom],
        block_rows=block_rows,
        large_vertices=large_vertices,
        with_junctions=with_junctions,
    )


def shapes_in(path):
    features = json.loads(path.read_bytes())["features"]
    return [shapely.geometry.shape(f["geometry"]) for f in features]


@examples(pr=1_000, night=50_000)
@given(KIND, SEEDS)
def test_polygons_of_a_mask_are_its_pixels_valid_on_qupaths_grid_and_inside_the_slide(kind, seed):
    labels = awkward_mask(kind, seed)
    batch = joined(source_of_array(labels)(False))
    shapes = batch.to_shapely()
    on_grid = shapely.set_precision(shapes, 0.01)
    assert not shapely.is_empty(on_grid).any()
    assert shapely.is_valid(shapes).all()
    assert (shapely.area(on_grid) == batch.areas_px).all()
    assert batch.areas_px.sum() == ((labels != 0) & (labels != 255)).sum()
    if len(shapes):
        left, top, right, bottom = shapely.total_bounds(shapes)
        assert left >= 0
        assert top >= 0
        assert right <= labels.shape[1]
        assert bottom <= labels.shape[0]
    junctions = joined(source_of_array(labels)(True)).to_shapely()
    assert shapely.coverage_is_valid(junctions), "neighbours do not share their edges"


@examples(pr=1_000, night=50_000)
@given(KIND, SEEDS, st.sampled_from([0.75, 1.0, 2.0]))
def test_simplified_polygons_are_valid_near_the_mask_and_inside_the_slide(kind, seed, tolerance):
    labels = awkward_mask(kind, seed, largest=16)
    before = joined(source_of_array(labels)(True))
    after = simplify_shared(before, tolerance)
    shapes = shapely.set_precision(after.to_shapely(), 0.01)
    assert shapely.is_valid(shapes).all()
    assert not shapely.is_empty(shapes).any()
    assert np.isfinite(shapely.get_coordinates(shapes)).all()
    assert (after.vertices >= 0).all()
    assert (after.vertices <= labels.shape[::-1]).all()
    assert shapely.coverage_is_valid(after.to_shapely())
    for label in (1, 2):
        exact = before.to_shapely()[before.labels == label]
        simple = shapes[after.labels == label]
        moved = shapely.symmetric_difference(shapely.union_all(exact), shapely.union_all(simple))
        perimeter = shapely.length(exact).sum()
        assert moved.area <= tolerance * perimeter
        if tolerance * perimeter <= 0.01 * shapely.area(exact).sum():
            both = shapely.intersection(shapely.union_all(exact), shapely.union_all(simple)).area
            assert both >= 0.99 * (both + moved.area)


@examples(pr=150, night=5_000)
@given(KIND, SEEDS, st.integers(1, 25), st.sampled_from([0, 8, 1 << 20]))
def test_the_file_is_the_same_bytes_however_the_mask_is_cut_and_gives_the_mask_back(
    tmp_path_factory, kind, seed, block_rows, large_vertices
):
    folder = tmp_path_factory.getbasetemp() / "cut"
    folder.mkdir(exist_ok=True)
    labels = awkward_mask(kind, seed)
    probability = np.random.default_rng(seed).integers(0, 256, labels.shape, dtype=np.uint8)
    whole = write(folder / "a.geojson", source_of_array(labels, probability), labels.shape)
    pieces = cut(labels, probability, block_rows=block_rows, large_vertices=large_vertices)
    assert write(folder / "b.geojson", pieces, labels.shape) == whole
    assert check_file(folder / "a.geojson") == []
    raster = Raster(labels.shape[1], labels.shape[0], 0.5, 0.5, 1.0, 1.0)
    found = annotation_labels(read_annotations(folder / "a.geojson"), CLASSES, raster, raster.box)
    assert (found == np.where(labels == 0, 255, labels)).all()


@examples(pr=60, night=2_000)
@given(KIND, SEEDS, st.integers(1, 25), st.sampled_from([1.0, 3.9999]))
def test_simplified_files_are_the_same_bytes_however_the_mask_is_cut(
    tmp_path_factory, kind, seed, block_rows, downsample
):
    folder = tmp_path_factory.getbasetemp() / "cut"
    folder.mkdir(exist_ok=True)
    labels = awkward_mask(kind, seed)
    probability = np.zeros(labels.shape, np.uint8)
    how = {"downsample": downsample, "simplify_um": 0.5, "min_area_um2": 0.6, "min_hole_um2": 0.6}
    whole = write(folder / "a.geojson", source_of_array(labels, probability), labels.shape, **how)
    pieces = cut(labels, probability, block_rows=block_rows, large_vertices=0)
    assert write(folder / "b.geojson", pieces, labels.shape, **how) == whole
    assert check_file(folder / "a.geojson") == []
    assert all(not shapely.set_precision(s, 0.01).is_empty for s in shapes_in(folder / "a.geojson"))


@pytest.mark.parametrize("kind", KINDS, ids=lambda kind: kind.__name__)
def test_filters_count_pixels_also_of_polygons_in_a_file(kind):
    labels = np.kron(awkward_mask(kind, 5, largest=40), np.ones((2, 2), np.uint8))
    from wsiseg.vector.batch import drop_small, each_polygon

    height, width = labels.shape

    def kept(large_vertices):
        traced = trace_batches(
            lambda box: labels[box.y : box.bottom],
            Box(0, 0, width, height),
            block_rows=3,
            large_vertices=large_vertices,
        )
        found = each_polygon(drop_small(traced, min_area_px=5, min_hole_px=9))
        return [(p.label, p.area_px, [r.tolist() for r in p.rings]) for p in found]

    assert kept(0) == kept(1 << 20)
