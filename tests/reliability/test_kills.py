"""SIGKILL at any moment, the same command again: the result of a run that nobody disturbed.

R1 (tile), R2 (pretrain, finetune) and R3 (segment, export) of the reliability tables.
"""

import random
import signal
from pathlib import Path
from typing import Any

import pytest
from reliability.bench import commands, identity, journal_files

STORES = {
    "tile": ("tiles/large.zarr", ("images", "labels", "labelled_px")),
    "segment": ("out/large.mask.zarr", ("0", "probability")),
}
"""The store that a command writes unit by unit, and the arrays of which a unit is made."""

MAX_KILLS = 4
"""Of one trial, so that trials end even if the machine is slower now than when it was timed."""


def kill_until_done(bench, name, rng):
    """Kill runs at random times until one ends by itself; return how many were killed."""
    command = commands("large")[name]
    folder = bench.folder(command)
    records: list[Any] = []
    while True:
        after_s = rng.uniform(0, bench.seconds["large", name])
        kill = [(after_s, signal.SIGKILL)] if len(records) < MAX_KILLS else []
        done = bench.run(command, folder, signals=kill)
        if done.signal is None:
            break
        assert done.signal == "SIGKILL"
        records.append(found_on_disk(folder, name))
    assert done.returncode == 0, done.stderr
    assert bench.differences(command, folder) == []
    if name in STORES:
        for acknowledged, written in records:
            assert_nothing_redone(folder, name, acknowledged, written)
    return len(records)


def found_on_disk(folder: Path, name: str):
    """Return the files of acknowledged units and of any, each with its identity."""
    if name not in STORES:
        return {}, {}
    final, arrays = STORES[name]
    store = folder / f"{final}.partial"
    if not store.exists():
        store = folder / final
    written = [p for a in arrays for p in (store / a / "c").rglob("*") if p.is_file()]
    return (
        {p.relative_to(store): i for p, i in journal_files(store).items()},
        {p.relative_to(store): identity(p) for p in written if p.suffix != ".partial"},
    )


def assert_nothing_redone(folder, name, acknowledged, written):
    """Acknowledged units are never written again, and at most one that was not yet."""
    final, arrays = STORES[name]
    now = {p: identity(folder / final / p) for p in written if (folder / final / p).exists()}
    redone = {p for p, was in written.items() if now.get(p) != was}
    assert not {p for p in redone if p in acknowledged}
    assert len(redone) <= len(arrays), redone


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "pr", "night"),
    [
        ("tile", 25, 500),
        ("pretrain", 8, 100),
        ("finetune", 7, 100),
        ("segment", 10, 100),
        ("export", 5, 100),
    ],
)
def test_a_killed_command_resumes_to_the_same_bytes(
    bench, scorecard, figure, seed, name, pr, night
):
    wanted = figure(pr=pr, night=night)
    rng = random.Random(seed)
    kills = 0
    while kills < wanted:
        dice = [random.Random(rng.random()) for _ in range(2)]
        kills += sum(bench.each(lambda d: kill_until_done(bench, name, d), dice))
    scorecard.add("kills survived", kills)
    scorecard.add("silent corruptions", 0)
