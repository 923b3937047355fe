"""The workflow: what it would run on both profiles, and a whole run on a tiny cohort."""

import csv
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

ROOT = Path(__file__).resolve().parents[2]
SNAKEFILE = ROOT / "pipelines" / "Snakefile"
PROFILES = ("local", "slurm")
COLUMNS = ("slide_id", "patient_id", "path", "mpp", "annotation", "split")
CROP_PX = 256

TWO_JOBS = ("--cores", 2, "--set-threads", "tile=1", "segment=1", "--resources", "gpu=2")
"""Two small jobs at a time: most of each is the start of Python."""

SETTINGS = """\
tile:
  tile_size: 64
  min_tissue: 0.0
  tissue: {method: none}
pretrain:
  sample_steps: 2
  model: {dim: 8, mults: [1, 2], blocks: 1, groups: 4, attention: none}
  optim: {steps: 2, batch_size: 2, validate_every: 2, save_every: 2}
finetune:
  optim: {steps: 2, batch_size: 2, validate_every: 2, save_every: 2}
segment:
  batch_size: 4
evaluate:
  bootstrap: 10
"""


def snakemake(*arguments, cwd, profile="local", timeout=280):
    """Run the workflow in a child process, in a folder of its own."""
    command = [
        str(Path(sys.executable).with_name("snakemake")),
        "--snakefile", SNAKEFILE, "--profile", SNAKEFILE.with_name("profiles") / profile,
        "--nocolor", *arguments,
    ]  # fmt: skip
    return subprocess.run(
        list(map(str, command)),
        cwd=cwd,
        capture_output=True,
        text=True,
        timeout=timeout,
        check=False,
        # Snakemake keeps a cache of sources; the test leaves none behind in the user's home.
        env={**os.environ, "XDG_CACHE_HOME": str(cwd / "cache"), "OMP_NUM_THREADS": "2"},
    )


def write_cohort(path, rows):
    with path.open("w", newline="") as file:
        csv.writer(file).writerows([COLUMNS, *rows])
    return path


@pytest.fixture(scope="module")
def cohort(tmp_path_factory, real_slide):
    """Four PNG crops of the real slide with masks, one of them broken, and one that is missing."""
    folder = tmp_path_factory.mktemp("cohort")
    with Image.open(real_slide) as image:
        slide = np.asarray(image.convert("RGB"))
    rows = []
    for i, split in enumerate(("train", "val", "test")):
        x = 700 + 300 * i
        crop = slide[2100 : 2100 + CROP_PX, x : x + CROP_PX]
        Image.fromarray(crop).save(folder / f"crop-{i}.png")
        # A label that can be seen in the pixels: where there is more red than blue.
        mask = (crop[..., 0].astype(int) - crop[..., 2] > 30).astype(np.uint8) * 255
        Image.fromarray(mask).save(folder / f"mask-{i}.png")
        rows.append((f"crop-{i}", f"P{i}", f"crop-{i}.png", 0.5, f"mask-{i}.png", split))
    whole = (folder / "crop-0.png").read_bytes()
    (folder / "broken.png").write_bytes(whole[: len(whole) // 2])
    rows.append(("broken", "P4", "broken.png", 0.5, "", "train"))
    rows.append(("missing", "P5", "missing.png", 0.5, "", "train"))
    (folder / "settings.yaml").write_text(SETTINGS)
    write_cohort(folder / "good.csv", rows[:3])
    write_cohort(folder / "all.csv", rows)
    return folder


def config(cohort, name, *more):
    return ("--config", f"cohort={cohort / name}", f"config={cohort / 'settings.yaml'}",
            "output=run", *more)  # fmt: skip


def planned(output):
    """Return rule -> number of jobs of Snakemake's table."""
    table = output.split("Job stats:")[1].split("\n\n")[0].splitlines()
    return {line.split()[0]: int(line.split()[1]) for line in table if line[-1:].isdigit()}


@pytest.mark.parametrize("profile", PROFILES)
def test_a_dry_run_plans_one_job_per_slide_and_one_network(cohort, tmp_path, profile):
    done = snakemake("-n", *config(cohort, "all.csv"), cwd=tmp_path, profile=profile)
    assert done.returncode == 0, done.stdout + done.stderr
    jobs = planned(done.stdout + done.stderr)
    stages = {"tile": 5, "pretrain": 1, "finetune": 1, "segment": 5, "evaluate": 1}
    assert {name: jobs[name] for name in stages} == stages
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize(("asked", "num"), [("test", 1), ("test,crop-0", 2)])
def test_only_the_slides_that_are_asked_for_are_segmented(cohort, tmp_path, asked, num):
    done = snakemake("-n", *config(cohort, "all.csv", f"segment={asked}"), cwd=tmp_path)
    assert planned(done.stdout + done.stderr)["segment"] == num


def test_a_cohort_without_annotations_ends_with_the_backbone(cohort, tmp_path):
    rows = [("a", "P1", cohort / "crop-0.png", 0.5, "", "train")]
    write_cohort(cohort / "bare.csv", rows)
    done = snakemake("-n", *config(cohort, "bare.csv"), cwd=tmp_path)
    jobs = planned(done.stdout + done.stderr)
    assert jobs["pretrain"] == 1
    assert not {"finetune", "segment"} & set(jobs)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--config", "cohrt=x.csv"), "did you mean 'cohort'?"),
        (("--config", "cohort=none.csv"), "none.csv"),
        (("--config", "cohort={cohort}/good.csv", "config=no.yaml"), "no such file"),
        (("--config", "cohort={cohort}/drawn.csv"), "classes=FILE"),
        (("--config", "cohort={cohort}/good.csv", "segment=crop-9"), "'crop-9' is neither"),
    ],
    ids=["typo", "missing cohort", "missing config", "no class table", "no such slide"],
)
def test_a_wrong_setting_is_one_clear_error(cohort, tmp_path, arguments, message):
    write_cohort(cohort / "drawn.csv", [("a", "P1", "crop-0.png", 0.5, "a.geojson", "train")])
    done = snakemake("-n", *(a.format(cohort=cohort) for a in arguments), cwd=tmp_path)
    assert done.returncode == 1
    assert message in done.stdout + done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize("profile", PROFILES)
