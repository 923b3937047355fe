"""The training loop, the same for every task: steps, schedule, averaging, validation, resume.

Knows no task. What a step does is a function of the seed and the step's number, so that a run
that was killed and resumed ends with the same weights, bit for bit on a CPU.
"""

import contextlib
import itertools
import json
import math
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, cast

import torch
from torch import nn

from wsiseg.errors import TrainingDivergedError
from wsiseg.outputs import fsync_file
from wsiseg.progress import Progress
from wsiseg.settings.training import OptimConfig
from wsiseg.training.board import Show, open_board
from wsiseg.training.data import read_ahead
from wsiseg.training.interrupts import held_back
from wsiseg.training.memory import memory_errors_explained
from wsiseg.training.pieces import Piece, Runner, open_runner
from wsiseg.training.ranks import ALONE, Ranks
from wsiseg.training.resume import TrainState, load_newest, save_state

METRICS_NAME = "metrics.jsonl"

EMA_HEAD_START = 10
"""The average begins as a short one: step k counts at least k / (k + 10) of what was before."""

LOG_EVERY = 10
"""Steps between lines of training metrics."""


class Task(Protocol):
    """What is learned. All randomness of a step follows from its number."""

    metric: str
    """Name of the validation figure that decides."""
    is_higher_better: bool

    @property
    def num_pieces(self) -> int:
        """Network calls of a step."""

    def batch(self, step: int) -> Any:  # noqa: ANN401 - the task's own
        """Read the tiles of a step; called ahead of time in a thread."""

    def pieces(self, batch: Any, step: int) -> Sequence[Piece]:  # noqa: ANN401
        """Return the network calls that make up the step; they do not depend on each other."""

    def names(self, step: int) -> list[str]:
        """Return the tiles of a step, of all processes, for messages."""

    def validate(self, model: nn.Module, runner: Runner) -> dict[str, float]:
        """Return the figures of a model on the same tiles, noise and steps every time."""


@dataclass(frozen=True, slots=True)
class TrainResult:
    """How it ended. `best` : the weights of the best validation (averaged ones)."""

    steps: int
    best_step: int
    best_metric: float | None
    metrics: dict[str, float]
    is_stopped_early: bool
    num_bad_steps: int
    ema: dict[str, torch.Tensor]
    best: dict[str, torch.Tensor]


