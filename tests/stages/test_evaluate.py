"""`evaluate` over real files of every kind: stores, GeoJSON, mask images and folders of them."""

import gzip
import json
from dataclasses import replace

import numpy as np
import pytest
import stores_on_disk
import tifffile
from PIL import Image

from wsiseg.classes import ClassTable
from wsiseg.errors import AnnotationError, ConfigError, StoreError
from wsiseg.geometry import Raster
from wsiseg.outputs import partial_path
from wsiseg.runinfo import RunInfo
from wsiseg.settings.evaluate import EvaluateConfig
from wsiseg.settings.export import ExportConfig
from wsiseg.stages import evaluate, export
from wsiseg.store.masks import SlideMask
from wsiseg.training import comparison

CONFIG = EvaluateConfig(bootstrap=50)
TWO = ClassTable.of_names(["Tumor", "Stroma"])
ONE = ClassTable.of_names(["Gland"])


def write_mask(path, labels, *, classes=TWO, mpp=0.5, chunk_px=64, bounds=None):
    height, width = labels.shape
    slide = {
        "slide_id": path.name.removesuffix(".mask.zarr"),
        "width_px_l0": 2 * width,
        "height_px_l0": 2 * height,
        "bounds": bounds,
    }
    raster = Raster(width, height, mpp, mpp, 2.0, 2.0)
    with SlideMask.create(
        path,
        raster=raster,
        slide=slide,
        classes=classes,
        run=RunInfo(stage="test", config={}, inputs={}),
        model_digest="00",
        with_probability=False,
        chunk_px=chunk_px,
    ) as writer:
        for row, column in writer.pending_chunks():
            box = writer.chunk_box(row, column)
            part = labels[box.y : box.bottom, box.x : box.right]
            writer.write_chunk(row, column, part, None)
        writer.finish()
    return path


def write_image(path, labels):
    Image.fromarray(labels).save(path)
    return path


def write_geojson(path, *features):
    """Each feature is (class name, x, y, width, height) in level-0 pixels."""
    found = []
    for name, x, y, w, h in features:
        ring = [[x, y], [x + w, y], [x + w, y + h], [x, y + h], [x, y]]
        properties = {"objectType": "annotation", "classification": {"name": name}}
        geometry = {"type": "Polygon", "coordinates": [ring]}
        found.append({"type": "Feature", "geometry": geometry, "properties": properties})
    path.write_text(json.dumps({"type": "FeatureCollection", "features": found}))
    return path


