"""U6: whatever outputs and classes are called, whatever links lie there, the rest stays as is."""

import functools
import os
import re
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from reliability.test_paths import snapshot
from segmenting import write_model
from stores_on_disk import run_info, write_mask

from wsiseg.classes import ClassTable
from wsiseg.errors import ConfigError, OutputExistsError
from wsiseg.settings.export import ExportConfig
from wsiseg.training.runs import open_run

HOSTILE_CLASSES = (
    "../../escaped", "/tmp/escaped", "..", "..\\..\\escaped", "%2e%2e%2fescaped", "~/escaped",
    "$HOME", "CON", "*", "-o", "\u202eext", "x" * 200, "{0}", "a;touch escaped",
)  # fmt: skip

SLIDE = ("--slide-mpp", 0.5, "--tissue", "none", "--json")


@pytest.fixture
def place(tmp_path):
    """Return a folder with a slide, its labels, a class table and a model, beside a victim."""
    rng = np.random.default_rng(0)
    work = tmp_path / "work"
    (work / "labels").mkdir(parents=True)
    image = rng.integers(100, 250, (96, 96, 3), dtype=np.uint8)
    Image.fromarray(image).save(work / "s.png")
    labels = rng.integers(0, len(HOSTILE_CLASSES) + 1, (96, 96), dtype=np.uint8)
    Image.fromarray(labels).save(work / "labels" / "s.png")
    names = "".join(f"  - {{name: '{name}'}}\n" for name in HOSTILE_CLASSES)
    (work / "classes.yaml").write_text("classes:\n" + names)
    write_model(work / "model", names=HOSTILE_CLASSES, tile_size_px=32)
    (tmp_path / "victim").mkdir()
    (tmp_path / "victim" / "mine").write_text("mine")
    return work


def commands(output):
    labelled = ("--labels", "labels", "--classes", "classes.yaml", "--tile-size", 32)
    beside = ("--csv", "--ome-tiff", "--annotation-store")
    return {
        "tile": ("tile", "s.png", "-o", output, *labelled, *SLIDE),
        "segment": ("segment", "s.png", "-o", output, "--model", "model", "--device", "cpu",
                    *beside, *SLIDE),
    }  # fmt: skip


def outside(root, output):
    """Return the snapshot of a folder without an output, its lock and what is inside."""
    output = os.path.normpath(output)
    return {p: c for p, c in snapshot(root).items() if p != output and output + "/" not in p}


@pytest.mark.parametrize("name", ["tile", "segment"])
def test_a_hostile_class_names_no_file(wsiseg_here, tmp_path, place, name):
    before = snapshot(tmp_path)
    done = wsiseg_here(*commands("out")[name], cwd=place)
    assert done.returncode == 0, done.stderr
    assert outside(tmp_path, str(place / "out")) == before
    made = {p.name for p in (place / "out").iterdir()}
    assert {n.split(".")[0] for n in made} == {"s"}


@pytest.mark.parametrize("name", ["a\0b", "", " ", "a\nb", "\x7f", "x" * 201, "a:b"])
def test_a_class_that_no_file_could_hold_is_no_class(name):
    with pytest.raises(ConfigError, match="a name needs 1 to 200 characters without ':'"):
        ClassTable.of_names([name])


@pytest.mark.parametrize("name", ["tile", "segment"])
@pytest.mark.parametrize(
    "output", ["../elsewhere", "labels/../../elsewhere", "{root}/elsewhere", "./-o", "a b/\u202ec"]
)
def test_an_output_is_where_it_was_asked_for_and_nowhere_else(
    wsiseg_here, tmp_path, place, name, output
):
    output = output.format(root=tmp_path)
    before = snapshot(tmp_path)
    done = wsiseg_here(*commands(output)[name], cwd=place)
    assert done.returncode == 0, done.stderr
    asked_for = os.path.normpath(place / output)
    assert [*Path(asked_for).glob("s*")]
    made = {p for p in snapshot(tmp_path) if p not in before}
    assert {p for p in made if not (asked_for + "/").startswith(p + "/")} == {
        p for p in made if p.startswith(asked_for + "/")
    }
    assert {p: c for p, c in snapshot(tmp_path).items() if p in before} == before