class Trainer:
    """One run: a model, its optimizer and its averaged weights."""

    def __init__(
        self,
        model: nn.Module,
        task: Task,
        config: OptimConfig,
        *,
        folder: Path,
        device: torch.device,
        progress: Progress,
        ranks: Ranks = ALONE,
    ) -> None:
        self._model = model.to(device=device, memory_format=torch.channels_last)  # type: ignore[call-overload] # not in its stubs
        self._task = task
        self._config = config
        self._folder = folder
        self._device = device
        self._progress = progress
        self._ranks = ranks
        self._optimizer = torch.optim.AdamW(
            self._model.parameters(),
            lr=config.learning_rate,
            betas=(config.betas[0], config.betas[1]),
            weight_decay=config.weight_decay,
            # On a CPU the fused kernel pairs weights and moments by their place in memory, whatever
            # their strides (torch 2.12): wrong for channels-last weights after a resume.
            fused=device.type == "cuda",
        )
        self._ema = {n: t.detach().clone() for n, t in self._model.state_dict().items()}
        self._best = {n: t.clone() for n, t in self._ema.items()}
        self._state = TrainState()
        self._show: Show = lambda line: None

    def run(self, label: str) -> TrainResult:
        """Train to the end, from the newest resume point if there is one.

        Raises
        ------
        TrainingDivergedError
            More than `max_bad_steps` steps had a loss or gradient that is not finite, or the
            weights themselves are not.
        TrainingMemoryError
            There is not enough memory. Nothing is tried with less: that would be another run.
        """
        self._resume()
        config, state = self._config, self._state
        self._progress.start(label, config.steps, unit="steps", done=state.step)
        compiled = cast("nn.Module", torch.compile(self._model) if config.compile else self._model)
        try:
            with (
                open_board(
                    self._folder,
                    is_on=config.tensorboard and self._ranks.is_first,
                    step=state.step,
                ) as self._show,
                open_runner(
                    self._device,
                    amp=config.amp,
                    num_pieces=self._task.num_pieces,
                    is_compiled=config.compile,
                ) as runner,
                memory_errors_explained(self._folder, state),
            ):
                self._take_steps(compiled, runner)
        except KeyboardInterrupt:
            self._save()
            raise
        finally:
            self._progress.finish()
        if not _are_finite(self._ema):
            msg = (
                f"training '{self._folder}': the weights are no longer finite; the last good ones "
                "are kept in resume/; try a lower --learning-rate"
            )
            raise TrainingDivergedError(msg)
        return TrainResult(
            state.step, state.best_step, state.best_metric, dict(state.metrics),
            state.is_stopped_early, state.num_bad_steps, self._ema, self._best,
        )  # fmt: skip

    def _take_steps(self, model: nn.Module, runner: Runner) -> None:
        config, state = self._config, self._state
        if state.step:  # a validation that was interrupted is made up for
            self._after_step(runner)
        began, first = time.perf_counter(), state.step
        for step, batch in read_ahead(self._task.batch, range(state.step, config.steps)):
            if state.is_stopped_early:
                break
            loss, norm = self._differentiate(model, runner, batch, step)
            with held_back():
                self._update(step, loss, norm)
                if state.step % LOG_EVERY == 0 or state.step == config.steps:
                    rate = (state.step - first) / (time.perf_counter() - began)
                    self._log_training(norm, rate)
                    state.losses, began, first = [], time.perf_counter(), state.step
            self._progress.advance(note=f"loss {loss:.4f}")
            self._after_step(runner)

    def _differentiate(
        self,
        model: nn.Module,
        runner: Runner,
        batch: Any,  # noqa: ANN401 - the task's own
        step: int,
    ) -> tuple[float, float]:
        """Give the weights the gradient of a step; return loss, and norm before clipping."""
        model.train()
        gradient = runner.gradient(model, self._task.pieces(batch, step))
        count = torch.tensor(gradient.count, dtype=torch.float64, device=self._device)
        self._ranks.sum([gradient.loss, count])
        self._ranks.sum(gradient.of_parameters)
        num = max(1.0, float(count))
        total = float(gradient.loss) / num
        for parameter, grad in zip(self._model.parameters(), gradient.of_parameters, strict=True):
            parameter.grad = grad.div_(num)
        limit = self._config.grad_clip or math.inf
        return total, float(nn.utils.clip_grad_norm_(self._model.parameters(), limit))

    def _update(self, step: int, loss: float, norm: float) -> None:
        """Move the weights along their gradient, or count a step that cannot be taken."""
        state = self._state
        if math.isfinite(loss) and math.isfinite(norm):
            for group in self._optimizer.param_groups:
                group["lr"] = learning_rate(step, self._config)
            self._optimizer.step()
            self._average(step)
        else:
            self._skip(step, loss)
        state.step = step + 1
        state.losses.append(loss)

    def _skip(self, step: int, loss: float) -> None:
        """Count a step that is left out; the weights stay as they were."""
        state, names = self._state, self._task.names(step)
        state.num_bad_steps += 1
        self._write_line({"step": step + 1, "skipped": names, "loss": str(loss)})
        if state.num_bad_steps > self._config.max_bad_steps:
            self._save()
            msg = (
                f"training '{self._folder}': {state.num_bad_steps} steps had a loss or gradient "
                f"that is not finite, the last one on the tiles {', '.join(names[:8])}; the last "
                "good weights are kept in resume/; try a lower --learning-rate"
            )
            raise TrainingDivergedError(msg)

    @torch.no_grad()
    def _average(self, step: int) -> None:
        decay = min(self._config.ema_decay, (step + 1) / (step + 1 + EMA_HEAD_START))
        for name, tensor in self._model.state_dict().items():
            if tensor.is_floating_point():
                self._ema[name].lerp_(tensor, 1 - decay)
            else:
                self._ema[name].copy_(tensor)

    def _after_step(self, runner: Runner) -> None:
        config, state = self._config, self._state
        is_last = state.step == config.steps
        is_due = state.step % config.validate_every == 0 or is_last
        if is_due and state.validated_step < state.step:
            self._validate(runner)
        if state.step % config.save_every == 0 and not is_last:
            self._save()

    def _validate(self, runner: Runner) -> None:
        """Let the first process judge the averaged weights; all learn whether to stop."""
        state = self._state
        if self._ranks.is_first:
            with self._swapped():
                figures = self._task.validate(self._model.eval(), runner)
            with held_back():
                self._judge(figures)
        state.validated_step = state.step
        state.is_stopped_early = bool(self._ranks.from_first(int(state.is_stopped_early)))

    def _judge(self, figures: dict[str, float]) -> None:
        """Keep the averaged weights if they are the best so far, but never ones with NaN."""
        state = self._state
        state.metrics, state.validated_step = figures, state.step
        self._write_line({"step": state.step, **{f"val_{k}": v for k, v in figures.items()}})
        value = figures.get(self._task.metric, math.nan)
        sign = 1 if self._task.is_higher_better else -1
        is_better = (
            math.isfinite(value)
            and _are_finite(self._ema)
            and (state.best_metric is None or sign * value > sign * state.best_metric)
        )
        if is_better:
            state.best_metric, state.best_step = value, state.step
            state.num_without_gain = 0
        else:
            state.num_without_gain += 1
        if (is_better or state.best_metric is None) and _are_finite(self._ema):
            for name, tensor in self._ema.items():
                self._best[name].copy_(tensor)
        if 0 < self._config.patience <= state.num_without_gain:
            state.is_stopped_early = True

    @contextlib.contextmanager
    def _swapped(self) -> Iterator[None]:
        """Put the averaged weights into the model for a while."""
        own = {n: t.detach().clone() for n, t in self._model.state_dict().items()}
        self._model.load_state_dict(self._ema)
        try:
            yield
        finally:
            self._model.load_state_dict(own)

    def _log_training(self, norm: float, steps_per_s: float) -> None:
        finite = [loss for loss in self._state.losses if math.isfinite(loss)]
        if not finite:
            return
        num_images = self._config.batch_size * self._config.accumulate
        self._write_line(
            {
                "step": self._state.step,
                "loss": sum(finite) / len(finite),
                "learning_rate": learning_rate(self._state.step - 1, self._config),
                "grad_norm": norm if math.isfinite(norm) else None,
                "images_per_s": round(num_images * steps_per_s, 2),
            }
        )

    def _write_line(self, values: Mapping[str, Any]) -> None:
        if not self._ranks.is_first:
            return
        plain = {
            k: None if isinstance(v, float) and not math.isfinite(v) else v
            for k, v in values.items()
        }
        with (self._folder / METRICS_NAME).open("a", encoding="utf-8") as file:
            file.write(json.dumps(plain) + "\n")
        self._show(plain)

    def _save(self) -> None:
        """Write a resume point, unless there is nothing good to go on from."""
        is_good = _are_finite(self._model.state_dict()) and _are_finite(self._ema)
        if not self._ranks.is_first or not is_good:
            return
        tensors = {
            **{f"model.{n}": t for n, t in self._model.state_dict().items()},
            **{f"ema.{n}": t for n, t in self._ema.items()},
            **{f"best.{n}": t for n, t in self._best.items()},
        }
        for number, values in self._optimizer.state_dict()["state"].items():
            tensors |= {f"optimizer.{number}.{n}": torch.as_tensor(t) for n, t in values.items()}
        if (log := self._folder / METRICS_NAME).exists():
            fsync_file(log)  # a resume point never knows more than the log
        save_state(self._folder, self._state, tensors)

    def _resume(self) -> None:
        """Go back to the newest resume point that is whole, or to the beginning."""
        shapes = {n: tuple(t.shape) for n, t in self._model.state_dict().items()}
        found = load_newest(self._folder, shapes)
        if found is not None:
            self._state, tensors = found
            own = _part(tensors, "model.")
            self._model.load_state_dict(own)
            for kept, prefix in ((self._ema, "ema."), (self._best, "best.")):
                for name, tensor in _part(tensors, prefix).items():
                    kept[name].copy_(tensor)
            self._load_optimizer(_part(tensors, "optimizer."))
        self._ranks.check_agree(self._state.step, what="step")
        if self._ranks.is_first:
            _truncate_metrics(self._folder / METRICS_NAME, self._state.step)

    def _load_optimizer(self, tensors: Mapping[str, torch.Tensor]) -> None:
        whole = self._optimizer.state_dict()
        parameters = list(self._model.parameters())
        states: dict[int, dict[str, torch.Tensor]] = {}
        for key, tensor in tensors.items():
            number, name = key.split(".", 1)
            like = parameters[int(number)]
            if tensor.shape == like.shape:  # in the memory layout of its weight
                tensor = torch.empty_like(like).copy_(tensor)  # noqa: PLW2901
            states.setdefault(int(number), {})[name] = tensor
        whole["state"] = states
        self._optimizer.load_state_dict(whole)


