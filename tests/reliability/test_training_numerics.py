"""T2 to T4: settings drawn at random, numbers that are not finite, no memory, no bfloat16."""

import dataclasses
import json
import math
import shutil
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from tests.stores_on_disk import write_tiles
from tests.training.tiny_runs import (
    CPU,
    KINDS,
    SHORT,
    Poisoned,
    lines,
    stop_after_every_step,
    trainer,
)
from wsiseg.errors import TrainingDivergedError
from wsiseg.inference import engine
from wsiseg.models import device
from wsiseg.settings.model import DiffusionConfig
from wsiseg.training import pieces, resume

VALUES = (math.nan, math.inf, -math.inf)
TINY = ("--preset", "tiny", "--set", "model.dim=8", "--set", "model.mults=[1, 2]",
        "--set", "model.groups=4", "--set", "model.attention=none",
        "--set", "optim.ema_decay=0.9", "--batch-size", 2, "--steps", 4, "--save-every", 1,
        "--json")  # fmt: skip


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_tiles(tmp_path_factory.mktemp("store") / "s.zarr", num=10, size=16)


def test_a_run_of_any_settings_resumed_at_every_step_ends_with_the_same_bits(
    store, tmp_path, monkeypatch, figure, seed
):
    monkeypatch.setattr(resume, "KEPT", 100)
    rng = np.random.default_rng(seed)
    for _ in range(figure(pr=6, night=100)):
        optim = dataclasses.replace(
            SHORT,
            steps=int(rng.integers(2, 10)),
            batch_size=int(rng.integers(1, 5)),
            accumulate=int(rng.integers(1, 3)),
            warmup_steps=int(rng.integers(0, 5)),
            validate_every=int(rng.integers(1, 6)),
            patience=int(rng.integers(0, 3)),
            ema_decay=float(rng.choice([0.0, 0.5, 0.999])),
            grad_clip=float(rng.choice([0.0, 0.1])),
        )
        kind = str(rng.choice([*KINDS]))
        options: dict[str, Any] = {"seed": int(rng.integers(1000))}
        if kind == "pretrain":
            objective = str(rng.choice(["noise", "velocity", "masked", "autoencoding"]))
            options["diffusion"] = DiffusionConfig(objective=objective, mask_size=4)
        print(kind, options, optim)  # noqa: T201 - pytest shows it with a failure
        stop_after_every_step(kind, store, tmp_path / "runs", optim, **options)
        shutil.rmtree(tmp_path / "runs")


def spoil_weights(run, task, value, rng):
    """Put a value into a weight, an averaged one or both, behind the back of a validation."""
    inner, at = task.validate, int(rng.integers(2))
    calls: list[int] = []

    def validate(network, runner):
        figures = inner(network, runner)
        if len(calls) == at:
            targets = [*run._ema.values()], [*run._model.parameters()]
            with torch.no_grad():
                for tensors in (targets[:1], targets[1:], targets)[rng.integers(3)]:
                    tensor = tensors[int(rng.integers(len(tensors)))]
                    tensor[tuple(map(int, rng.integers(tensor.shape)))] = value
        calls.append(1)
        return figures

    task.validate = validate


def refuse_constant(text):
    raise AssertionError(text)


def test_whatever_is_not_finite_is_counted_and_never_kept(store, tmp_path, figure, seed):
    """In a loss, a gradient, a weight or a figure of validation, at any steps."""
    rng = np.random.default_rng(seed)
    for _ in range(figure(pr=100, night=1_000)):
        kind, value = str(rng.choice([*KINDS])), float(rng.choice(VALUES))
        where = str(rng.choice(["loss", "slope", "weights", "figure"]))
        bad = {*map(int, rng.choice(4, rng.integers(5), replace=False))} if "s" in where else set()
        limit = int(rng.integers(4))
        print(kind, value, where, bad, limit)  # noqa: T201 - pytest shows it with a failure
        optim = dataclasses.replace(
            SHORT, steps=4, batch_size=1, validate_every=2, max_bad_steps=limit
        )
        model, task = KINDS[kind](store, optim)
        if where in ("loss", "slope"):
            task = Poisoned(task, bad, value, where)
        run = trainer(tmp_path / "run", model, task, optim)
        if where == "weights":
            spoil_weights(run, task, value, rng)
        if where == "figure":
            task.validate = lambda network, runner, t=task, v=value: {t.metric: v}
        try:
            result = run.run(kind)
        except TrainingDivergedError:
            assert where == "weights" or len(bad) > limit
        else:
            assert where == "weights" or result.num_bad_steps == len(bad) <= limit
            assert all(tensor.isfinite().all() for tensor in result.ema.values())
            assert result.best_metric is None or math.isfinite(result.best_metric)
        if where in ("loss", "slope"):
            skipped = [line["step"] - 1 for line in lines(tmp_path / "run") if "skipped" in line]
            assert skipped == sorted(bad)[: limit + 1]
        assert all(tensor.isfinite().all() for tensor in run._best.values())
        for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines():
            json.loads(line, parse_constant=refuse_constant)
        for point in (tmp_path / "run").glob("resume/*/state.safetensors"):
            tensors = safetensors.torch.load(point.read_bytes())
            assert all(tensor.isfinite().all() for tensor in tensors.values())
        shutil.rmtree(tmp_path / "run")


