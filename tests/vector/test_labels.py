"""Labels of tiles: what is annotated, what is background, and what nobody looked at."""

import logging
import time

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as stnp

from wsiseg.classes import ClassTable
from wsiseg.errors import AnnotationError
from wsiseg.geometry import Box, Raster
from wsiseg.vector.labels import AnnotationLabels, annotation_labels, check_annotations
from wsiseg.vector.qupath_read import Annotation
from wsiseg.vector.trace import trace_array

TABLE = ClassTable.from_dict({"classes": ["Nucleus", "Stroma"], "roi": "Region"}, where="test")
RASTER = Raster(50, 40, 0.5, 0.5, 2.0, 2.0)


def rectangle(name, x, y, width, height, *, index=0, holes=()):
    """In raster pixels; annotations are in level 0."""
    rings = [box_ring(x, y, width, height), *(box_ring(*hole) for hole in holes)]
    return Annotation(name, [rings], index)


def box_ring(x, y, width, height):
    corners = [[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]]
    return np.array(corners, np.float64) * 2


def labels(*annotations, box=RASTER.box, table=TABLE):
    return annotation_labels(list(annotations), table, RASTER, box)


def check(*annotations, table=TABLE):
    check_annotations(list(annotations), table, slide_id="s1", width_px_l0=100, height_px_l0=80)


def test_what_nobody_annotated_is_ignored():
    found = labels(rectangle("Nucleus", 5, 6, 10, 4))
    assert found.dtype == np.uint8
    assert found.shape == (40, 50)
    assert (found[6:10, 5:15] == 1).all()
    assert (found != 255).sum() == 40


def test_inside_a_region_of_interest_the_rest_is_background_wherever_it_stands_in_the_file():
    nucleus, region = rectangle("Nucleus", 5, 6, 10, 4), rectangle("Region", 0, 0, 20, 20)
    found = labels(nucleus, region)
    assert (found == labels(region, nucleus)).all()
    assert (found[:20, :20] == 0).sum() == 360
    assert (found == 1).sum() == 40


def test_of_overlapping_annotations_the_later_counts():
    found = labels(rectangle("Nucleus", 0, 0, 10, 10), rectangle("Stroma", 5, 5, 10, 10))
    assert found[7, 7] == 2
    found = labels(rectangle("Stroma", 5, 5, 10, 10), rectangle("Nucleus", 0, 0, 10, 10))
    assert found[7, 7] == 1


def test_what_is_to_be_ignored_is_ignored_last():
    found = labels(rectangle("Ignore*", 0, 0, 4, 4), rectangle("Nucleus", 0, 0, 10, 10))
    assert (found[:4, :4] == 255).all()
    assert found[5, 5] == 1


def test_holes_stay_open():
    found = labels(
        rectangle("Stroma", 0, 0, 20, 20), rectangle("Nucleus", 2, 2, 10, 10, holes=[(4, 4, 2, 2)])
    )
    assert (found[4:6, 4:6] == 2).all()
    assert found[3, 3] == 1


def test_a_derived_class_is_a_kind_of_its_base_class():
    assert labels(rectangle("Nucleus: Positive", 0, 0, 4, 4))[0, 0] == 1


def test_outside_the_slide_everything_is_ignored():
    found = labels(rectangle("Nucleus", -20, -20, 200, 200), box=Box(-3, -2, 60, 50))
    assert (found[2:42, 3:53] == 1).all()
    assert (found == 1).sum() == 40 * 50


def test_a_pixel_has_the_label_of_what_covers_its_centre():
    found = labels(rectangle("Nucleus", 0.4, 0.6, 3.2, 3))
    assert (found[1:4, 0:4] == 1).all()
    assert (found == 1).sum() == 12


@settings(max_examples=60, deadline=None)
@given(
    stnp.arrays(np.uint8, (20, 22), elements=st.sampled_from([1, 1, 2, 255])),
    st.sampled_from([0.5, 1.0, 1.37, 4.0002]),
    st.integers(-3, 20), st.integers(-3, 20), st.integers(1, 12), st.integers(1, 12),
)  # fmt: skip
def test_a_box_has_the_labels_of_the_whole_and_they_are_what_was_traced(
    wanted, downsample, x, y, width, height
):
    raster = Raster(22, 20, 0.5, 0.5, downsample, downsample)
    traced: list[Annotation] = []
    for p in trace_array(wanted):
        rings = [np.round(ring * downsample, 2) for ring in p.rings]
        traced.append(Annotation(TABLE.by_label(p.label).name, [rings], len(traced)))
    whole = annotation_labels(traced, TABLE, raster, raster.box)
    assert (whole == wanted).all()
    box = Box(x, y, width, height)
    part = annotation_labels(traced, TABLE, raster, box)
    inside = box.intersection(raster.box)
    expected = np.full((height, width), 255, np.uint8)
    expected[inside.y - y : inside.bottom - y, inside.x - x : inside.right - x] = whole[
        inside.y : inside.bottom, inside.x : inside.right
    ]
    assert (part == expected).all()


def test_an_annotation_outside_the_slide_is_named():
    inside = rectangle("Nucleus", 1, 1, 2, 2)
    for x, y in ((60, 0), (0, 50), (-20, 0), (0, -20)):
        with pytest.raises(AnnotationError, match=r"slide 's1': annotation feature 7: .*outside"):
            check(inside, rectangle("Nucleus", x, y, 5, 5, index=7))
    check(inside, rectangle("Nucleus", 48, 38, 5, 5))


def test_a_class_that_is_not_in_the_table_is_named_with_the_nearest():
    with pytest.raises(AnnotationError, match=r"feature 3: .*'Nucleos'.*did you mean 'Nucleus'"):
        check(rectangle("Nucleos", 1, 1, 2, 2, index=3))
    with pytest.raises(AnnotationError, match="did you mean 'Region'"):
        check(rectangle("Regoin", 1, 1, 2, 2))
    with pytest.raises(AnnotationError, match="the table has Nucleus, Stroma, Region"):
        check(rectangle("qqq", 1, 1, 2, 2))


def test_regions_ignored_classes_and_derived_classes_are_known():
    for name in ("Region", "Ignore*", "Ignore this", "Stroma", "Stroma: Dense"):
        check(rectangle(name, 1, 1, 2, 2))


def test_annotations_without_a_class_are_left_out_with_one_warning(caplog):
    unclassified = rectangle(None, 1, 1, 2, 2)
    with caplog.at_level(logging.WARNING):
        check(unclassified, unclassified, rectangle("Nucleus", 1, 1, 2, 2))
    (record,) = caplog.records
    assert "slide 's1': 2 annotations without a class" in record.getMessage()
    assert (labels(unclassified) == 255).all()


def test_thousands_of_annotations_do_not_slow_a_tile_down():
    raster = Raster(20_000, 20_000, 0.5, 0.5, 1.0, 1.0)
    rng = np.random.default_rng(0)
    many = [
        Annotation("Nucleus", [[box_ring(x, y, 10, 10)]], i)
        for i, (x, y) in enumerate(rng.integers(0, 9_900, (20_000, 2)).tolist())
    ]
    painter = AnnotationLabels(many, TABLE)
    painter.read(raster, Box(0, 0, 256, 256))
    began = time.perf_counter()
    for i in range(100):
        painter.read(raster, Box(100 * i, 50 * i, 256, 256))
    assert time.perf_counter() - began < 1.0  # 10 ms a tile; it takes about one
