"""S2: files that claim much are refused before anything is allocated for them."""

import json

import pytest
from reliability.bombs import BOMBS
from reliability.probe_cost import probe_costs
from reliability.zygote import Zygote

MAX_BYTES = 500_000_000


@pytest.fixture(scope="module")
def bombs(tmp_path_factory):
    """Return the files by name."""
    folder = tmp_path_factory.mktemp("bombs")
    files = {name: folder / f"{name}{suffix}" for name, (suffix, _, _) in BOMBS.items()}
    for name, (_, _, write) in BOMBS.items():
        write(files[name])
    return files


def test_bombs_are_refused_before_they_unfold(tmp_path, bombs, scorecard):
    # A glob, for not every suffix of a bomb is looked for in a folder.
    slides = next(iter(bombs.values())).parent / "*.*"
    command = ("tile", slides, "-o", tmp_path / "out", "--slide-mpp", 0.5)
    with Zygote("wsiseg.cli.slide_commands", "wsiseg.cli.labels", "scipy.sparse") as zygote:
        done = zygote.run(*command, "--tile-size", 64, "--json", cwd=tmp_path)
    assert done.signal is None
    assert done.max_rss_bytes < MAX_BYTES
    assert "Traceback" not in done.stderr
    rows = {row["slide_id"]: row for row in json.loads(done.stdout)["results"]}
    assert {*rows} == {*BOMBS}
    for name, (_, is_fine, _) in BOMBS.items():
        if rows[name]["status"] == "ok":
            assert is_fine, name
            continue
        lines = [line for line in done.stderr.splitlines() if f"slide '{name}': " in line]
        assert len(lines) == 1
        assert lines[0].startswith("error: ")
    scorecard.add("parent deaths", 0)


def test_no_bomb_takes_memory_where_it_is_probed(bombs):
    """The child that reads is not a child of the command, which the test above measures."""
    costs = dict(zip(bombs, probe_costs([*bombs.values()]), strict=True))
    for name, cost in costs.items():  # shown by -s; docs/untrusted.md has a table of them
        print(f"{name:40} {cost.seconds:6.2f} s {cost.max_rss_bytes / 1e6:6.0f} MB  {cost.answer}")  # noqa: T201
        assert cost.max_rss_bytes < MAX_BYTES, name
        assert cost.answer != "ok" or BOMBS[name][1], name
