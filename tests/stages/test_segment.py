"""Segmenting a slide: a finished mask, figures, a picture; then the command that users type."""

import json
import subprocess
import tomllib
from pathlib import Path

import numpy as np
import pytest
import shapely
from click.testing import CliRunner
from PIL import Image
from segmenting import (
    DARK,
    GLASS,
    STAINED,
    ByColour,
    windows_of,
    write_image,
    write_mask,
    write_model,
)

from wsiseg.cli.main import cli
from wsiseg.errors import CheckpointError, ConfigError, NoTissueError, OutputExistsError
from wsiseg.geometry import Box
from wsiseg.models import packaged
from wsiseg.progress import SilentProgress
from wsiseg.settings.export import ExportConfig
from wsiseg.settings.segment import SegmentConfig
from wsiseg.settings.tile import TissueConfig
from wsiseg.slides.cohort import CohortEntry
from wsiseg.slides.reader import open_slide
from wsiseg.stages import export
from wsiseg.stages.segment import run
from wsiseg.store.ledger import find_problems
from wsiseg.store.masks import SlideMask
from wsiseg.synthetic import SyntheticTissue, write_slide

NO_TISSUE_MASK = TissueConfig(method="none")


@pytest.fixture(scope="module")
def slide(tmp_path_factory):
    path = tmp_path_factory.mktemp("slide") / "s1.tiff"
    write_slide(path, SyntheticTissue(width_px=700, height_px=500))
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return write_model(tmp_path_factory.mktemp("model") / "run")


def segment(slide, model, output, *, overlay=None, overwrite=False, progress=None, **config):
    return run(
        SegmentConfig(**config),
        entry=CohortEntry(slide_id="s1", patient_id="s1", path=slide),
        model=model,
        output=output,
        overlay=overlay,
        overwrite=overwrite,
        progress=progress,
    )


@pytest.fixture(scope="module")
def segmented(slide, model, tmp_path_factory):
    folder = tmp_path_factory.mktemp("out")
    summary = segment(slide, model, folder / "s1.mask.zarr", overlay=folder / "s1.png")
    return folder, summary


def test_the_mask_is_finished_and_whole(segmented):
    folder, summary = segmented
    mask = SlideMask.open(folder / "s1.mask.zarr")
    assert (mask.raster.width_px, mask.raster.height_px) == (700, 500)
    assert find_problems(folder / "s1.mask.zarr") == []
    assert sorted(p.name for p in folder.iterdir()) == ["s1.mask.zarr", "s1.png"]
    assert summary.slide_id == "s1"
    assert summary.mpp == 0.5


def test_the_summary_tells_what_the_mask_holds(segmented):
    folder, summary = segmented
    labels = SlideMask.open(folder / "s1.mask.zarr").read(Box(0, 0, 700, 500))
    assert summary.area_um2 == {"Gland": (labels == 1).sum() / 4}
    assert summary.windows > 20
    assert 0.8 < summary.seam_score < 1.25
    assert 0 <= summary.network_waits < 1
    assert summary.note == ""


def test_the_picture_is_one(segmented):
    folder, _ = segmented
    with Image.open(folder / "s1.png") as picture:
        assert picture.width == 700
        assert picture.height > 500


def test_a_finished_mask_is_kept_and_its_figures_told_again(segmented, slide, model):
    folder, first = segmented
    before = (folder / "s1.mask.zarr" / "ledger.json").stat().st_mtime_ns
    again = segment(slide, model, folder / "s1.mask.zarr", overlay=folder / "s1.png")
    assert (folder / "s1.mask.zarr" / "ledger.json").stat().st_mtime_ns == before
    assert again.note == "already done"
    assert again.network_waits is None
    assert (again.area_um2, again.seam_score) == (first.area_um2, first.seam_score)


def contents(folder):
    mask = SlideMask.open(folder)
    probability = mask.read_probability(mask.raster.box)
    assert probability is not None
    return mask.read(mask.raster.box).tobytes(), probability.tobytes()