OUT_OF_MEMORY = [
    torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.\nGPU 0 has 1.00 GiB."),
    RuntimeError(
        "[enforce fail at alloc_cpu.cpp:127] . DefaultCPUAllocator: can't allocate memory"
    ),
    MemoryError(),
]


@pytest.mark.parametrize("error", OUT_OF_MEMORY, ids=["cuda", "cpu", "python"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_without_memory_is_one_line_and_goes_on_where_there_is_more(
    wsiseg_here, store, tmp_path, monkeypatch, kind, error
):
    command = (kind, store, *TINY, *(["--from-scratch"] if kind == "finetune" else []))
    undisturbed = wsiseg_here(*command, "-o", tmp_path / "whole")
    assert undisturbed.returncode == 0, undisturbed.stderr
    real, calls = pieces.Runner.gradient, []

    def gradient(runner, model, work):
        calls.append(1)
        if len(calls) == 3:
            raise error
        return real(runner, model, work)

    monkeypatch.setattr(pieces.Runner, "gradient", gradient)
    done = wsiseg_here(*command, "-o", tmp_path / "run")
    assert done.returncode == 1
    (line,) = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
    assert line.startswith(f"error: training '{tmp_path}/run': out of memory after 2 steps (")
    assert "--set optim.accumulate=2" in done.stderr
    assert not (tmp_path / "run" / "model.json").exists()
    again = wsiseg_here(*command, "-o", tmp_path / "run")
    assert again.returncode == 0, again.stderr
    weights = [(tmp_path / n / "weights.safetensors").read_bytes() for n in ("run", "whole")]
    assert weights[0] == weights[1]


def test_half_the_batch_summed_twice_is_what_the_error_promises(wsiseg_here, store, tmp_path):
    found = []
    for name, changes in (("whole", ()), ("less", ("--batch-size", 1, "--set",
                                                  "optim.accumulate=2"))):  # fmt: skip
        done = wsiseg_here("pretrain", store, *TINY, *changes, "-o", tmp_path / name)
        assert done.returncode == 0, done.stderr
        found.append(safetensors.torch.load_file(tmp_path / name / "weights.safetensors"))
    for name, tensor in found[0].items():
        assert torch.allclose(tensor, found[1][name], rtol=1e-3, atol=1e-4), name


def test_a_want_of_memory_anywhere_else_is_one_line(wsiseg_here, store, tmp_path, monkeypatch):
    def split(*args, **options):
        raise OUT_OF_MEMORY[0]

    monkeypatch.setattr("wsiseg.stages.pretrain.split_tiles", split)
    done = wsiseg_here("pretrain", store, *TINY, "-o", tmp_path / "run")
    assert done.returncode == 1
    assert done.stderr == (
        "error: out of memory (CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has 1.00 "
        "GiB.); use a larger machine\n"
    )


@pytest.mark.parametrize("amp", [False, True])
@pytest.mark.parametrize("is_supported", [False, True])
def test_without_bfloat16_everything_is_computed_in_float32(monkeypatch, amp, is_supported):
    monkeypatch.setattr(pieces, "has_fast_bf16", lambda device: is_supported)
    with pieces.open_runner(CPU, amp=amp, num_pieces=2, is_compiled=False) as runner:
        (found,) = runner.map(lambda x: (x @ x).dtype, [torch.ones(2, 2)])
    assert found == (torch.bfloat16 if amp and is_supported else torch.float32)
    monkeypatch.setattr(engine, "has_fast_bf16", lambda device: is_supported)
    model = torch.nn.Conv2d(3, 2, 1)
    work = engine.Engine(model, CPU, batch_size=1, num_readers=1, amp=amp)
    seen: list[torch.dtype] = []
    model.register_forward_hook(lambda module, inputs, output: seen.append(output.dtype))
    work._predict(np.zeros((1, 8, 8, 3), np.uint8))
    assert seen == [found]


def test_a_gpu_that_only_imitates_bfloat16_does_not_use_it(monkeypatch):
    asked: list[bool] = []

    def is_supported(*, including_emulation):
        asked.append(including_emulation)
        return False

    monkeypatch.setattr(torch.cuda, "is_bf16_supported", is_supported)
    assert not device.has_fast_bf16(torch.device("cuda"))
    assert not device.has_fast_bf16(torch.device("mps"))
    assert asked == [False]