def random_labels(seed=0, shape=(150, 190), values=(0, 1, 2)):
    """Blobs, since objects of one pixel say little."""
    rng = np.random.default_rng(seed)
    coarse = rng.choice(np.array(values, np.uint8), (shape[0] // 9 + 1, shape[1] // 9 + 1))
    return np.kron(coarse, np.ones((9, 9), np.uint8))[: shape[0], : shape[1]]


def run(prediction, truth, config=CONFIG, **options):
    return evaluate.run(config, prediction=prediction, truth=truth, **options)


def dice(result, name="Tumor"):
    return result["pooled"]["classes"][name]["dice"]


# Stores.


def test_two_stores_are_counted_as_their_arrays_are(tmp_path):
    truth, guess = random_labels(0, values=(0, 1, 2, 255)), random_labels(1, values=(0, 1, 2, 255))
    result = run(
        write_mask(tmp_path / "a.mask.zarr", guess), write_mask(tmp_path / "b.mask.zarr", truth)
    )
    known = truth != 255
    for label, name in ((1, "Tumor"), (2, "Stroma")):
        t, g = (truth == label)[known], (guess == label)[known]
        assert dice(result, name) == pytest.approx(2 * (t & g).sum() / (t.sum() + g.sum()))
    right = np.where(guess == 255, 0, guess)[known] == truth[known]
    assert result["pooled"]["accuracy"] == pytest.approx(right.mean())
    assert [*result["images"]] == ["a"]
    assert result["images"]["a"]["classes"] == result["pooled"]["classes"]


def test_the_result_does_not_depend_on_chunks_and_blocks(tmp_path, monkeypatch):
    truth, guess = random_labels(0), random_labels(1)
    once = run(
        write_mask(tmp_path / "a.mask.zarr", guess), write_mask(tmp_path / "b.mask.zarr", truth)
    )
    monkeypatch.setattr(comparison, "BLOCK_PX", 37)
    (tmp_path / "again").mkdir()
    again = run(
        write_mask(tmp_path / "again" / "a.mask.zarr", guess, chunk_px=96),
        write_mask(tmp_path / "again" / "b.mask.zarr", truth, chunk_px=32),
    )
    assert again == once


def test_a_prediction_against_itself_is_perfect(tmp_path):
    mask = write_mask(tmp_path / "a.mask.zarr", random_labels())
    result = run(mask, mask)
    for scores in result["pooled"]["classes"].values():
        distances = {name for name in scores if name.endswith("_um")}
        assert {scores[name] for name in distances} == {0.0}
        assert {scores[name] for name in scores.keys() - distances} == {1.0}


def test_what_was_not_predicted_counts_as_background(tmp_path):
    truth = np.zeros((64, 64), np.uint8)
    truth[:, :32] = 1
    guess = np.where(truth == 1, 1, 255).astype(np.uint8)
    guess[:32] = 255
    result = run(
        write_mask(tmp_path / "a.mask.zarr", guess), write_mask(tmp_path / "b.mask.zarr", truth)
    )
    assert result["pooled"]["classes"]["Tumor"]["recall"] == 0.5
    assert result["pooled"]["accuracy"] == 0.75


def test_classes_of_two_stores_are_matched_by_name_not_by_number(tmp_path):
    labels = random_labels()
    other = np.array([0, 2, 1], np.uint8)[labels]
    turned = ClassTable.of_names(["Stroma", "Tumor"])
    result = run(
        write_mask(tmp_path / "a.mask.zarr", labels),
        write_mask(tmp_path / "b.mask.zarr", other, classes=turned),
    )
    assert dice(result) == dice(result, "Stroma") == 1.0


def test_stores_of_other_classes_are_refused(tmp_path):
    first = write_mask(tmp_path / "a.mask.zarr", random_labels())
    second = write_mask(tmp_path / "b.mask.zarr", random_labels(values=(0, 1)), classes=ONE)
    with pytest.raises(ConfigError, match=r"classes of .*b\.mask.*Gland; Tumor, Stroma"):
        run(first, second)


def test_stores_of_another_resolution_are_refused_with_both(tmp_path):
    first = write_mask(tmp_path / "a.mask.zarr", random_labels())
    second = write_mask(tmp_path / "b.mask.zarr", random_labels(), mpp=0.25)
    with pytest.raises(ConfigError, match=r"'a': .*resolution: 0\.5 and 0\.25 um/px"):
        run(first, second)


def test_what_is_no_finished_mask_is_refused(tmp_path):
    unfinished = partial_path(tmp_path / "a.mask.zarr")
    write_mask(tmp_path / "a.mask.zarr", random_labels()).rename(unfinished)
    (unfinished / "ledger.json").unlink()
    for store in (unfinished, stores_on_disk.write_tiles(tmp_path / "tiles.zarr")):
        with pytest.raises(StoreError):
            run(store, store)


# Images.


def test_images_of_another_size_are_refused_with_both_sizes(tmp_path):
    first = write_image(tmp_path / "a.png", random_labels(shape=(20, 30)))
    second = write_image(tmp_path / "b.png", random_labels(shape=(20, 31)))
    with pytest.raises(ConfigError, match="30 x 20 px and 31 x 20 px"):
        run(first, second)
    store = write_mask(tmp_path / "a.mask.zarr", random_labels(shape=(70, 80)))
    with pytest.raises(ConfigError, match="80 x 70 px and 31 x 20 px"):
        run(store, second)


@pytest.mark.parametrize("suffix", [".png", ".tif", ".bmp"])
def test_a_binary_image_and_one_of_labels_mean_the_same(tmp_path, suffix):
    labels = random_labels(values=(0, 1))
    write_image(tmp_path / f"a{suffix}", labels * 255)
    write_image(tmp_path / "b.png", labels)
    result = run(tmp_path / f"a{suffix}", tmp_path / "b.png")
    assert dice(result, "Foreground") == 1.0


def test_a_one_bit_image_is_read(tmp_path):
    labels = random_labels(values=(0, 1))
    Image.fromarray(labels * 255).convert("1").save(tmp_path / "a.png")
    write_image(tmp_path / "b.png", labels)
    assert dice(run(tmp_path / "a.png", tmp_path / "b.png"), "Foreground") == 1.0


def test_labels_of_a_folder_may_hold_an_image_with_nothing_but_ignored(tmp_path):
    """0 and 255 alone mean a binary mask only if all images of the side hold nothing else."""
    for side in ("guess", "truth"):
        (tmp_path / side).mkdir()
        write_image(tmp_path / side / "x.png", random_labels(values=(0, 1)))
    blank = np.zeros((40, 40), np.uint8)
    write_image(tmp_path / "guess" / "y.png", blank)
    blank[:10] = 255
    write_image(tmp_path / "truth" / "y.png", blank)
    result = run(tmp_path / "guess", tmp_path / "truth")
    assert dice(result, "Foreground") == 1.0
    assert result["images"]["y"]["classes"]["Foreground"]["dice"] is None


def test_classes_of_images_are_those_of_all_images(tmp_path):
    for side in ("guess", "truth"):
        (tmp_path / side).mkdir()
        write_image(tmp_path / side / "a.png", random_labels(values=(0, 1)))
        write_image(tmp_path / side / "b.png", random_labels(values=(0, 3)))
    result = run(tmp_path / "guess", tmp_path / "truth")
    assert [*result["pooled"]["classes"]] == ["Label 1", "Label 2", "Label 3"]
    assert dice(result, "Label 2") is None


def test_a_binary_image_against_several_classes_is_refused(tmp_path):
    store = write_mask(tmp_path / "a.mask.zarr", random_labels())
    image = write_image(tmp_path / "b.png", random_labels(values=(0, 255)))
    with pytest.raises(AnnotationError, match=r"b\.png.* 0 and 255 only.* 2 classes"):
        run(store, image)


def test_a_label_that_the_other_side_does_not_have_is_refused(tmp_path):
    store = write_mask(tmp_path / "a.mask.zarr", random_labels())
    image = write_image(tmp_path / "b.png", random_labels(values=(0, 7)))
    with pytest.raises(AnnotationError, match=r"b\.png' holds the label 7.* 2 classes"):
        run(store, image)


def test_d10_a_jpeg_mask_is_refused(tmp_path):
    image = write_image(tmp_path / "a.jpg", random_labels(values=(0, 255)))
    with pytest.raises(AnnotationError, match="JPEG, which changes labels"):
        run(image, image)


def test_an_image_that_is_none_is_refused(tmp_path):
    (tmp_path / "a.png").write_bytes(b"\x89PNG\r\n\x1a\nnot really")
    with pytest.raises(AnnotationError, match=r"a\.png"):
        run(tmp_path / "a.png", tmp_path / "a.png")
    tifffile.imwrite(tmp_path / "b.tif", random_labels().astype(np.uint16))
    with pytest.raises(AnnotationError, match=r"b\.tif.*mode"):
        run(tmp_path / "b.tif", tmp_path / "b.tif")


def test_an_image_of_the_whole_slide_is_brought_to_the_resolution_of_the_mask(tmp_path):
    labels = random_labels()
    store = write_mask(tmp_path / "a.mask.zarr", labels)
    image = write_image(tmp_path / "truth.png", np.kron(labels, np.ones((2, 2), np.uint8)))
    assert dice(run(store, image)) == dice(run(store, image), "Stroma") == 1.0


def test_figures_in_um_need_a_resolution(tmp_path):
    a, b = np.zeros((2, 40, 40), np.uint8)
    a[5:15, 5:15], b[5:15, 9:19] = 1, 1
    first, second = write_image(tmp_path / "a.png", a), write_image(tmp_path / "b.png", b)
    scores = run(first, second)["pooled"]["classes"]["Foreground"]
    assert scores["hd95_um"] is scores["object_hausdorff_um"] is None
    scores = run(first, second, replace(CONFIG, mpp=0.25))["pooled"]["classes"]["Foreground"]
    assert scores["hd95_um"] == scores["object_hausdorff_um"] == pytest.approx(1.0)


# GeoJSON.


@pytest.mark.parametrize("suffix", [".geojson", ".geojson.gz"])
def test_a_mask_equals_its_own_export(tmp_path, suffix):
    mask = write_mask(tmp_path / "a.mask.zarr", random_labels(values=(0, 1, 2)))
    out = tmp_path / f"a{suffix}"
    export.run(ExportConfig(), mask=mask, output=out)
    for sides in ((mask, out), (out, mask), (out, out)):
        result = run(*sides)
        assert dice(result) == dice(result, "Stroma") == 1.0
        assert result["pooled"]["accuracy"] == 1.0


def test_the_export_of_a_slide_with_bounds_lies_on_its_mask(tmp_path):
    labels = random_labels()
    labels[:30] = labels[:, :30] = 0
    mask = write_mask(tmp_path / "a.mask.zarr", labels, bounds=[60, 40, 300, 200])
    export.run(ExportConfig(), mask=mask, output=tmp_path / "a.geojson")
    assert dice(run(mask, tmp_path / "a.geojson")) == 1.0


def test_polygons_leave_background_but_nothing_outside_a_region_counts(tmp_path):
    labels = np.zeros((50, 60), np.uint8)
    labels[:, :20] = 1
    mask = write_mask(tmp_path / "a.mask.zarr", labels, classes=ONE)
    glands = ("Gland", 0, 0, 20, 100)
    plain = run(mask, write_geojson(tmp_path / "plain.geojson", glands))
    assert plain["pooled"]["classes"]["Gland"]["precision"] == 0.5
    assert np.sum(plain["pooled"]["confusion"]) == labels.size
    region = ("Region*", 0, 0, 30, 100)
    inside = run(mask, write_geojson(tmp_path / "region.geojson", glands, region))
    assert inside["pooled"]["classes"]["Gland"]["precision"] == pytest.approx(10 / 15)
    ignored = ("Ignore*", 20, 0, 10, 100)
    without = run(mask, write_geojson(tmp_path / "ignored.geojson", glands, ignored))
    assert without["pooled"]["classes"]["Gland"]["precision"] == pytest.approx(10 / 15)
    assert np.sum(without["pooled"]["confusion"]) == labels.size - 5 * 50


def test_polygons_of_both_sides_are_compared_at_level_0(tmp_path):
    first = write_geojson(tmp_path / "a.geojson", ("Tumor: Positive", 0, 0, 10, 10))
    second = write_geojson(tmp_path / "b.geojson", ("Tumor", 5, 0, 10, 10), ("Stroma", 0, 0, 5, 10))
    result = run(first, second)
    assert dice(result) == 0.5
    assert dice(result, "Stroma") == 0.0


def test_a_class_of_the_polygons_that_the_mask_does_not_have_is_refused(tmp_path):
    mask = write_mask(tmp_path / "a.mask.zarr", random_labels())
    truth = write_geojson(tmp_path / "b.geojson", ("Tumour", 0, 0, 10, 10))
    with pytest.raises(AnnotationError, match="did you mean 'Tumor'"):
        run(mask, truth)


def test_polygons_outside_the_slide_are_refused(tmp_path):
    mask = write_mask(tmp_path / "a.mask.zarr", random_labels())
    truth = write_geojson(tmp_path / "b.geojson", ("Tumor", 9000, 0, 10, 10))
    with pytest.raises(AnnotationError, match="outside the slide"):
        run(mask, truth)
    alone = write_geojson(tmp_path / "c.geojson", ("Tumor", 90_000_000, 90_000_000, 10, 10))
    with pytest.raises(ConfigError, match="more than any slide"):
        run(alone, alone)


def test_images_do_not_say_which_of_several_polygon_classes_is_which(tmp_path):
    image = write_image(tmp_path / "a.png", random_labels())
    truth = write_geojson(tmp_path / "b.geojson", ("Tumor", 0, 0, 9, 9), ("Stroma", 9, 0, 9, 9))
    with pytest.raises(ConfigError, match="by number only"):
        run(image, truth)
    truth = write_geojson(tmp_path / "b.geojson", ("Tumor", 0, 0, 9, 9))
    labels = np.zeros((20, 30), np.uint8)
    labels[:9, :9] = 255
    assert dice(run(write_image(tmp_path / "a.png", labels), truth)) == 1.0


def test_a_geojson_that_is_none_is_refused(tmp_path):
    (tmp_path / "a.geojson.gz").write_bytes(gzip.compress(b"[1, 2"))
    with pytest.raises(AnnotationError, match=r"a\.geojson\.gz"):
        run(tmp_path / "a.geojson.gz", tmp_path / "a.geojson.gz")


# Folders.


@pytest.fixture
def folders(tmp_path):
    for i, side in enumerate(("guess", "truth")):
        (tmp_path / side).mkdir()
        for name in "abcd":
            labels = random_labels(ord(name) + 10 * i, shape=(60, 70), values=(0, 1))
            write_image(tmp_path / side / f"{name}.png", labels)
    return tmp_path / "guess", tmp_path / "truth"


def test_folders_are_matched_by_stem_and_pooled(folders, tmp_path):
    output = tmp_path / "out" / "metrics.json"
    result = run(*folders, output=output)
    assert [*result["images"]] == ["a", "b", "c", "d"]
    confusions = [np.array(image["confusion"]) for image in result["images"].values()]
    assert (np.sum(confusions, axis=0) == result["pooled"]["confusion"]).all()
    scores = result["pooled"]["classes"]["Foreground"]
    each = [image["classes"]["Foreground"]["aji"] for image in result["images"].values()]
    assert scores["aji"] == pytest.approx(np.mean(each))
    for metric in ("dice", "iou", "precision", "recall", "aji", "pq"):
        low, high = result["confidence"]["Foreground"][metric]
        assert low <= scores[metric] <= high
    assert json.loads(output.read_text()) == {"schema_version": 1, **result}


def test_files_without_a_partner_are_named(folders):
    guess, truth = folders
    (guess / "b.png").unlink()
    with pytest.raises(ConfigError, match=r"guess' holds no partner of b$"):
        run(guess, truth)
    (truth / "b.png").unlink()
    for name in "uvwxyz":
        write_image(guess / f"{name}.png", random_labels())
    with pytest.raises(ConfigError, match=r"truth' holds no partner of u, v, w, x, y and 1 more$"):
        run(guess, truth)


def test_of_several_files_of_a_slide_the_mask_is_taken(tmp_path):
    (tmp_path / "out").mkdir()
    labels = random_labels(values=(0, 1))
    mask = write_mask(tmp_path / "out" / "s.mask.zarr", labels, classes=ONE)
    write_geojson(tmp_path / "out" / "s.geojson", ("Gland", 0, 0, 2, 2))
    write_image(tmp_path / "out" / "s.png", 1 - labels)
    assert dice(run(tmp_path / "out", mask), "Gland") == 1.0


def test_paths_that_hold_nothing_are_refused(tmp_path):
    with pytest.raises(ConfigError, match="no such file or folder"):
        run(tmp_path / "nowhere", tmp_path)
    with pytest.raises(ConfigError, match="hold no mask, GeoJSON or mask image"):
        run(tmp_path, tmp_path)


# Objects and the table.


def test_d20_objects_that_touch_are_one_unless_a_watershed_cuts_them(tmp_path):
    y, x = np.indices((60, 90))
    labels = np.zeros((60, 90), np.uint8)
    for centre in (30, 51):
        labels[(y - 30) ** 2 + (x - centre) ** 2 <= 144] = 1
    truth = write_image(tmp_path / "truth.png", labels)
    labels[:, 40:42] = 0
    guess = write_image(tmp_path / "guess.png", labels)
    joined = run(guess, truth)["pooled"]["classes"]["Foreground"]
    cut = run(guess, truth, replace(CONFIG, instances="watershed"))["pooled"]["classes"]
    assert joined["aji"] < 0.6
    assert cut["Foreground"]["aji"] > 0.85
    assert cut["Foreground"]["dq"] == 1.0
    assert cut["Foreground"]["dice"] == joined["dice"]


def test_an_object_where_the_truth_is_ignored_counts_for_nothing(tmp_path):
    truth, guess = np.zeros((2, 40, 40), np.uint8)
    truth[5:15, 5:15] = guess[5:15, 5:15] = guess[25:35, 25:35] = 1
    truth[20:] = 255
    truth = write_mask(tmp_path / "b.mask.zarr", truth, classes=ONE)
    result = run(write_mask(tmp_path / "a.mask.zarr", guess, classes=ONE), truth)
    scores = result["pooled"]["classes"]["Gland"]
    assert scores["dice"] == scores["aji"] == scores["pq"] == 1.0
    assert scores["hd95_um"] == 0.0


@pytest.mark.parametrize("reason", ["none", "too large"])
def test_without_objects_the_pixel_metrics_are_the_same(tmp_path, monkeypatch, reason):
    mask = write_mask(tmp_path / "a.mask.zarr", random_labels())
    config = CONFIG
    if reason == "none":
        config = replace(CONFIG, instances="none")
    else:
        monkeypatch.setattr(comparison, "MAX_OBJECT_PIXELS", 1000)
    result = run(mask, mask, config)
    assert result["images"]["a"]["objects"] == reason
    scores = result["pooled"]["classes"]["Tumor"]
    assert scores["dice"] == 1.0
    assert {scores[name] for name in comparison.OBJECT_METRICS} == {None}


def test_a_class_that_is_nowhere_is_null_in_the_file(tmp_path):
    mask = write_mask(tmp_path / "a.mask.zarr", random_labels(values=(0, 1)))
    run(mask, mask, output=tmp_path / "metrics.json")
    written = json.loads((tmp_path / "metrics.json").read_text())
    assert {*written["pooled"]["classes"]["Stroma"].values()} == {None}


def test_the_table_has_a_row_for_each_class_with_the_same_columns(folders):
    rows = evaluate.summary_rows(run(*folders))
    assert [row["class"] for row in rows] == ["Foreground"]
    columns = ["class", "dice", "ci", "iou", "precision", "recall", "pq", "aji", "hd95_um"]
    assert [*rows[0]] == [*columns, "images"]
    low, high = map(float, rows[0]["ci"].split(".."))
    assert low <= rows[0]["dice"] <= high
    assert rows[0]["images"] == 4


def test_the_command_prints_the_table_or_json(folders, wsiseg, tmp_path):
    done = wsiseg("evaluate", *folders, "-o", tmp_path / "m.json", "--set", "bootstrap=20")
    assert done.returncode == 0, done.stderr
    assert "Foreground" in done.stdout
    done = wsiseg("evaluate", *folders, "--json", "--set", "bootstrap=20")
    assert json.loads(done.stdout) == json.loads((tmp_path / "m.json").read_text())
    done = wsiseg("evaluate", folders[0], tmp_path / "nowhere")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ")
    assert "Traceback" not in done.stderr
