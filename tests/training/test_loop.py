"""The loop: schedule, averaging, bad steps, early stopping; equal by other ways of computing."""

import dataclasses
import math
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch
from torch import nn

from tests.stores_on_disk import write_tiles
from tests.training.tiny_runs import (
    KINDS,
    SHORT,
    TINY,
    Poisoned,
    assert_same_weights,
    denoiser,
    lines,
    newest_state,
    segmenter,
    train,
    trainer,
)
from wsiseg.errors import TrainingDivergedError
from wsiseg.progress import SilentProgress
from wsiseg.settings.model import DiffusionConfig
from wsiseg.settings.training import AugmentConfig
from wsiseg.training.loop import learning_rate
from wsiseg.training.pieces import Gradient, add_in_tree

REPOSITORY = Path(__file__).resolve().parents[2]
CAN_COMPILE = (
    shutil.which("c++") is not None and Path(sysconfig.get_path("include"), "Python.h").is_file()
)


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    return write_tiles(tmp_path_factory.mktemp("store") / "s.zarr", num=10, size=16)


def with_options(**options):
    return dataclasses.replace(SHORT, **options)


class StopAfter(SilentProgress):
    """Presses Ctrl-C after some steps."""

    def __init__(self, num):
        self._left = num

    def advance(self, count=1, *, note=""):
        self._left -= count
        if self._left == 0:
            raise KeyboardInterrupt


@pytest.mark.parametrize(("value", "where"), [(math.nan, "loss"), (math.inf, "loss"), (0, "slope")])
def test_a_step_that_is_not_finite_is_left_out_and_counted(store, tmp_path, value, where):
    model, task = denoiser(store)
    result = trainer(tmp_path, model, Poisoned(task, {2, 5}, value, where)).run("")
    assert (result.num_bad_steps, result.steps) == (2, SHORT.steps)
    assert all(tensor.isfinite().all() for tensor in result.ema.values())
    skipped = [line for line in lines(tmp_path) if "skipped" in line]
    assert [line["step"] for line in skipped] == [3, 6]
    assert all(len(line["skipped"]) == 4 for line in skipped)
    assert all(name.startswith("s1[") for name in skipped[0]["skipped"])


def test_a_skipped_step_leaves_weights_average_and_moments_as_they_were(store, tmp_path):
    states = []
    for steps in (1, 2):
        model, task = denoiser(store, with_options(steps=3))
        folder = tmp_path / str(steps)
        run = trainer(folder, model, Poisoned(task, {1, 2}), with_options(steps=3))
        run.run("")
        states.append(newest_state(folder, step=steps)[1])
    assert_same_weights(*states)


def test_after_ten_bad_steps_the_run_stops_with_its_last_good_weights_and_the_tiles(
    store, tmp_path
):
    optim = with_options(steps=30, save_every=5)
    model, task = denoiser(store, optim)
    with pytest.raises(TrainingDivergedError, match=r"11 steps .*not finite.*s1\[\d\].*resume/"):
        trainer(tmp_path, model, Poisoned(task, set(range(6, 99))), optim).run("")
    content, tensors = newest_state(tmp_path)
    assert content["num_bad_steps"] == 11
    model, task = denoiser(store, optim)
    with pytest.raises(KeyboardInterrupt):
        trainer(tmp_path / "good", model, task, optim, progress=StopAfter(6)).run("")
    _, expected = newest_state(tmp_path / "good", step=6)
    names = [name for name in tensors if not name.startswith("best.")]
    assert_same_weights({n: tensors[n] for n in names}, {n: expected[n] for n in names})