@pytest.mark.parametrize("config", [
    {"chunk": 128}, {"num_workers": 1}, {"num_workers": 5}, {"batch_size": 1}, {"device": "cpu"},
    {"lanes": 1}, {"lanes": 5},
], ids=str)  # fmt: skip
def test_settings_of_speed_change_no_byte_and_are_the_same_run(
    segmented, slide, model, tmp_path, config
):
    folder, _ = segmented
    segment(slide, model, tmp_path / "m.zarr", **config)
    assert contents(tmp_path / "m.zarr") == contents(folder / "s1.mask.zarr")
    assert segment(slide, model, tmp_path / "m.zarr").note == "already done"


@pytest.mark.parametrize("config", [
    {"overlap": 0.5}, {"tta": "flips"}, {"window": 32}, {"probabilities": False},
    {"tissue": NO_TISSUE_MASK},
], ids=str)  # fmt: skip
def test_settings_of_the_result_are_another_run(segmented, slide, model, config):
    folder, _ = segmented
    with pytest.raises(OutputExistsError, match=r"other settings|another"):
        segment(slide, model, folder / "s1.mask.zarr", **config)


def test_another_model_is_another_run_until_told_to_overwrite(segmented, slide, tmp_path, model):
    other = write_model(tmp_path / "other", seed=1)
    segment(slide, model, tmp_path / "m.zarr")
    with pytest.raises(OutputExistsError, match="model"):
        segment(slide, other, tmp_path / "m.zarr")
    assert segment(slide, other, tmp_path / "m.zarr", overwrite=True).note == ""
    assert contents(tmp_path / "m.zarr") != contents(segmented[0] / "s1.mask.zarr")


@pytest.mark.parametrize("at", [1, 20, 60])
def test_an_interrupted_slide_ends_as_if_it_had_not_been(segmented, slide, model, tmp_path, at):
    class Interrupts(SilentProgress):
        count = 0

        def advance(self, amount=1, *, note=""):
            self.count += amount
            if self.count == at:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        segment(slide, model, tmp_path / "m.zarr", chunk=128, progress=Interrupts())
    assert not (tmp_path / "m.zarr").exists()
    segment(slide, model, tmp_path / "m.zarr", chunk=128)
    assert contents(tmp_path / "m.zarr") == contents(segmented[0] / "s1.mask.zarr")


def test_augmentation_gives_another_mask_of_the_same_slide(segmented, slide, model, tmp_path):
    plain = SlideMask.open(segmented[0] / "s1.mask.zarr")
    segment(slide, model, tmp_path / "m.zarr", tta="flips")
    box = plain.raster.box
    turned = SlideMask.open(tmp_path / "m.zarr").read(box)
    assert ((turned == 255) == (plain.read(box) == 255)).all()
    assert contents(tmp_path / "m.zarr") != contents(segmented[0] / "s1.mask.zarr")


def test_a_window_that_the_network_cannot_take_is_a_wrong_setting(slide, model, tmp_path):
    with pytest.raises(ConfigError, match="window: 33 px is no multiple of 2"):
        segment(slide, model, tmp_path / "m.zarr", window=33)


def test_tissue_too_thin_for_any_window_is_said(slide, model, tmp_path):
    with pytest.raises(NoTissueError, match="no window has more than 100% tissue"):
        segment(slide, model, tmp_path / "m.zarr", min_tissue=1.0)


@pytest.mark.parametrize("downsample", [1, 2, 2.5])
def test_polygons_lie_on_the_objects_of_the_slide(tmp_path, downsample):
    """Through the engine, the mask and the export, back to level-0 pixels."""
    image = np.empty((500, 640, 3), np.uint8)
    image[:] = STAINED
    objects = [Box(100, 80, 60, 40), Box(560, 420, 40, 60), Box(0, 0, 20, 20)]
    for box in objects:
        image[box.y : box.bottom, box.x : box.right] = DARK
    image[250:300, 300:350] = GLASS
    with open_slide(write_image(tmp_path / "s.png", image), slide_mpp=0.5) as slide:
        windows = windows_of(slide, 0.5 * downsample)
        write_mask(tmp_path / "m.zarr", slide, ByColour(), windows)
    export.run(ExportConfig(), mask=tmp_path / "m.zarr", output=tmp_path / "m.geojson")
    features = json.loads((tmp_path / "m.geojson").read_text())["features"]
    found = {
        shapely.geometry.shape(f["geometry"]).bounds
        for f in features
        if f["properties"]["classification"]["name"] == "Dark"
    }
    assert found == {(b.x, b.y, b.right, b.bottom) for b in objects}


# The command line, in this process.


