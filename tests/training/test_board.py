"""TensorBoard shows what metrics.jsonl holds."""

import dataclasses
import sys

import pytest

from tests.stores_on_disk import write_tiles
from tests.training.tiny_runs import SHORT, go_back, lines, train
from wsiseg.errors import ConfigError
from wsiseg.training.board import FOLDER, open_board

ON = dataclasses.replace(SHORT, tensorboard=True)


def scalars(folder):
    """Return {(name, step): value} of the event files."""
    accumulator = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator",
        reason="tensorboard (extra 'log') is not installed",
    )
    events = accumulator.EventAccumulator(str(folder / FOLDER))
    events.Reload()
    return {
        (name, event.step): event.value
        for name in events.Tags()["scalars"]
        for event in events.Scalars(name)
    }


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_the_event_files_hold_the_lines_of_the_run_also_of_a_resumed_one(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard (extra 'log') is not installed")
    store = write_tiles(tmp_path / "s.zarr", num=10, size=16)
    train("pretrain", store, tmp_path / "run", ON)
    go_back(tmp_path / "run", 11)
    train("pretrain", store, tmp_path / "run", ON)
    expected = {
        (name, line["step"]): value
        for line in lines(tmp_path / "run")
        for name, value in line.items()
        if name != "step" and value is not None
    }
    found = scalars(tmp_path / "run")
    assert {("loss", 10), ("loss", 12), ("val_loss", 4)} <= expected.keys()
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, rel=1e-5), key


def test_it_is_off_unless_asked_for_and_says_what_is_missing(tmp_path, monkeypatch):
    with open_board(tmp_path, is_on=False, step=0) as show:
        show({"step": 1, "loss": 2.0})
    assert not list(tmp_path.iterdir())
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    with (
        pytest.raises(ConfigError, match=r"wsiseg\[log\]"),
        open_board(tmp_path, is_on=True, step=0),
    ):
        pass