@pytest.mark.parametrize("kind", KINDS)
def test_weights_that_are_not_finite_are_never_kept_as_best_or_to_go_on_from(store, tmp_path, kind):
    """Spoiled behind the loop's back, which a broken kernel or memory could do."""
    model, task = KINDS[kind](store)
    run = trainer(tmp_path, model, task)
    inner = task.validate
    calls: list[int] = []

    def validate(network, runner):
        figures = inner(network, runner)
        if calls:
            with torch.no_grad():
                for tensor in (*run._ema.values(), *run._model.parameters()):
                    tensor.fill_(math.nan)
        calls.append(1)
        return figures

    task.validate = validate
    with pytest.raises(TrainingDivergedError):
        run.run("")
    assert all(tensor.isfinite().all() for tensor in run._best.values())
    _, tensors = newest_state(tmp_path)
    assert all(tensor.isfinite().all() for tensor in tensors.values())


def test_d25_early_stopping_stops(store, tmp_path):
    optim = with_options(steps=40, validate_every=2, patience=2)
    model, task = denoiser(store, optim)
    figures = iter([1.0, 0.5, 0.7, 0.6, 0.1])
    task.validate = lambda network, runner: {"loss": next(figures)}
    result = trainer(tmp_path, model, task, optim).run("")
    assert result.is_stopped_early
    assert (result.steps, result.best_step, result.best_metric) == (8, 4, 0.5)


def test_the_average_follows_its_recurrence(store, tmp_path):
    optim = with_options(steps=6, ema_decay=0.7, validate_every=100)
    train("pretrain", store, tmp_path, optim)
    model, _ = denoiser(store, optim)
    from wsiseg.training import resume

    assert resume.KEPT == 2
    first, second = newest_state(tmp_path, step=4)[1], newest_state(tmp_path, step=5)[1]
    for name in model.state_dict():
        decay = min(0.7, 5 / 15)
        expected = decay * first[f"ema.{name}"] + (1 - decay) * second[f"model.{name}"]
        assert torch.allclose(second[f"ema.{name}"], expected, atol=1e-6)


def test_the_rate_warms_up_linearly_and_falls_as_half_a_cosine():
    optim = with_options(steps=100, warmup_steps=10, learning_rate=2.0)
    rates = [learning_rate(step, optim) for step in range(100)]
    assert rates[:10] == pytest.approx([0.2 * (i + 1) for i in range(10)])
    assert rates[10] == pytest.approx(2.0)
    assert rates[55] == pytest.approx(1.0)
    assert rates[99] < 0.01
    assert rates[10:] == sorted(rates[10:], reverse=True)


@pytest.mark.parametrize("kind", KINDS)
def test_accumulated_batches_are_one_large_batch(store, tmp_path, kind):
    gradients = []
    for batch_size, accumulate in ((8, 1), (2, 4), (1, 8)):
        optim = with_options(steps=1, batch_size=batch_size, accumulate=accumulate, grad_clip=0.0)
        model, task = KINDS[kind](store, optim)
        trainer(tmp_path / str(batch_size), model, task, optim).run("")
        gradients.append([p.grad for p in model.parameters()])
    for other in gradients[1:]:
        for one, two in zip(gradients[0], other, strict=True):
            assert torch.allclose(one, two, rtol=1e-3, atol=1e-6)


def test_activation_checkpointing_gives_the_same_gradients(store, tmp_path):
    results = [
        train("pretrain", store, tmp_path / str(on), config=dataclasses.replace(
            TINY, activation_checkpointing=on))
        for on in (False, True)
    ]  # fmt: skip
    assert_same_weights(results[0].ema, results[1].ema)


@pytest.mark.slow
@pytest.mark.skipif(not CAN_COMPILE, reason="torch.compile needs c++ and the headers of Python")
def test_a_compiled_network_learns_the_same(store, tmp_path):
    """In a process of its own: what the compiler logs and warns of would slow this one down."""
    code = (
        "import dataclasses, pathlib, sys\n"
        "from tests.training.tiny_runs import SHORT, train\n"
        "options = dataclasses.replace(SHORT, steps=3, compile=True)\n"
        "train('pretrain', *map(pathlib.Path, sys.argv[1:]), options)\n"
    )
    command = [sys.executable, "-c", code, store, tmp_path / "compiled"]
    subprocess.run(command, check=True, capture_output=True, timeout=280, cwd=REPOSITORY)
    train("pretrain", store, tmp_path / "plain", with_options(steps=3))
    compiled, plain = (lines(tmp_path / name) for name in ("compiled", "plain"))
    assert len(plain) > 0
    for one, other in zip(compiled, plain, strict=True):
        assert one == pytest.approx(other, rel=1e-3)