def invoke(*arguments):
    result = CliRunner().invoke(cli, [str(a) for a in arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result


def test_one_slide_leaves_its_outputs_in_the_current_folder(slide, model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    result = invoke("segment", slide, "--model", model, "--json")
    assert result.exit_code == 0, result.output
    assert sorted(p.name for p in tmp_path.iterdir()) == ["s1.geojson", "s1.mask.zarr", "s1.png"]
    (row,) = json.loads(result.stdout)["results"]
    assert row["status"] == "ok"
    assert row["features"] > 0
    assert row["area_mm2"]["Gland"] > 0
    assert row["seam_score"] is not None
    assert 0 <= row["network_waits"] < 1


def test_a_named_geojson_has_its_mask_and_picture_beside_it(slide, model, tmp_path):
    result = invoke("segment", slide, "--model", model, "-o", tmp_path / "deep" / "x.geojson.gz")
    assert result.exit_code == 0, result.output
    names = sorted(p.name for p in (tmp_path / "deep").iterdir())
    assert names == ["x.geojson.gz", "x.mask.zarr", "x.png"]


EXTRAS = ("s1.classes.csv", "s1.db", "s1.objects.csv", "s1.ome.tiff")


def test_one_command_writes_what_export_would_write_from_its_mask(slide, model, tmp_path):
    """With the settings of both stages, from flags and from their sections of a file."""
    (tmp_path / "c.yaml").write_text("{segment: {window: 32}, export: {min_hole_um2: 3}}")
    extras = ("--csv", "--ome-tiff", "--annotation-store")
    options = ("--config", tmp_path / "c.yaml", "--simplify-um", 0.7, "--unlocked")
    once = tmp_path / "once"
    arguments = ("segment", slide, "--model", model, "-o", once)
    assert invoke(*arguments, *options, *extras).exit_code == 0
    assert {p.name for p in once.iterdir()} == {*EXTRAS, "s1.geojson", "s1.mask.zarr", "s1.png"}
    assert SlideMask.open(once / "s1.mask.zarr").run["config"]["window"] == 32

    twice = tmp_path / "twice"
    invoke("export", once / "s1.mask.zarr", "-o", twice, *options, *extras)
    for name in {*EXTRAS, "s1.geojson"} - {"s1.db"}:  # SQLite leaves what it likes between rows
        assert (once / name).read_bytes() == (twice / name).read_bytes(), name
    used = json.loads((once / "s1.geojson").read_text())["wsiseg"]["run"]["config"]
    assert (used["min_hole_um2"], used["simplify_um"], used["locked"]) == (3, 0.7, False)


def test_a_finished_slide_gets_an_output_that_is_missing_without_the_network(
    slide, model, tmp_path
):
    arguments = ("segment", slide, "--model", model, "-o", tmp_path)
    invoke(*arguments)
    geojson = (tmp_path / "s1.geojson").read_bytes()
    result = invoke(*arguments, "--csv", "--ome-tiff", "--annotation-store", "--json")
    (row,) = json.loads(result.stdout)["results"]
    assert row["note"] == "already done"
    assert all((tmp_path / name).stat().st_size for name in EXTRAS)
    assert (tmp_path / "s1.geojson").read_bytes() == geojson


def test_a_picture_that_is_the_slide_is_not_painted_over(slide, model, tmp_path, monkeypatch):
    """With no -o the outputs lie in the current folder, where the slide may lie too."""
    monkeypatch.chdir(tmp_path)
    with open_slide(slide, slide_id="s1") as whole:
        raster = whole.meta.raster(0.5)
        pixels = whole.read(raster, raster.box)
    Image.fromarray(pixels).save("s1.png")
    before = Path("s1.png").read_bytes()
    for _ in range(2):
        result = invoke("segment", "s1.png", "--slide-mpp", 0.5, "--model", model, "--json")
        assert json.loads(result.stdout)["results"][0]["status"] == "ok"
        names = sorted(p.name for p in tmp_path.iterdir())
        assert names == ["s1.geojson", "s1.mask.zarr", "s1.overlay.png", "s1.png"]
        assert Path("s1.png").read_bytes() == before


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("s1.geojson", "s1.geojson' exists and was not written by wsiseg; choose another"),
        ("s1.png", "s1.png' exists without the 's1.mask.zarr' that it would belong to; choose"),
        ("s1.ome.tiff", "s1.ome.tiff' exists without the 's1.geojson' that it would belong to"),
    ],
)
def test_a_file_that_is_not_ours_is_kept_until_told_to_overwrite(
    slide, model, tmp_path, name, words
):
    (tmp_path / name).write_text('{"type": "FeatureCollection", "features": []}')
    before = (tmp_path / name).read_bytes()
    arguments = ("segment", slide, "--model", model, "-o", tmp_path, "--ome-tiff")
    (row,) = json.loads(invoke(*arguments, "--json").stdout)["results"]
    assert row["status"] == "failed"
    assert words in row["error"]
    assert (tmp_path / name).read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == [name]
    (row,) = json.loads(invoke(*arguments, "--overwrite", "--json").stdout)["results"]
    assert row["status"] == "ok"
    assert (tmp_path / name).read_bytes() != before


@pytest.mark.parametrize("command", ["tile", "segment"])
def test_a_slide_is_never_what_is_written(slide, model, tmp_path, command):
    """Not even with --overwrite: a slide in a zarr store has the name that its tiles would have."""
    source = tmp_path / "s1.mask.zarr" if command == "segment" else tmp_path / "s1.zarr"
    source.mkdir()
    (source / "s1.tif").write_bytes(slide.read_bytes())
    options = ("--model", model) if command == "segment" else ()
    arguments = (command, source / "s1.tif", "-o", tmp_path, "--overwrite", *options)
    (row,) = json.loads(invoke(*arguments, "--json").stdout)["results"]
    assert row["status"] == "failed"
    assert f"{source.name}' is what is read here; choose another output with -o" in row["error"]
    assert (source / "s1.tif").read_bytes() == slide.read_bytes()


def test_without_a_model_the_packaged_one_is_used(slide, model, tmp_path, monkeypatch):
    monkeypatch.setattr(packaged, "packaged_model", lambda: model)
    result = invoke("segment", slide, "-o", tmp_path)
    assert result.exit_code == 0, result.output
    assert SlideMask.open(tmp_path / "s1.mask.zarr").classes.names == ("Background", "Gland")


def test_an_installation_without_its_model_says_so(tmp_path):
    with pytest.raises(CheckpointError, match="the packaged model 'nuclei' is missing") as caught:
        packaged.packaged_model(folder=tmp_path)
    assert "give --model RUN" in str(caught.value)


def test_a_packaged_model_is_found_by_its_name(tmp_path):
    write_model(tmp_path / "nuclei")
    assert packaged.packaged_model(folder=tmp_path) == tmp_path / "nuclei"


def test_nothing_keeps_a_packaged_model_out_of_the_wheel():
    """The wheel holds all of the package's folder but what git ignores."""
    weights = packaged.FOLDER / packaged.DEFAULT_MODEL / "weights.safetensors"
    done = subprocess.run(
        ["git", "check-ignore", str(weights)], cwd=packaged.FOLDER, capture_output=True, check=False
    )
    assert done.returncode != 0, done.stdout
    project = tomllib.loads((packaged.FOLDER.parents[1] / "pyproject.toml").read_text())
    assert project["tool"]["hatch"]["build"]["targets"]["wheel"] == {"packages": ["wsiseg"]}


def has_packaged_model():
    return (packaged.FOLDER / packaged.DEFAULT_MODEL / "model.json").is_file()


@pytest.mark.slow
@pytest.mark.skipif(not has_packaged_model(), reason="this checkout holds no packaged model")
def test_the_packaged_model_finds_nuclei_on_the_real_slide(real_slide, tmp_path):
    result = invoke("segment", real_slide, "-o", tmp_path, "--json")
    assert result.exit_code == 0, result.output
    (row,) = json.loads(result.stdout)["results"]
    assert row["features"] > 500
    slide_mm2 = 2220 * 2967 * 0.499**2 / 1e6
    assert 0.03 < sum(row["area_mm2"].values()) / slide_mm2 < 0.5
    assert 0.85 < row["seam_score"] < 1.15


@pytest.mark.skipif(not has_packaged_model(), reason="this checkout holds no packaged model")
def test_the_packaged_model_is_small():
    files = (packaged.FOLDER / packaged.DEFAULT_MODEL).iterdir()
    assert sum(file.stat().st_size for file in files) <= 10_500_000
