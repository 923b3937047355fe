"""The whole pipeline through the command line, on real pixels, as a user runs it."""

import json

import pytest
import shapely

pytestmark = pytest.mark.slow

TINY = (
    "--preset",
    "tiny",
    "--set",
    "model.dim=8",
    "--set",
    "model.mults=[1, 2]",
    "--set",
    "model.groups=4",
    "--set",
    "model.attention=none",  # the middle of so flat a network has 4,096 positions
)


@pytest.fixture(scope="module")
def labelled(tmp_path_factory, real_slide):
    """A region of the real slide as drawn in QuPath: two classes inside a region of interest."""
    folder = tmp_path_factory.mktemp("annotated")

    def box(name, x, y, width, height):
        ring = [[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]]
        return {
            "type": "Feature",
            "geometry": {"type": "Polygon", "coordinates": [ring]},
            "properties": {"classification": {"name": name, "color": [0, 0, 1]}},
        }

    features = [
        box("Region", 300, 600, 1400, 1400),
        *(box("Epithelium", 300 + 200 * i, 800, 100, 900) for i in range(7)),
    ]
    path = folder / "cmu-1-small-region.geojson"
    path.write_text(json.dumps({"type": "FeatureCollection", "features": features}))
    classes = folder / "classes.yaml"
    classes.write_text("classes:\n  - {name: Epithelium, color: [200, 0, 0]}\nroi: Region\n")
    return path, classes


@pytest.fixture(scope="module")
def pipeline(wsiseg, tmp_path_factory, real_slide, labelled):
    """Run every stage once; give the folder and what each command printed."""
    root = tmp_path_factory.mktemp("pipeline")
    annotation, classes = labelled
    steps = {
        "tile": ("tile", real_slide, "-o", root / "tiles", "--tile-size", 128,
                 "--annotations", annotation, "--classes", classes),
        "pretrain": ("pretrain", root / "tiles", "-o", root / "pre", *TINY, "--steps", 4,
                     "--batch-size", 2, "--validate-every", 2),
        "finetune": ("finetune", root / "tiles", "-o", root / "run", "--pretrained", root / "pre",
                     "--steps", 4, "--batch-size", 2, "--validate-every", 2),
        "segment": ("segment", real_slide, "--model", root / "run", "-o", root / "out"),
    }  # fmt: skip
    results = {}
    for name, arguments in steps.items():
        done = wsiseg(*arguments, "--json")
        assert done.returncode == 0, f"{name}: {done.stderr}"
        results[name] = json.loads(done.stdout)["results"][0]
    return root, results


def test_the_store_holds_the_labelled_tiles(pipeline):
    _, results = pipeline
    assert results["tile"]["tiles"] > results["tile"]["labelled_tiles"] > 0


@pytest.mark.parametrize(
    "name", ["model.json", "weights.safetensors", "metrics.jsonl", "curves.png", "config.yaml"]
)
def test_a_run_folder_holds_everything_needed_later(pipeline, name):
    root, _ = pipeline
    for run in ("pre", "run"):
        assert (root / run / name).stat().st_size > 0


def test_pretraining_leaves_sample_grids(pipeline):
    root, _ = pipeline
    assert sorted((root / "pre" / "samples").glob("*.png"))


def test_segment_leaves_geojson_mask_and_overlay(pipeline, wsiseg):
    root, _ = pipeline
    out = root / "out"
    names = {p.name for p in out.iterdir()}
    stem = "cmu-1-small-region"
    assert names == {f"{stem}.geojson", f"{stem}.mask.zarr", f"{stem}.png"}
    assert wsiseg("verify", out / f"{stem}.mask.zarr").returncode == 0
    assert wsiseg("check", out / f"{stem}.geojson").returncode == 0


