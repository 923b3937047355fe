"""A run that was stopped at any step ends as if it had not been: the same bits on a CPU."""

import dataclasses
import json
import shutil

import pytest
import torch

from tests.stores_on_disk import write_tiles
from tests.training.tiny_runs import (
    KINDS,
    SHORT,
    assert_same_weights,
    denoiser,
    go_back,
    lines,
    stop_after_every_step,
    train,
    trainer,
)
from wsiseg.settings.training import OptimConfig
from wsiseg.training import resume, tasks
from wsiseg.training.resume import TrainState, load_newest, save_state

THIRTY = OptimConfig(
    steps=31, batch_size=4, accumulate=2, learning_rate=1e-3, warmup_steps=5, validate_every=4,
    save_every=1, patience=0, ema_decay=0.9,
)  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_tiles(tmp_path_factory.mktemp("store") / "s.zarr", num=10, size=16)


def without_best(tensors):
    return {name: tensor for name, tensor in tensors.items() if not name.startswith("best.")}


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_resumed_at_every_one_of_30_steps_ends_with_the_same_bits(
    store, tmp_path, monkeypatch, kind
):
    """Model, averaged and best weights, optimizer, counters and the curve, at every step."""
    monkeypatch.setattr(resume, "KEPT", 100)
    assert stop_after_every_step(kind, store, tmp_path, THIRTY) == THIRTY.steps


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("step", [1, 7, 8])
def test_a_run_killed_after_a_resume_point_ends_with_the_same_bits(
    store, tmp_path, monkeypatch, kind, step
):
    """The curve has gone on past the point by then; it ends without gap or repeated line."""
    monkeypatch.setattr(resume, "KEPT", 100)
    whole = train(kind, store, tmp_path / "run")
    log = lines(tmp_path / "run")
    go_back(tmp_path / "run", step)
    result = train(kind, store, tmp_path / "run")
    assert_same_weights(result.ema, whole.ema)
    assert_same_weights(result.best, whole.best)
    assert (result.best_step, result.metrics) == (whole.best_step, whole.metrics)
    assert lines(tmp_path / "run") == log


@pytest.mark.parametrize("kind", KINDS)
def test_the_same_seed_gives_the_same_bits_with_any_number_of_threads(
    store, tmp_path, monkeypatch, kind
):
    """As long as there is a piece for each; here one of each of the 4 tiles of a step."""
    monkeypatch.setattr(tasks, "CPU_PIECE_PIXELS", 256)
    before = torch.get_num_threads()
    fifty = dataclasses.replace(SHORT, steps=50, validate_every=25, save_every=50)
    results = []
    try:
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            results.append(train(kind, store, tmp_path / str(threads), fifty))
    finally:
        torch.set_num_threads(before)
    for result in results[1:]:
        assert_same_weights(result.ema, results[0].ema)
        assert result.metrics == results[0].metrics
    assert lines(tmp_path / "1") == lines(tmp_path / "3")


def test_another_seed_gives_other_weights(store, tmp_path):
    one = train("pretrain", store, tmp_path / "1", seed=1)
    two = train("pretrain", store, tmp_path / "2", seed=2)
    assert any(not torch.equal(one.ema[name], two.ema[name]) for name in one.ema)


def damage_by_cutting(path):
    path.write_bytes(path.read_bytes()[:-100])


def damage_by_a_flipped_bit(path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 4
    path.write_bytes(bytes(data))


def damage_by_zeros(path):
    path.write_bytes(bytes(len(path.read_bytes())))


def damage_by_removal(path):
    path.unlink()


@pytest.mark.parametrize("name", ["state.safetensors", "state.json"])
@pytest.mark.parametrize(
    "damage", [damage_by_cutting, damage_by_a_flipped_bit, damage_by_zeros, damage_by_removal]
)
def test_a_damaged_newest_point_is_left_out_for_the_one_before(tmp_path, caplog, damage, name):
    for step in (1, 2):
        save_state(tmp_path, TrainState(step=step), {"model.a": torch.full((3,), float(step))})
    damage(tmp_path / "resume" / "step-00000002" / name)
    found = load_newest(tmp_path, {"a": (3,)})
    assert found is not None
    assert found[0].step == 1
    assert found[1]["model.a"].tolist() == [1.0, 1.0, 1.0]
    assert "is damaged and left out" in caplog.text


def test_any_flipped_bit_of_a_point_is_noticed(tmp_path, caplog):
    """Of its description: whatever is read must be what was written."""
    save_state(tmp_path, TrainState(step=3, best_metric=0.25), {"model.a": torch.ones(2)})
    path = tmp_path / "resume" / "step-00000003" / "state.json"
    whole = path.read_bytes()
    for position in range(0, len(whole), 7):
        data = bytearray(whole)
        data[position] ^= 1
        path.write_bytes(bytes(data))
        assert load_newest(tmp_path, {"a": (2,)}) is None
    assert "damaged" in caplog.text


def test_the_two_newest_points_are_kept(tmp_path):
    for step in range(1, 6):
        save_state(tmp_path, TrainState(step=step), {"model.a": torch.ones(1)})
    names = sorted(p.name for p in (tmp_path / "resume").iterdir())
    assert names == ["step-00000004", "step-00000005"]


def test_a_point_that_was_not_finished_does_not_count(tmp_path):
    save_state(tmp_path, TrainState(step=1), {"model.a": torch.ones(1)})
    whole = tmp_path / "resume" / "step-00000001"
    shutil.copytree(whole, tmp_path / "resume" / "step-00000009.partial")
    found = load_newest(tmp_path, {"a": (1,)})
    assert found is not None
    assert found[0].step == 1


def test_a_point_of_another_network_does_not_count(tmp_path, caplog):
    save_state(tmp_path, TrainState(step=1), {"model.a": torch.ones(1)})
    assert load_newest(tmp_path, {"a": (2,)}) is None
    assert "of another model" in caplog.text


def test_a_torn_line_and_lines_of_steps_to_come_are_dropped(store, tmp_path):
    train("pretrain", store, tmp_path / "run")
    log = lines(tmp_path / "run")
    path = tmp_path / "run" / "metrics.jsonl"
    with path.open("a") as file:
        file.write(json.dumps({"step": 99, "loss": 1.0}) + '\n{"step": 12, "lo')
    model, task = denoiser(store)
    trainer(tmp_path / "run", model, task).run("again")
    assert lines(tmp_path / "run") == log
