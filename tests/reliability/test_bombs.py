"""S2: files that claim much are refused before anything is allocated for them."""

import json

from reliability.bombs import BOMBS
from reliability.zygote import Zygote

MAX_BYTES = 500_000_000


def test_bombs_are_refused_before_they_unfold(tmp_path, scorecard):
    folder = tmp_path / "bombs"
    folder.mkdir()
    for name, (suffix, _, write) in BOMBS.items():
        write(folder / f"{name}{suffix}")
    # A glob, for not every suffix of a bomb is looked for in a folder.
    command = ("tile", folder / "*.*", "-o", tmp_path / "out", "--slide-mpp", 0.5)
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
