"""The study of what pretraining buys: its subsets, its figures, and the whole of it in small."""

import csv
import importlib.util
import itertools
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

PIPELINES = Path(__file__).resolve().parents[2] / "pipelines"


def load(name):
    spec = importlib.util.spec_from_file_location(name, PIPELINES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # where dataclasses look their module up
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def report():
    return load("label_efficiency_report")


@pytest.fixture(scope="module")
def study(report):  # which the script imports
    return load("label_efficiency")


def write_data(folder, splits):
    rng = np.random.default_rng(0)
    for kind in ("images", "masks"):
        (folder / kind).mkdir(parents=True)
    rows = []
    for case, split in splits:
        for number in range(2):
            name = f"{case}-{number}"
            mask = np.zeros((224, 224), bool)
            mask[40:150, 30 + 40 * number : 150] = True
            image = np.where(mask[..., None], (150, 60, 140), (230, 190, 210))
            image = np.clip(image + rng.normal(0, 8, image.shape), 0, 255).astype(np.uint8)
            Image.fromarray(image).save(folder / "images" / f"{name}.png")
            Image.fromarray(mask).save(folder / "masks" / f"{name}.png")
            rows.append({"name": name, "case_id": case, "split": split})
    with (folder / "index.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["name", "case_id", "split"])
        writer.writeheader()
        writer.writerows(rows)
    return folder


def test_more_labels_only_ever_add_cases(study):
    images = [study.Image(f"{c}-{i}", f"case{c}", "train") for c in range(21) for i in range(3)]
    for seed in range(5):
        chosen = [study.chosen_cases(images, percent, seed) for percent in study.FRACTIONS]
        assert [len(cases) for cases in chosen] == [1, 2, 5, 10, 21]
        assert all(few <= more for few, more in itertools.pairwise(chosen))
    assert study.chosen_cases(images, 25, 0) != study.chosen_cases(images, 25, 1)


def test_a_case_in_two_splits_is_refused(study, tmp_path):
    write_data(tmp_path, [("a", "train"), ("b", "test")])
    index = tmp_path / "index.csv"
    index.write_text(index.read_text().replace("a-1,a,train", "a-1,a,test"))
    with pytest.raises(SystemExit, match="case a is in the splits test, train"):
        study.read_index(tmp_path)


def test_a_folder_without_index_is_named(study, tmp_path):
    with pytest.raises(SystemExit, match=r"index\.csv': no such file"):
        study.read_index(tmp_path)


def test_dice_is_pooled_and_a_gain_compares_the_same_cases(study, report, tmp_path):
    perfect = [[50, 0], [0, 50]]
    half = [[50, 0], [25, 25]]  # half of the gland is missed: Dice 2/3
    runs = []
    for arm, confusion, distance in (("scratch", half, 8.0), ("noise", perfect, None)):
        run = study.Run(arm=arm, percent=10, seed=0)
        test = {
            f"i{n}": {"case": f"c{n // 2}", "confusion": confusion, "hd95_px": distance}
            for n in range(6)
        }
        path = tmp_path / "results" / f"{run.name}.json"
        path.parent.mkdir(exist_ok=True)
        path.write_text(json.dumps({"cases": 1, "images": 2, "test": test}))
        runs.append(run)
    report.write_report(tmp_path, runs)
    found = json.loads((tmp_path / "results.json").read_text())
    rows = {row["arm"]: row for row in found["rows"]}
    assert rows["scratch"]["dice"] == pytest.approx(2 / 3)
    assert rows["scratch"]["iou"] == pytest.approx(1 / 2)
    assert rows["scratch"]["hd95_px"] == pytest.approx(8.0)
    assert rows["noise"]["dice"] == 1.0
    assert rows["noise"]["dice_gain_interval"] == pytest.approx([1 / 3, 1 / 3])
    assert rows["noise"]["hd95_px"] is None
    assert found["trivial"]["dice"] == pytest.approx(2 / 3)
    assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_one_command_runs_the_study_and_a_second_one_changes_nothing(tmp_path):
    splits = [("a", "train"), ("b", "train"), ("c", "train"), ("d", "val"), ("e", "test")]
    data = write_data(tmp_path / "data", splits)
    command = [
        sys.executable, PIPELINES / "label_efficiency.py", data, "-o", tmp_path / "out",
        "--preset", "smoke", "--seeds", "1", "--percent", "40", "100", "--arms", "noise",
        "--jobs", "1",
    ]  # fmt: skip
    table = tmp_path / "out" / "table.md"
    texts = []
    for _ in range(2):
        done = subprocess.run(
            list(map(str, command)), capture_output=True, text=True, timeout=280, check=False
        )
        assert done.returncode == 0, done.stderr
        texts.append(table.read_text())
    assert texts[0] == texts[1]
    other = [*map(str, command), "--finetune-steps", "5"]
    done = subprocess.run(other, capture_output=True, text=True, timeout=280, check=False)
    assert done.returncode == 1
    assert "holds a study of other settings (finetune_steps: 4 -> 5)" in done.stderr
    lines = texts[0].splitlines()
    assert sum("random weights" in line and "%" in line for line in lines[2:]) == 2
    assert sum("noise diffusion" in line for line in lines) == 2
    assert "40 % (1 cases, 2 images)" in texts[0]
    assert lines[-1].startswith("| none | all is gland |")
