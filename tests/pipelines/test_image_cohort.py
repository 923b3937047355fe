"""The cohort of an image folder: blocks of neighbours stay in one split."""

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from wsiseg.slides.cohort import Cohort

SCRIPT = Path(__file__).resolve().parents[2] / "pipelines" / "image_cohort.py"


def run(data, output, *arguments):
    command = [sys.executable, SCRIPT, data, "--mpp", "0.25", "-o", output, *arguments]
    return subprocess.run(
        list(map(str, command)), capture_output=True, text=True, timeout=60, check=False
    )


@pytest.fixture
def data(tmp_path):
    for kind in ("images", "masks"):
        (tmp_path / kind).mkdir()
        for i in range(12):
            Image.fromarray(np.zeros((8, 8), np.uint8)).save(tmp_path / kind / f"{i:03d}.png")
    return tmp_path


def test_no_block_is_in_two_splits(data, tmp_path):
    output = tmp_path / "runs" / "cohort.csv"
    assert run(data, output, "--block", 2).returncode == 0
    with output.open(newline="") as file:
        rows = list(csv.DictReader(file))
    splits: dict[str, set[str]] = {}
    for row in rows:
        splits.setdefault(row["patient_id"], set()).add(row["split"])
    assert len(rows) == 12
    assert all(len(found) == 1 for found in splits.values())
    assert {next(iter(found)) for found in splits.values()} == {"train", "val", "test"}


def test_wsiseg_reads_the_cohort(data, tmp_path):
    output = tmp_path / "cohort.csv"
    run(data, output)
    entries = Cohort.from_csv(output).entries
    assert [entry.mpp for entry in entries] == [0.25] * 12
    assert all(entry.path.is_file() for entry in entries)
    assert all(entry.annotation and entry.annotation.is_file() for entry in entries)


def test_an_image_without_mask_is_named(data, tmp_path):
    (data / "masks" / "003.png").unlink()
    done = run(data, tmp_path / "cohort.csv")
    assert done.returncode == 1
    assert "003.png" in done.stderr
    assert not (tmp_path / "cohort.csv").exists()


def test_a_folder_without_images_is_an_error(tmp_path):
    done = run(tmp_path, tmp_path / "cohort.csv")
    assert done.returncode == 1
    assert "holds no *.png" in done.stderr


def test_an_unlabelled_slide_is_learnt_from_at_its_own_resolution(data, tmp_path, real_slide):
    output = tmp_path / "cohort.csv"
    assert run(data, output, "--slide", real_slide).returncode == 0
    slide = Cohort.from_csv(output).entries[-1]
    assert (slide.slide_id, slide.mpp, slide.annotation, slide.split) == (
        real_slide.stem, None, None, "train",
    )  # fmt: skip


def test_a_missing_slide_is_named(data, tmp_path):
    done = run(data, tmp_path / "cohort.csv", "--slide", tmp_path / "gone.svs")
    assert done.returncode == 1
    assert "gone.svs' does not exist" in done.stderr
