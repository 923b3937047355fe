"""U6: whatever slides, tables and stores are called, nothing appears outside the output."""

import contextlib
import json
import os
import shutil
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from soak import examples
from stores_on_disk import begin_tiles, tile_data, write_mask, write_tiles

from wsiseg.errors import CohortError, WsisegError
from wsiseg.slides.cohort import Cohort
from wsiseg.slides.reader import default_slide_id
from wsiseg.store.verify import verify_store

PARTS = st.sampled_from(
    ["..", ".", "/", "\\", "%2e%2e", "%2f", "~", "$HOME", "\u2024", "\uff0e\uff0e", "\u2215",
     "\u202e", "C:", "a", "nul", "-o", ".zarr", ".partial", ".lock", "*", "?", "[",
     "\n", "\r", "\t", "\x00", "\x7f", " ", "\udcff", "é", "x" * 120]
)  # fmt: skip
NAMES = st.lists(PARTS, min_size=1, max_size=6).map("".join)


def snapshot(folder):
    """Return every path below a folder with the content of each file; links are not followed."""
    found = {}
    for root, folders, files in os.walk(folder):
        for name in (*folders, *files):
            path = os.path.join(root, name)  # noqa: PTH118 - bytes and surrogates as they are
            if os.path.islink(path):  # noqa: PTH114 - the same
                found[path] = os.readlink(path)  # noqa: PTH115 - the same
            elif os.path.isfile(path):  # noqa: PTH113 - the same
                with open(path, "rb") as file:  # noqa: PTH123 - the same
                    found[path] = file.read()
            else:
                found[path] = None
    return found


@examples(pr=200, night=10_000)
@given(name=NAMES)
def test_a_slide_id_names_one_file_in_the_output_folder(tmp_path_factory, name):
    root = tmp_path_factory.getbasetemp() / "root"
    slide_id = default_slide_id(Path("folder") / name.replace("/", "_"))
    for suffix in (".zarr", ".mask.zarr", ".geojson", ".png", ".geojson.gz.partial", ".zarr.lock"):
        path = root / f"{slide_id}{suffix}"
        assert path.parent == root
        assert os.path.normpath(path) == str(path)
        assert len(os.fsencode(path.name)) <= 255
    assert not any(c in slide_id for c in "/\\\0\n\r")
    slide_id.encode()


@examples(pr=200, night=10_000)
@given(slide_id=NAMES, path=NAMES)
def test_a_cohort_names_files_in_the_output_folder_or_is_refused(tmp_path_factory, slide_id, path):
    table = tmp_path_factory.getbasetemp() / "cohort.csv"
    quoted = ['"' + text.replace('"', '""') + '"' for text in (slide_id, path)]
    table.write_bytes(f"slide_id,path\n{','.join(quoted)}\n".encode("utf-8", "surrogateescape"))
    try:
        (entry,) = Cohort.from_csv(table).entries
    except CohortError as error:
        assert "cohort.csv" in str(error)
        return
    root = table.parent / "out"
    output = root / f"{entry.slide_id}.zarr"
    assert output.parent == root
    assert os.path.normpath(output) == str(output)
    assert len(os.fsencode(output.name)) <= 255


HOSTILE_FILES = [
    "...svs", "-o.png", "--help.png", "a\nb.png", "c\td.png", "[e].png", "f*.png", "%2e%2e%2fx.png",
    "..\\..\\x.png", "~root.png", "$HOME.png", "x" * 250 + ".png", "\u202egnp.png", "g:h.png",
    "\u00e9t\u00e9.png", ".hidden.png", "<img onerror=x>.png", "a;touch b.png", "`x`.png",
    "{0}.png", "%s.png", "CON.png",
]  # fmt: skip


