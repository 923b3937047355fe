"""Bits flipped, files cut and lost: found by `verify` and by every reader, never taken for data.

R12 (stores, models) and R13 (resume points).
"""

import dataclasses
import logging
import random
import shutil

import numpy as np
import pytest
import stores_on_disk as data
import torch
from reliability.bench import commands, snapshot

from wsiseg.errors import CheckpointError, StoreError
from wsiseg.models.checkpoint import model_digest
from wsiseg.models.packaged import packaged_model
from wsiseg.settings.export import ExportConfig
from wsiseg.stages import export
from wsiseg.store.tiles import TileStore
from wsiseg.store.verify import verify_store
from wsiseg.training.resume import TrainState, load_newest, save_state


def damage(path, rng):
    """Flip a bit, cut or delete a file; return what was done."""
    before = path.read_bytes()
    kind = rng.choice(["flip", "flip", "cut", "delete", "zero"])
    if kind == "delete":
        path.unlink()
    elif kind == "cut":
        path.write_bytes(before[: rng.randrange(len(before))])
    elif kind == "zero" and any(before):
        start = rng.choice([i for i, byte in enumerate(before[:5000]) if byte])
        path.write_bytes(before[:start] + bytes(len(before) - start))
    else:
        bit = rng.randrange(8 * len(before))
        changed = bytearray(before)
        changed[bit // 8] ^= 1 << bit % 8
        path.write_bytes(changed)
        kind = f"flip {bit}"
    return f"{kind} of {path.name}"


def read_tiles(path):
    """Return all that training takes from a store."""
    store = TileStore.open(path)
    every = range(store.num_tiles)
    return [
        store.read_images(every).tobytes(),
        store.read_labels(every).tobytes(),
        store.labelled_px.tobytes(),
        store.origins.tobytes(),
        repr((store.slide, store.run, store.group_id, store.split, store.classes, store.raster)),
    ]


def read_mask(path):
    """Return what is exported of a mask."""
    output = path.with_name("x.geojson")
    output.unlink(missing_ok=True)
    export.run(ExportConfig(), mask=path, output=output)
    return output.read_bytes()


@pytest.mark.parametrize("kind", ["tiles", "mask"])
def test_any_damage_of_a_store_is_found_by_verify_and_never_read(
    tmp_path, scorecard, figure, seed, kind
):
    rng = random.Random(seed)
    make, read = (data.write_tiles, read_tiles) if kind == "tiles" else (data.write_mask, read_mask)
    whole = make(tmp_path / "whole.zarr")
    wanted = read(whole)
    files = sorted(p.relative_to(whole) for p in whole.rglob("*") if p.is_file())
    for _ in range(figure(pr=100, night=2500)):
        store = tmp_path / "damaged.zarr"
        shutil.copytree(whole, store)
        done = damage(store / rng.choice(files), rng)
        try:
            problems = [p.what for p in verify_store(store)]
        except StoreError as error:
            problems = [str(error)]
        assert problems, done
        try:
            found = read(store)
        except StoreError:
            pass
        else:  # a level of the overview pyramid, which is not what is read
            assert found == wanted, done
            assert kind == "mask", done
        shutil.rmtree(store)
        scorecard.add("corruptions detected", 1)
    scorecard.add("silent corruptions", 0)


@pytest.mark.parametrize("name", ["tile", "segment"])
def test_only_the_damaged_slide_is_made_again(bench, scorecard, seed, name):
    rng = random.Random(seed)
    command, other = commands("small")[name], commands("large")[name]
    folder = bench.folder(command)
    bench.copy_results(command, folder)
    bench.copy_results(other, folder)
    (folder / "large.png").symlink_to(bench.whole / "large.png")
    store, untouched = folder / command.writes[0], folder / other.writes[0]
    lost = rng.choice([p for p in store.rglob("*") if p.is_file() and "/c/" in str(p)])
    lost.unlink()
    args = [a if a != "small.png" else ("small.png", "large.png") for a in command.args]
    flat = [x for a in args for x in (a if isinstance(a, tuple) else (a,))]
    was = untouched.stat().st_ino
    verified = bench.zygote.run("verify", store, untouched, cwd=folder)
    assert verified.returncode == 1
    assert "is missing" in verified.stderr
    assert "small" in verified.stderr
    assert str(untouched) not in verified.stderr
    done = bench.zygote.run(*flat, cwd=folder)
    assert done.returncode == 0, done.stderr
    assert "make the store again (which this command does now)" in done.stderr
    assert untouched.stat().st_ino == was
    for output in command.writes:
        assert snapshot(folder, output) == snapshot(bench.whole, output)
    scorecard.add("corruptions detected", 1)


def state_and_tensors(step):
    generator = torch.Generator().manual_seed(step)
    tensors = {f"model.{n}": torch.randn(4, 5, generator=generator) for n in ("a", "b")}
    return TrainState(step=step, losses=[0.5, float("nan")], metrics={"loss": step / 7}), tensors


def test_a_damaged_resume_point_is_passed_over_with_a_warning(
    tmp_path, scorecard, figure, seed, caplog
):
    rng = random.Random(seed)
    whole = tmp_path / "whole"
    shapes = {"a": (4, 5), "b": (4, 5)}
    for step in (3, 6):
        save_state(whole, *state_and_tensors(step))
    for _ in range(figure(pr=50, night=500)):
        run = tmp_path / "run"
        shutil.copytree(whole, run)
        newest = run / "resume" / "step-00000006"
        done = damage(rng.choice([p for p in newest.iterdir() if p.is_file()]), rng)
        with caplog.at_level(logging.WARNING):
            caplog.clear()
            found = load_newest(run, shapes)
        assert found is not None, done
        state, tensors = found
        wanted_state, wanted = state_and_tensors(3)
        assert repr(dataclasses.asdict(state)) == repr(dataclasses.asdict(wanted_state)), done
        for name, tensor in wanted.items():
            np.testing.assert_array_equal(tensors[name].numpy(), tensor.numpy())
        assert "step-00000006' is damaged and left out" in caplog.text
        shutil.rmtree(run)
        scorecard.add("corruptions detected", 1)
    scorecard.add("silent corruptions", 0)


def test_any_flipped_bit_of_a_models_description_is_found(tmp_path, scorecard, figure, seed):
    rng = random.Random(seed)
    run = tmp_path / "run"
    shutil.copytree(packaged_model(), run)
    description = run / "model.json"
    whole = description.read_bytes()
    for bit in rng.sample(range(8 * len(whole)), min(figure(pr=200, night=5000), 8 * len(whole))):
        changed = bytearray(whole)
        changed[bit // 8] ^= 1 << bit % 8
        description.write_bytes(changed)
        with pytest.raises(CheckpointError, match=r"checkpoint '.*run': (model\.json|format_)"):
            model_digest(run)
        scorecard.add("corruptions detected", 1)
    description.write_bytes(whole)
    model_digest(run)
    scorecard.add("silent corruptions", 0)


@pytest.mark.slow
def test_training_goes_on_from_the_point_before_a_damaged_one(bench, scorecard, seed):
    rng = random.Random(seed)
    command = commands("large")["pretrain"]
    renamed = bench.calls(command).index("rename /pre/resume/step-00000009.partial")
    folder = bench.folder(command)
    assert bench.run(command, folder, fault=("kill", renamed + 2)).signal == "SIGKILL"
    points = sorted((folder / "pre" / "resume").glob("step-????????"))
    assert points[-1].name == "step-00000009"
    damage(rng.choice(list(points[-1].iterdir())), rng)
    done = bench.run(command, folder)
    assert done.returncode == 0, done.stderr
    assert "is damaged and left out" in done.stderr
    assert bench.differences(command, folder) == []
    scorecard.add("corruptions detected", 1)
