"""S1: damaged slides in the real command; each costs itself, the good one among them comes out."""

import json
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest
from reliability.bench import LANES
from reliability.mutants import SHARES, make_seeds, mutate, with_own_series, write_pyramid
from reliability.zygote import Zygote

from wsiseg.store.tiles import TileStore
from wsiseg.store.verify import verify_store

BATCH = 20
PARTS = 9
"""Each a test of its own, far below the time that one may take."""
COMMAND = ("--tile-size", 256, "--slide-mpp", 0.5, "--tissue", "none", "--json")
MEMORY_LIMIT_BYTES = 3 << 29


@pytest.fixture(scope="module")
def zygote():
    # What a command imports late, too: a fork of this process need not do it again.
    modules = "wsiseg.cli.slide_commands", "wsiseg.cli.labels", "wsiseg.slides.probe_server"
    with Zygote(*modules, "scipy.sparse", num_lanes=LANES) as zygote:
        yield zygote


@pytest.fixture(scope="module")
def seeds(tmp_path_factory, real_slide):
    return make_seeds(tmp_path_factory.mktemp("seeds"), real_slide)


def write_batch(folder, seeds, rng):
    """Write one good slide and the rest bad; return what was done to each by its id."""
    folder.mkdir()
    good = int(rng.integers(BATCH))
    done = {}
    for i in range(BATCH):
        if i == good:
            write_pyramid(folder / f"{i:02d}.tif")
            continue
        seed = seeds[rng.choice(len(seeds), p=[*SHARES.values()])]
        data, how = mutate(seed, rng)
        (folder / f"{i:02d}{seed.suffix}").write_bytes(with_own_series(data, i))
        done[f"{i:02d}"] = f"{seed.name} {how}"
    return f"{good:02d}", done


def test_the_slides_that_are_damaged_are_whole_and_of_their_formats(tmp_path, zygote, seeds):
    for i, seed in enumerate(seeds):
        (tmp_path / f"{i}{seed.suffix}").write_bytes(with_own_series(seed.data, i))
    done = zygote.run("info", *sorted(tmp_path.iterdir()), "--json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    readers = [slide["reader"] for slide in json.loads(done.stdout)["slides"]]
    vendors = "generic-tiff", "generic-tiff", "aperio", "aperio", "hamamatsu", "ventana", "dicom"
    assert readers == [f"openslide:{vendor}" for vendor in vendors]


def try_batch(folder, zygote, seeds, rng):
    """Tile a batch; return how many were refused, were read, and ended their probe."""
    slides, out = folder / "in", folder / "out"
    good, how = write_batch(slides, seeds, rng)
    done = zygote.run("tile", slides, "-o", out, *COMMAND, cwd=folder)
    assert done.signal is None, f"parent death by {done.signal}: {how}\n{done.stderr}"
    assert not done.timed_out, how
    assert done.returncode in (0, 1), f"{done.stderr}\n{how}"
    assert "Traceback" not in done.stderr
    assert done.max_rss_bytes < MEMORY_LIMIT_BYTES, how
    rows = {row["slide_id"]: row for row in json.loads(done.stdout)["results"]}
    assert {*rows} == {good, *how}
    assert rows[good]["status"] == "ok"
    store = TileStore.open(out / f"{good}.zarr")
    assert store.num_tiles == 6
    assert verify_store(out / f"{good}.zarr") == []
    errors = {i: row["error"] for i, row in rows.items() if row["status"] == "failed"}
    for slide_id, error in errors.items():
        assert slide_id in error, how[slide_id]
        assert "\n" not in error, how[slide_id]
    shutil.rmtree(folder)
    died = sum("was killed by" in error for error in errors.values())
    return len(errors), len(how) - len(errors), died


@pytest.mark.slow
@pytest.mark.parametrize("part", range(PARTS))
def test_damaged_slides_cost_themselves_only(
    tmp_path, zygote, seeds, figure, seed, scorecard, part
):
    num_batches = figure(pr=1_000, night=100_000) // (PARTS * (BATCH - 1)) + 1

    def try_one(number):
        folder = tmp_path / str(number)
        folder.mkdir()
        return try_batch(folder, zygote, seeds, np.random.default_rng((seed, part, number)))

    with ThreadPoolExecutor(LANES) as pool:
        results = list(pool.map(try_one, range(num_batches)))
    refused, read, died = (sum(column) for column in zip(*results, strict=True))
    print(f"{refused} refused, {read} read; {died} ended their probe")  # noqa: T201 - shown by -s
    scorecard.add("mutants survived", refused + read)
    scorecard.add("parent deaths", 0)


CORPUS = Path(__file__).parents[1] / "corpus" / "slides"


def test_what_once_did_harm_does_no_more(tmp_path, zygote, scorecard):
    bad = sorted(p for p in CORPUS.iterdir() if p.is_file())
    write_pyramid(tmp_path / "good.tif")
    done = zygote.run(
        "tile", *bad, tmp_path / "good.tif", "-o", tmp_path / "out", *COMMAND, cwd=tmp_path
    )
    assert done.signal is None
    assert done.returncode == 1
    assert done.max_rss_bytes < 500_000_000
    rows = {row["slide_id"]: row["status"] for row in json.loads(done.stdout)["results"]}
    assert rows == {p.stem: "failed" for p in bad} | {"good": "ok"}
    assert len(done.stderr.splitlines()) == len(bad)
    scorecard.add("parent deaths", 0)