def test_a_gradient_is_clipped_to_the_norm_that_is_set(store, tmp_path):
    model, task = denoiser(store, with_options(grad_clip=1e-6))
    run = trainer(tmp_path, model, task, with_options(grad_clip=1e-6, steps=1))
    run.run("")
    norm = math.sqrt(sum(float(p.grad.square().sum()) for p in model.parameters()))
    assert norm == pytest.approx(1e-6, rel=1e-3)


@pytest.mark.parametrize("objective", ["noise", "velocity", "masked", "autoencoding"])
def test_a_batch_can_be_overfitted_by_every_objective(store, tmp_path, objective):
    optim = with_options(steps=60, learning_rate=5e-3, validate_every=60, save_every=60)
    off = AugmentConfig(
        flip=False, stain_sigma=0.0, blur_probability=0.0, brightness=0.0, contrast=0.0
    )
    diffusion = DiffusionConfig(objective=objective, mask_size=4, p2_gamma=0.0)
    train("pretrain", store, tmp_path, optim, diffusion=diffusion, augment=off)
    losses = [line["loss"] for line in lines(tmp_path) if "loss" in line]
    assert losses[-1] < 0.9 * losses[0]


def test_a_labelled_batch_can_be_overfitted(tmp_path):
    store = write_tiles(tmp_path / "s.zarr", num=4, size=16)
    optim = with_options(steps=60, learning_rate=5e-3, validate_every=60, save_every=60)
    model, task = segmenter(store, optim, num=4)
    trainer(tmp_path, model, task, optim).run("")
    losses = [line["loss"] for line in lines(tmp_path) if "loss" in line]
    assert losses[-1] < losses[0]


def gradient(value):
    tensor = torch.tensor(float(value), dtype=torch.float64)
    return Gradient(tensor.clone(), 1.0, [torch.tensor([float(value)])])


@pytest.mark.parametrize("num", range(1, 18))
def test_pieces_are_added_whatever_their_number(num):
    total = add_in_tree(gradient(i) for i in range(num))
    assert float(total.loss) == sum(range(num))
    assert float(total.of_parameters[0]) == sum(range(num))
    assert total.count == num


def test_halves_of_a_step_add_up_to_the_bits_of_the_whole():
    values = torch.randn(16, generator=torch.Generator().manual_seed(0)).tolist()
    whole = add_in_tree(gradient(v) for v in values)
    left, right = (add_in_tree(gradient(v) for v in values[i : i + 8]) for i in (0, 8))
    left.add(right)
    assert torch.equal(left.of_parameters[0], whole.of_parameters[0])


def test_the_fast_group_norm_is_group_norm():
    from wsiseg.models.unet import GroupNorm

    own, plain = GroupNorm(4, 16), nn.GroupNorm(4, 16)
    generator = torch.Generator().manual_seed(1)
    for parameter in own.parameters():
        nn.init.normal_(parameter, generator=generator)
    plain.load_state_dict(own.state_dict())
    x = torch.randn(2, 9, 7, 16, generator=generator).permute(0, 3, 1, 2).requires_grad_()
    slope = torch.randn(2, 16, 9, 7, generator=generator)
    found = torch.autograd.grad(own(x), [x, *own.parameters()], slope)
    exact = torch.autograd.grad(plain(x), [x, *plain.parameters()], slope)
    assert torch.equal(own(x), plain(x))
    for one, other in zip(found, exact, strict=True):
        assert torch.allclose(one, other, atol=1e-5)