def test_hostile_file_names_stay_in_the_output_folder(wsiseg_here, tmp_path, real_slide):
    import openslide

    with openslide.OpenSlide(real_slide) as slide:
        image = slide.read_region((900, 1200), 0, (80, 80)).convert("RGB")
    work = tmp_path / "work"
    work.mkdir()
    table = ["path"]
    for name in [*HOSTILE_FILES, os.fsdecode(b"\xff\xfe.png")]:
        image.save(work / name, format="PNG")
        if "\udcff" not in name:
            table.append('"' + name + '"')
    (work / "cohort.csv").write_text("\n".join(table) + "\n")
    before = snapshot(tmp_path)
    command = ("--tile-size", 32, "--slide-mpp", 0.5, "--tissue", "none", "--json")
    direct = [f"./{p.name}" for p in work.iterdir() if p.suffix == ".png"]
    for inputs in (direct, ["cohort.csv"]):
        done = wsiseg_here("tile", *inputs, "-o", "out", *command, cwd=work)
        assert "Traceback" not in done.stderr
        assert done.returncode in (0, 1), done.stderr
    after = snapshot(tmp_path)
    assert {p: c for p, c in after.items() if not p.startswith(str(work / "out"))} == before
    assert len([*(work / "out").glob("*.zarr")]) >= len(HOSTILE_FILES) - 3


HOSTILE_PLACES = st.sampled_from(
    ["../victim/a", "/etc/passwd", "..", "", ".", "a/../../victim/a", "\x00", "x" * 300]
)


@pytest.fixture(scope="module")
def whole_store(tmp_path_factory):
    return write_tiles(tmp_path_factory.mktemp("whole") / "a.zarr", num=4)


@examples(pr=100, night=10_000)
@given(places=st.lists(HOSTILE_PLACES, min_size=1, max_size=3), record=st.sampled_from(
    [[1, "00"], [0, ""], [-1, None], [2**70, "x"], ["a", 1]]
))  # fmt: skip
def test_a_ledger_never_reaches_out_of_its_store(tmp_path_factory, whole_store, places, record):
    root = tmp_path_factory.mktemp("ledger")
    victim = root / "victim"
    victim.mkdir()
    (victim / "a").write_text("mine")
    store = Path(shutil.copytree(whole_store, root / "a.zarr"))
    ledger = json.loads((store / "ledger.json").read_text())
    ledger["files"] = dict.fromkeys(places, record)
    (store / "ledger.json").write_text(json.dumps(ledger))
    before = snapshot(root)
    with contextlib.suppress(WsisegError):
        assert verify_store(store)
    assert snapshot(root) == before
    shutil.rmtree(root)


@pytest.mark.parametrize("suffix", ["", ".partial"])
def test_a_link_in_the_place_of_a_store_is_not_followed(tmp_path, suffix):
    victim = tmp_path / "victim"
    write_mask(victim)
    before = snapshot(victim)
    out = tmp_path / "out"
    out.mkdir()
    (out / f"a.zarr{suffix}").symlink_to(victim)
    try:
        with begin_tiles(out / "a.zarr", num=4, overwrite=True) as writer:
            images, labels = tile_data(4, 16)
            for shard in writer.pending_shards():
                part = writer.shard_tiles(shard)
                part = slice(part.start, part.stop)
                writer.write_shard(shard, images[part], labels[part])
            writer.finish()
    except WsisegError as error:
        assert "a.zarr" in str(error)
    assert snapshot(victim) == before


@pytest.mark.parametrize("suffix", ["", ".partial", ".lock"])
def test_a_link_in_the_place_of_a_file_is_not_followed(wsiseg_here, tmp_path, suffix):
    mask = write_mask(tmp_path / "a.mask.zarr")
    victim = tmp_path / "victim"
    victim.write_text("mine")
    out = tmp_path / "out"
    out.mkdir()
    (out / f"a.geojson{suffix}").symlink_to(victim)
    done = wsiseg_here("export", mask, "-o", out / "a.geojson", "--overwrite")
    assert "Traceback" not in done.stderr
    assert victim.read_text() == "mine"