def test_every_polygon_passes_qupaths_precision_reduction(pipeline):
    root, results = pipeline
    collection = json.loads((root / "out" / "cmu-1-small-region.geojson").read_text())
    assert len(collection["features"]) == results["segment"]["features"]
    for feature in collection["features"]:
        polygon = shapely.from_geojson(json.dumps(feature["geometry"]))
        assert polygon.is_valid
        assert not shapely.set_precision(polygon, 0.01).is_empty


def test_export_redoes_the_same_geojson_from_the_mask(pipeline, wsiseg, tmp_path):
    root, _ = pipeline
    mask = root / "out" / "cmu-1-small-region.mask.zarr"
    again = tmp_path / "again.geojson"
    assert wsiseg("export", mask, "-o", again).returncode == 0
    assert again.read_bytes() == (root / "out" / "cmu-1-small-region.geojson").read_bytes()


def test_a_prediction_evaluated_against_itself_is_perfect(pipeline, wsiseg, tmp_path):
    root, _ = pipeline
    mask = root / "out" / "cmu-1-small-region.mask.zarr"
    metrics = tmp_path / "metrics.json"
    done = wsiseg("evaluate", mask, mask, "-o", metrics, "--set", "instances=none")
    assert done.returncode == 0, done.stderr
    pooled = json.loads(metrics.read_text())["pooled"]
    assert pooled["accuracy"] == 1.0
    # After four steps the network may call nothing epithelium: no score then, not a perfect one.
    assert pooled["classes"]["Epithelium"]["dice"] in (None, 1.0)


def test_running_segment_again_changes_no_byte(pipeline, wsiseg, real_slide):
    root, _ = pipeline
    before = {p: p.read_bytes() for p in (root / "out").rglob("*") if p.is_file()}
    done = wsiseg("segment", real_slide, "--model", root / "run", "-o", root / "out")
    assert done.returncode == 0, done.stderr
    assert {p: p.read_bytes() for p in (root / "out").rglob("*") if p.is_file()} == before


def test_segment_with_no_output_writes_into_the_current_folder(
    pipeline, wsiseg, real_slide, tmp_path
):
    root, _ = pipeline
    done = wsiseg("segment", real_slide, "--model", root / "run", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "cmu-1-small-region.geojson").exists()


def test_segment_writes_the_one_geojson_that_was_named(pipeline, wsiseg, real_slide, tmp_path):
    root, _ = pipeline
    done = wsiseg("segment", real_slide, "--model", root / "run", "-o", tmp_path / "X.geojson")
    assert done.returncode == 0, done.stderr
    assert {p.name for p in tmp_path.iterdir()} == {"X.geojson", "X.mask.zarr", "X.png"}


def test_two_dask_workers_give_the_same_bytes_as_one_process(
    pipeline, wsiseg, real_slide, tmp_path
):
    root, _ = pipeline
    copies = []
    for name in ("a.svs", "b.svs"):
        copies.append(tmp_path / name)
        copies[-1].write_bytes(real_slide.read_bytes())
    done = wsiseg(
        "segment", *copies, "--model", root / "run", "-o", tmp_path / "two", "--workers", 2
    )
    assert done.returncode == 0, done.stderr
    done = wsiseg("segment", *copies, "--model", root / "run", "-o", tmp_path / "one")
    assert done.returncode == 0, done.stderr
    for name in ("a.geojson", "b.geojson"):
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()


def test_info_describes_the_slide(wsiseg, real_slide):
    done = wsiseg("info", real_slide, "--json")
    slide = json.loads(done.stdout)["slides"][0]
    assert (slide["width_px_l0"], slide["height_px_l0"]) == (2220, 2967)
    assert slide["mpp_x"] == pytest.approx(0.499)


def test_doctor_finds_nothing_failed(wsiseg):
    done = wsiseg("doctor", "--json")
    assert done.returncode == 0, done.stdout
    checks = {c["check"]: c["status"] for c in json.loads(done.stdout)["checks"]}
    assert checks["openslide"] == checks["zarr"] == checks["torch"] == "ok"