@pytest.mark.parametrize("name", ["tile", "segment"])
@pytest.mark.parametrize(
    "output",
    ["x" * 256, "y/" + "x" * 300, "/".join(["z" * 200] * 25), "s.png", "s.png/inside"],
    ids=["256", "inner", "5000", "file", "below-a-file"],
)
def test_an_output_that_cannot_be_is_one_error_and_makes_nothing(
    wsiseg_here, tmp_path, place, name, output
):
    """No NUL among them, which no command line can hold."""
    before = snapshot(tmp_path)
    done = wsiseg_here(*commands(output)[name], cwd=place)
    assert done.returncode in (1, 2), done.stderr
    assert "Traceback" not in done.stderr
    errors = [line for line in done.stderr.splitlines() if line.lower().startswith("error: ")]
    assert len(errors) == 1, done.stderr
    assert re.search("with a shorter name|a file stands where", errors[0]), done.stderr
    after = snapshot(tmp_path)
    assert {p: c for p, c in after.items() if p in before} == before
    assert all(Path(p).is_dir() for p in after if p not in before)


@pytest.mark.parametrize("name", ["tile", "segment"])
def test_an_output_folder_that_is_a_link_is_used_and_what_lies_there_is_kept(
    wsiseg_here, tmp_path, place, name
):
    """Such as a link to a scratch disk, which somebody set on purpose."""
    (place / "out").symlink_to(tmp_path / "victim")
    before = snapshot(tmp_path)
    done = wsiseg_here(*commands("out")[name], "--overwrite", cwd=place)
    assert done.returncode == 0, done.stderr
    after = snapshot(tmp_path)
    assert {p: c for p, c in after.items() if p in before} == before
    made = {Path(p).relative_to(tmp_path).parts for p in after if p not in before}
    assert {parts[0] for parts in made} == {"victim"}
    assert {parts[1].split(".")[0] for parts in made} == {"s"}


OUTPUTS = (".mask.zarr", ".geojson", ".png", ".ome.tiff", ".objects.csv", ".classes.csv", ".db")


@pytest.mark.parametrize("suffix", ["", ".partial", ".lock"])
@pytest.mark.parametrize("overwrite", [True, False], ids=["overwrite", "resume"])
def test_a_link_in_the_place_of_any_output_of_segment_is_not_followed(
    wsiseg_here, tmp_path, place, suffix, overwrite
):
    victim = tmp_path / "victim"
    write_mask(victim / "other.zarr")
    before = snapshot(victim)
    links = [place / "out" / f"s{output}{suffix}" for output in OUTPUTS]
    (place / "out").mkdir()
    for link in links:
        is_store = ".zarr" in link.name and suffix != ".lock"
        link.symlink_to(victim / ("other.zarr" if is_store else "mine"))
    done = wsiseg_here(*commands("out")["segment"], *["--overwrite"] * overwrite, cwd=place)
    assert "Traceback" not in done.stderr
    assert snapshot(victim) == before
    if overwrite and suffix != ".lock":
        assert done.returncode == 0, done.stderr
        assert not any(link.is_symlink() for link in links)


def test_a_link_in_the_place_of_a_run_is_replaced_or_refused(tmp_path):
    victim = tmp_path / "victim"
    victim.mkdir()
    (victim / "mine").write_text("mine")
    (tmp_path / "run").symlink_to(victim)
    begin = functools.partial(
        open_run, tmp_path / "run", run_info(), ExportConfig(), section="pretrain", overwrite=True
    )
    with pytest.raises(OutputExistsError, match="exists and is not a run of wsiseg"), begin():
        pass
    (victim / "run.json").write_text("{}")
    before = snapshot(victim)
    with begin():
        pass
    assert snapshot(victim) == before
    assert not (tmp_path / "run").is_symlink()