def _are_finite(tensors: Mapping[str, torch.Tensor]) -> bool:
    return all(bool(tensor.isfinite().all()) for tensor in tensors.values())


def _part(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {n.removeprefix(prefix): t for n, t in tensors.items() if n.startswith(prefix)}


def learning_rate(step: int, config: OptimConfig) -> float:
    """Return the rate of a step (from 0): linear warm-up, then half a cosine down to 0."""
    warmup = min(config.warmup_steps, config.steps // 2)
    if step < warmup:
        return config.learning_rate * (step + 1) / warmup
    progress = (step - warmup) / max(1, config.steps - warmup)
    return config.learning_rate * (1 + math.cos(math.pi * progress)) / 2


def _truncate_metrics(path: Path, step: int) -> None:
    """Drop the lines after `step`, which will be written again, and a torn last line."""
    if not path.exists():
        return
    lines = path.read_bytes().splitlines(keepends=True)
    kept = itertools.takewhile(lambda line: _is_line_until(line, step), lines)
    os.truncate(path, sum(map(len, kept)))  # never shorter than that, whenever we are killed


def _is_line_until(line: bytes, step: int) -> bool:
    try:
        return bool(line.endswith(b"\n") and json.loads(line)["step"] <= step)
    except (ValueError, KeyError, TypeError):
        return False
