"""Bad input through the command line: one clear line that names the slide and the remedy.

Each bad slide stands beside a good one, which must come out whole. The commands run in this
process, through the entry point of `wsiseg`.
"""

import json
import os
import shutil

import numpy as np
import pytest
import tifffile
from PIL import Image

from wsiseg.errors import WsisegError

TILE = ("--tile-size", 256)


@pytest.fixture
def wsiseg(wsiseg_here):
    return wsiseg_here


@pytest.fixture
def good(tmp_path, real_slide):
    """A small part of the real slide as an image, so that each command takes a second."""
    import openslide

    with openslide.OpenSlide(real_slide) as slide:
        image = slide.read_region((600, 900), 0, (600, 600)).convert("RGB")
    path = tmp_path / "in" / "good.png"
    path.parent.mkdir()
    image.save(path)
    return path


def lines_with(text, *words):
    return [line for line in text.splitlines() if all(w in line for w in words)]


def assert_one_line(done, *words):
    """Exit 1, exactly one error line holding all words, and no traceback."""
    assert done.returncode == 1, done.stderr
    assert "Traceback" not in done.stderr
    assert len(lines_with(done.stderr, "error: ", *words)) == 1, done.stderr


def break_tiles(source, target):
    """Copy an SVS and overwrite the compressed data of half its tiles."""
    shutil.copy(source, target)
    with tifffile.TiffFile(source) as tiff:
        page = tiff.pages[0]
        places = list(zip(page.dataoffsets, page.databytecounts, strict=True))
    with target.open("r+b") as file:
        for offset, count in places[len(places) // 3 :: 2]:
            file.seek(offset)
            file.write(b"\0" * count)


def make_missing(path, real_slide):
    pass


def make_directory(path, real_slide):
    path.mkdir()
    (path / "something").write_text("x")


def make_empty(path, real_slide):
    path.touch()


def make_text(path, real_slide):
    path.write_text("this is not a slide\n" * 50)


def make_truncated(path, real_slide):
    path.write_bytes(real_slide.read_bytes()[:200_000])


def make_broken_in_the_middle(path, real_slide):
    break_tiles(real_slide, path)


def make_small(path, real_slide):
    Image.fromarray(np.full((100, 100, 3), (200, 120, 160), np.uint8)).save(path, format="PNG")


def make_white(path, real_slide):
    Image.fromarray(np.full((700, 700, 3), 244, np.uint8)).save(path, format="PNG")


def make_fifo(path, real_slide):
    os.mkfifo(path)


BAD_SLIDES = [
    pytest.param(make_missing, ".svs", ("no such file",), id="missing"),
    pytest.param(make_directory, ".svs", ("folder",), id="directory"),
    pytest.param(make_empty, ".svs", ("empty",), id="empty"),
    pytest.param(make_text, ".svs", ("not a slide",), id="text"),
    pytest.param(make_truncated, ".svs", (), id="truncated"),
    pytest.param(make_broken_in_the_middle, ".svs", (), id="fails in the middle"),
    pytest.param(make_small, ".png", ("smaller than one tile", "--tile-size"), id="small"),
    pytest.param(make_white, ".png", ("tissue", "--tissue"), id="white"),
    pytest.param(make_fifo, ".svs", ("not a regular file",), id="fifo"),
]


@pytest.mark.parametrize(("make", "suffix", "words"), BAD_SLIDES)
def test_a_bad_slide_costs_that_slide_only(wsiseg, tmp_path, good, real_slide, make, suffix, words):
    bad = tmp_path / "in" / f"bad{suffix}"
    make(bad, real_slide)
    out = tmp_path / "out"
    done = wsiseg("tile", bad, good, "-o", out, *TILE, "--slide-mpp", 0.5, "--json")
    assert_one_line(done, "bad", *words)
    rows = {row["slide_id"]: row["status"] for row in json.loads(done.stdout)["results"]}
    assert rows == {"bad": "failed", "good": "ok"}
    assert wsiseg("verify", out / "good.zarr").returncode == 0
    assert not (out / "bad.zarr").exists()


def test_a_slide_without_mpp_names_the_option(wsiseg, tmp_path, good):
    done = wsiseg("tile", good, "-o", tmp_path / "out")
    assert_one_line(done, "good", "mpp", "--slide-mpp")


def rectangle(x, y, width, height, name="Nucleus"):
    ring = [[x, y], [x + width, y], [x + width, y + height], [x, y + height], [x, y]]
    return feature([ring], name)


def feature(rings, name):
    return {
        "type": "Feature",
        "geometry": {"type": "Polygon", "coordinates": rings},
        "properties": {
            "objectType": "annotation",
            "classification": {"name": name, "color": [1, 2, 3]},
        },
    }


def write_annotations(path, *features):
    path.write_text(json.dumps({"type": "FeatureCollection", "features": list(features)}))
    return path


CLASSES = "classes:\n  - Nucleus\n"


@pytest.mark.parametrize(
    ("features", "words"),
    [
        pytest.param([rectangle(5000, 5000, 10, 10)], ("outside",), id="outside"),
        pytest.param(
            [rectangle(5, 5, 100, 100, "Nucleos")],
            ("Nucleos", "did you mean 'Nucleus'"),
            id="unknown class",
        ),
        pytest.param([rectangle(float("nan"), 5, 9, 9)], ("0",), id="nan"),
    ],
)
def test_a_wrong_annotation_is_named(wsiseg, tmp_path, good, features, words):
    annotation = write_annotations(tmp_path / "good.geojson", *features)
    (tmp_path / "classes.yaml").write_text(CLASSES)
    done = wsiseg(
        "tile", good, "-o", tmp_path / "out", *TILE, "--slide-mpp", 0.5,
        "--annotations", annotation, "--classes", tmp_path / "classes.yaml")  # fmt: skip
    assert_one_line(done, "good", *words)
    assert not (tmp_path / "out" / "good.zarr").exists()


def test_a_self_crossing_annotation_is_repaired_with_a_warning(wsiseg, tmp_path, good):
    bow_tie = [[[10, 10], [200, 200], [200, 10], [10, 200], [10, 10]]]
    annotation = write_annotations(tmp_path / "good.geojson", feature(bow_tie, "Nucleus"))
    done = wsiseg(
        "tile", good, "-o", tmp_path / "out", *TILE, "--slide-mpp", 0.5,
        "--annotations", annotation)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert len(lines_with(done.stderr, "WARNING", "good.geojson", "feature 0")) == 1, done.stderr


def test_a_mask_of_another_size_is_refused_with_both_sizes(wsiseg, tmp_path, good):
    labels = tmp_path / "labels"
    labels.mkdir()
    Image.fromarray(np.zeros((500, 400), np.uint8)).save(labels / "good.png")
    done = wsiseg(
        "tile", good, "-o", tmp_path / "out", *TILE, "--slide-mpp", 0.5, "--labels", labels
    )
    assert_one_line(done, "good", "400 x 500", "600 x 600")


def test_a_mask_value_without_a_class_is_refused(wsiseg, tmp_path, good):
    labels = tmp_path / "labels"
    labels.mkdir()
    Image.fromarray(np.full((600, 600), 3, np.uint8)).save(labels / "good.png")
    done = wsiseg(
        "tile", good, "-o", tmp_path / "out", *TILE, "--slide-mpp", 0.5, "--labels", labels
    )
    assert_one_line(done, "good", "value 3", "--classes")


@pytest.fixture
def tiled(wsiseg, tmp_path, good):
    done = wsiseg("tile", good, "-o", tmp_path / "tiles", *TILE, "--slide-mpp", 0.5)
    assert done.returncode == 0, done.stderr
    return tmp_path / "tiles" / "good.zarr"


def edit_json(path, change):
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_a_store_of_a_newer_format_version_is_refused(wsiseg, tmp_path, tiled):
    def newer(data):
        data["attributes"]["wsiseg"]["format_version"] = 99

    edit_json(tiled / "zarr.json", newer)
    done = wsiseg("pretrain", tiled, "-o", tmp_path / "run", "--steps", 1)
    assert_one_line(done, "99", "newer")


def test_an_output_that_holds_another_run_is_refused_and_left_as_it_is(
    wsiseg, tmp_path, good, tiled
):
    before = {p: p.read_bytes() for p in tiled.rglob("*") if p.is_file()}
    done = wsiseg("tile", good, "-o", tiled.parent, *TILE, "--slide-mpp", 0.5, "--overlap", 32)
    assert_one_line(done, "different run", "overlap: 0 -> 32", "--overwrite")
    assert {p: p.read_bytes() for p in tiled.rglob("*") if p.is_file()} == before


def test_the_same_command_twice_does_nothing_the_second_time(wsiseg, good, tiled):
    done = wsiseg("tile", good, "-o", tiled.parent, *TILE, "--slide-mpp", 0.5)
    assert done.returncode == 0
    assert "already done" in done.stdout


@pytest.mark.parametrize("name", ["model.pt", "model.pth", "weights.pkl", "run"])
def test_a_checkpoint_that_is_not_ours_is_never_unpickled(wsiseg, tmp_path, good, name):
    import pickle

    canary = tmp_path / "canary"

    class Bomb:
        def __reduce__(self):
            return os.system, (f"touch {canary}",)

    path = tmp_path / name
    if name == "run":
        path.mkdir()
        (path / "model.json").write_bytes(pickle.dumps(Bomb()))
        (path / "weights.safetensors").write_bytes(pickle.dumps(Bomb()))
    else:
        path.write_bytes(pickle.dumps(Bomb()))
    done = wsiseg("segment", good, "--model", path, "-o", tmp_path / "out", "--slide-mpp", 0.5)
    assert_one_line(done, name)
    assert not canary.exists()


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("tile:\n  tile_siez: 128\n", ("tile_siez", "did you mean 'tile_size'")),
        ("tiel:\n  mpp: 1\n", ("tiel", "did you mean 'tile'")),
        ("tile:\n  mpp: fast\n", ("mpp", "'fast'")),
    ],
)
def test_a_wrong_config_is_a_usage_error_with_a_suggestion(wsiseg, tmp_path, good, text, words):
    config = tmp_path / "c.yaml"
    config.write_text(text)
    done = wsiseg("tile", good, "-o", tmp_path / "out", "--config", config)
    assert done.returncode == 2
    assert lines_with(done.stderr, *words)
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("tile",), ("Missing argument",)),
        (("tile", "x.svs"), ("--output",)),
        (("tile", "x.svs", "-o", "o", "--tile-size", "-4"), ("tile_size", ">= 16")),
        (("tile", "nothing/*.svs", "-o", "o"), ("nothing/*.svs",)),
        (("pretrain", "nowhere", "-o", "o"), ("nowhere",)),
        (("finetune", "x.zarr", "-o", "o"), ("--pretrained", "--from-scratch")),
        (("segment", "x.svs", "--modle", "m"), ("--modle",)),
        (("nonsense",), ("nonsense",)),
    ],
    ids=lambda a: " ".join(a[:2]),
)
def test_wrong_usage_exits_with_2(wsiseg, tmp_path, arguments, words):
    done = wsiseg(*arguments, cwd=tmp_path)
    assert done.returncode == 2, done.stderr
    for word in words:
        assert word in done.stderr


def test_every_error_of_ours_is_fit_to_be_shown():
    def children(cls):
        return {cls}.union(*(children(c) for c in cls.__subclasses__()))

    for cls in children(WsisegError):
        assert cls.__doc__
        assert cls.exit_code in (1, 2)