def test_profiles_keep_going_and_rerun_what_was_interrupted(profile):
    text = (SNAKEFILE.parent / "profiles" / profile / "config.yaml").read_text()
    assert "keep-going: true" in text
    assert "rerun-incomplete: true" in text


@pytest.fixture(scope="module")
def ran(cohort, tmp_path_factory):
    """The workflow run once on the cohort with the broken slides."""
    folder = tmp_path_factory.mktemp("workflow")
    done = snakemake(*TWO_JOBS, *config(cohort, "all.csv"), cwd=folder)
    return folder, done


@pytest.mark.slow
def test_bad_slides_end_the_run_with_their_names(ran):
    _, done = ran
    assert done.returncode == 1
    for name in ("broken", "missing"):
        assert f"slide '{name}'" in done.stdout + done.stderr


@pytest.mark.slow
def test_the_other_slides_get_their_masks_all_the_same(ran):
    folder, done = ran
    out = folder / "run"
    for name in ("pretrain/model.json", "finetune/model.json", "evaluate.json"):
        assert (out / name).is_file(), done.stdout + done.stderr
    assert list(json.loads((out / "evaluate.json").read_text())["images"]) == ["crop-2"]
    for i in range(3):
        assert (out / "segment" / f"crop-{i}.mask.zarr").is_dir()
        collection = json.loads((out / "segment" / f"crop-{i}.geojson").read_text())
        assert collection["type"] == "FeatureCollection"


@pytest.mark.slow
def test_the_test_split_is_not_trained_on(ran):
    folder, _ = ran
    for name in ("pretrain", "finetune"):
        stores = (folder / "run" / "cohort" / f"{name}.txt").read_text().split()
        assert [Path(s).name for s in stores] == ["crop-0.zarr", "crop-1.zarr"]


@pytest.mark.slow
def test_a_repaired_cohort_keeps_the_networks_that_are_done(ran, cohort):
    folder, _ = ran
    again = shutil.copytree(folder, folder.with_name("again"))
    weights = [again / "run" / name / "weights.safetensors" for name in ("pretrain", "finetune")]
    before = [(path.stat().st_mtime_ns, path.stat().st_ino) for path in weights]
    target = "run/finetune.json"
    done = snakemake(*TWO_JOBS, *config(cohort, "good.csv"), "--", target, cwd=again)
    assert done.returncode == 0, done.stdout + done.stderr
    assert [(path.stat().st_mtime_ns, path.stat().st_ino) for path in weights] == before
    assert "already done" in (again / target).read_text()
