"""Something changed between a run and its resume: refused with the difference shown (R14)."""

import json
import shutil

import pytest
from PIL import Image
from reliability.bench import commands, snapshot

from wsiseg.config import digest
from wsiseg.outputs import write_json


def other_picture(path):
    image = Image.open(path).convert("RGB")
    path.unlink()
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).save(path)


def other_labels(folder):
    path = folder / "labels" / "small.png"
    labels = Image.open(path).point(lambda v: 1 - v)
    (folder / "labels").unlink()  # a link
    (folder / "labels").mkdir()
    labels.save(folder / "labels" / "small.png")


def other_model(folder):
    model = json.loads((folder / "run" / "model.json").read_text())
    model["metrics"]["dice"] = 0.123
    whole = (folder / "run").resolve()
    (folder / "run").unlink()
    shutil.copytree(whole, folder / "run")
    del model["digest"]
    write_json(folder / "run" / "model.json", model | {"digest": digest(model)})


def other_classes(folder):
    (folder / "classes.yaml").unlink()
    (folder / "classes.yaml").write_text("classes:\n  - {name: B, color: [200, 0, 0]}\n")


CASES = {
    "tile-size": ("tile", None, ("--tile-size", 32), "tile_size: 64 -> 32"),
    "mpp": ("tile", None, ("--mpp", 1.0), "mpp: 0.5 -> 1.0"),
    "slide-mpp": ("tile", None, ("--slide-mpp", 0.25), "slide_mpp: 0.5 -> 0.25"),
    "slide": ("tile", lambda f: other_picture(f / "small.png"), (), "inputs.slide: "),
    "labels": ("tile", other_labels, (), "inputs.labels: "),
    "classes": ("tile", other_classes, (), "inputs.classes: "),
    "segment overlap": ("segment", None, ("--window-overlap", 0.5), "overlap: 0.25 -> 0.5"),
    "segmented slide": ("segment", lambda f: other_picture(f / "small.png"), (), "inputs.slide: "),
    "model": ("segment", other_model, (), "inputs.model: "),
    "seed": ("pretrain", None, ("--seed", 7), "seed: 0 -> 7"),
    "steps": ("finetune", None, ("--steps", 15), "optim.steps: 12 -> 15"),
    "simplify": ("export", None, ("--simplify-um", 1.0), "simplify_um: 0.0 -> 1.0"),
}


@pytest.mark.slow
@pytest.mark.parametrize("is_finished", [True, False], ids=["finished", "unfinished"])
@pytest.mark.parametrize("case", CASES)
def test_a_changed_input_is_refused_and_overwrite_replaces(bench, scorecard, case, is_finished):
    name, change, extra, difference = CASES[case]
    command = commands("large" if name in ("pretrain", "finetune") else "small")[name]
    folder = bench.folder(command)
    if is_finished:
        bench.copy_results(command, folder)
    elif name == "export":
        pytest.skip("a GeoJSON is written in one go")
    else:
        interrupt_in_the_middle(bench, command, folder)
    if change is not None:
        change(folder)
    before = {k: v for output in command.writes for k, v in snapshot(folder, output).items()}
    refused = bench.run(command, folder, *extra)
    assert refused.returncode == 1, refused.stderr
    assert "holds results of a different run" in refused.stderr
    assert difference in refused.stderr
    assert "pass --overwrite" in refused.stderr
    after = {k: v for output in command.writes for k, v in snapshot(folder, output).items()}
    assert after == before
    replaced = bench.run(command, folder, *extra, "--overwrite")
    assert replaced.returncode == 0, replaced.stderr
    fresh = bench.folder(command)
    if change is not None:
        change(fresh)
    assert bench.run(command, fresh, *extra).returncode == 0
    for output in command.writes:
        assert snapshot(folder, output) == snapshot(fresh, output)
    scorecard.add("silent corruptions", 0)


def interrupt_in_the_middle(bench, command, folder):
    """Kill the command at a call that leaves an unfinished output."""
    total = len(bench.calls(command))
    done = bench.run(command, folder, fault=("kill", total // 2))
    assert done.signal == "SIGKILL"
    assert not all((folder / output).exists() for output in command.writes) or command.args[0] in (
        "pretrain",
        "finetune",
    )


def within(top, files):
    """Return the files of an output; resume points are dropped after the last of them."""
    return {k: v for k, v in files.items() if k.startswith(top) and "/resume/" not in k}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tile", "segment", "pretrain"])
def test_a_kill_while_overwriting_leaves_the_old_or_the_new_or_clearly_nothing(
    bench, scorecard, figure, name
):
    command = commands("large" if name == "pretrain" else "small")[name]
    extra = {
        "tile": ("--mpp", 0.6),
        "segment": ("--window-overlap", 0.5),
        "pretrain": ("--seed", 3),
    }
    old = {k: v for output in command.writes for k, v in snapshot(bench.whole, output).items()}
    fresh = bench.folder(command)
    assert bench.run(command, fresh, *extra[name]).returncode == 0
    new = {k: v for output in command.writes for k, v in snapshot(fresh, output).items()}
    marks = {"tile": "tiles/small.zarr/zarr.json", "segment": "out/small.mask.zarr/zarr.json",
             "pretrain": "pre/model.json"}  # fmt: skip
    top = marks[name].rsplit("/", 1)[0] + "/"
    total = len(bench.calls(command, *extra[name])) + 20
    step = 1 if figure(pr=0, night=1) else (12 if name == "pretrain" else 7)

    def overwrite(n):
        folder = bench.folder(command)
        bench.copy_results(command, folder)
        done = bench.run(command, folder, *extra[name], "--overwrite", fault=("kill", n))
        found = {k: v for output in command.writes for k, v in snapshot(folder, output).items()}
        if (folder / marks[name]).exists():  # under its final name is one or the other
            inside = within(top, found)
            assert inside in (within(top, old), within(top, new)), n
        again = bench.run(command, folder, *extra[name], "--overwrite")
        assert again.returncode == 0, again.stderr
        for output in command.writes:
            assert snapshot(folder, output) == snapshot(fresh, output), n
        shutil.rmtree(folder)
        return done.signal is not None

    kills = sum(bench.each(overwrite, range(1, total, step)))
    assert kills > 3
    scorecard.add("kills survived", kills)
    scorecard.add("silent corruptions", 0)
