"""The diffusion process: schedules, noising, the weighted objectives and DDIM sampling.

Knows no optimiser and no data. Names follow Ho et al. 2020 (arXiv 2006.11239): `x_0`, `x_t`, `t`,
`noise`, `betas`, `alphas_cumprod`. Time steps count from 0 to T - 1.

Shape letters: N batch, C channels, H height, W width, T time steps.
"""

import math
from collections.abc import Callable, Sequence
from typing import NamedTuple

import torch
from torch import nn
from torch.nn import functional

from wsiseg.settings.model import DiffusionConfig

BETA_START = 1e-4
BETA_END = 0.02
"""Ends of the linear, quadratic and sigmoid schedules (Ho et al. 2020, section 4)."""

COSINE_OFFSET = 0.008
COSINE_BETA_RANGE = (1e-4, 0.9999)
"""Nichol and Dhariwal 2021 (arXiv 2102.09672), equation 17; the range as released."""

SIGMOID_REACH = 6.0
"""The sigmoid schedule runs over sigmoid(-6..6), as released."""

Generators = torch.Generator | Sequence[torch.Generator]
"""One generator for all samples, or one for each: then samples do not depend on each other."""

Predictor = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]
"""A network: (x float (N, C, H, W), t int64 (N,)) -> prediction (N, C, H, W)."""


class Task(NamedTuple):
    """What the network is given and asked for in one step of an objective."""

    seen_NCHW: torch.Tensor
    t_N: torch.Tensor
    target_NCHW: torch.Tensor
    weight_N: torch.Tensor
    """Weight of each sample."""
    counted_N1HW: torch.Tensor | None
    """Where the error counts (1) or not (0); None is everywhere."""


def noise_schedule(name: str, timesteps: int) -> torch.Tensor:
    """Return the betas of a schedule, float64 (T,).

    `quadratic` is linear in sqrt(beta), which is what the released model was trained with.
    """
    if name == "linear":
        return torch.linspace(BETA_START, BETA_END, timesteps, dtype=torch.float64)
    if name == "quadratic":
        ends = (math.sqrt(BETA_START), math.sqrt(BETA_END))
        return torch.linspace(*ends, timesteps, dtype=torch.float64) ** 2
    if name == "sigmoid":
        ramp = torch.linspace(-SIGMOID_REACH, SIGMOID_REACH, timesteps, dtype=torch.float64)
        return torch.sigmoid(ramp) * (BETA_END - BETA_START) + BETA_START
    if name == "cosine":
        progress = torch.linspace(0.0, 1.0, timesteps + 1, dtype=torch.float64)
        signal = torch.cos((progress + COSINE_OFFSET) / (1 + COSINE_OFFSET) * math.pi / 2) ** 2
        return (1 - signal[1:] / signal[:-1]).clamp(*COSINE_BETA_RANGE)
    msg = f"no noise schedule {name!r}"
    raise ValueError(msg)


class Diffusion(nn.Module):
    """The forward process q(x_t | x_0), a training objective on it, and its sampler.

    Holds float32 tables, computed in float64, that follow `.to(device)`; no parameters and
    nothing in its state dict.

    Attributes
    ----------
    betas, alphas_cumprod : torch.Tensor
        float64 (T,), on the CPU: the exact schedule.
    """

    signal_T: torch.Tensor
    noise_T: torch.Tensor
    weight_T: torch.Tensor

    def __init__(self, config: DiffusionConfig) -> None:
        super().__init__()
        self.config = config
        self.betas = noise_schedule(config.schedule, config.timesteps)
        self.alphas_cumprod = torch.cumprod(1.0 - self.betas, dim=0)
        tables = {
            "signal_T": self.alphas_cumprod.sqrt(),
            "noise_T": (1.0 - self.alphas_cumprod).sqrt(),
            "weight_T": p2_weights(self.alphas_cumprod, k=config.p2_k, gamma=config.p2_gamma),
        }
        for name, table in tables.items():
            self.register_buffer(name, table.to(torch.float32), persistent=False)

    def q_sample(self, x0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Return x_t = sqrt(abar_t) x_0 + sqrt(1 - abar_t) noise (Ho et al. 2020, equation 4).

        Parameters
        ----------
        x0
            float (N, C, H, W) in [-1, 1].
        t
            int64 (N,) in 0..T-1.
        noise
            Standard normal, like `x0`: the noise in the result.
        """
        return _per_sample(self.signal_T, t) * x0 + _per_sample(self.noise_T, t) * noise

    def loss_weights(self, t: torch.Tensor) -> torch.Tensor:
        """Return the P2 weight of each time step, float32 (N,); see `p2_weights`."""
        return self.weight_T[t]

    def loss(
        self,
        model: Predictor,
        x0: torch.Tensor,
        t: torch.Tensor,
        noise: torch.Tensor,
        mask_generator: Generators | None = None,
    ) -> torch.Tensor:
        """Return the weighted mean squared error of each sample, float32 (N,).

        A mean over pixels, one value per sample: averaging it makes the loss and the step size
        independent of the batch size (defect D2: the released code sums over the batch).

        Parameters
        ----------
        model, x0, t, noise
            As for `q_sample`.
        mask_generator
            Draws the hidden patches of the masked objectives; the others do not use it.
        """
        task = self._task(x0, t, noise, mask_generator)
        prediction = model(task.seen_NCHW, task.t_N).float()
        error = (prediction - task.target_NCHW).square().mean(dim=1, keepdim=True)
        if task.counted_N1HW is None:
            mean_N = error.mean(dim=(1, 2, 3))
        else:
            hidden_N = task.counted_N1HW.sum(dim=(1, 2, 3)).clamp(min=1)
            mean_N = (error * task.counted_N1HW).sum(dim=(1, 2, 3)) / hidden_N
        return task.weight_N * mean_N

    def _task(
        self, x0: torch.Tensor, t: torch.Tensor, noise: torch.Tensor, masks: Generators | None
    ) -> Task:
        """Lay out one step of the configured objective."""
        objective = self.config.objective
        if objective == "autoencoding":
            hidden = self._hidden_patches(x0, masks)
            still = torch.zeros_like(t)
            return Task(x0 * (1 - hidden), still, x0, torch.ones_like(self.weight_T[t]), hidden)
        x_t, weight_N = self.q_sample(x0, t, noise), self.loss_weights(t)
        if objective == "masked":
            hidden = self._hidden_patches(x0, masks)
            return Task(torch.where(hidden > 0, x_t, x0), t, x0, weight_N, hidden)
        if objective == "velocity":
            # Salimans and Ho 2022 (arXiv 2202.00512), section 4: v = alpha noise - sigma x_0.
            velocity = _per_sample(self.signal_T, t) * noise - _per_sample(self.noise_T, t) * x0
            return Task(x_t, t, velocity, weight_N, None)
        return Task(x_t, t, noise, weight_N, None)

    def _hidden_patches(self, x0: torch.Tensor, generator: Generators | None) -> torch.Tensor:
        """Return float (N, 1, H, W): 1 in the patches hidden from the network.

        The same number in every sample, `mask_ratio` of them rounded, at least one.
        """
        num, _, height, width = x0.shape
        size = self.config.mask_size
        rows, columns = math.ceil(height / size), math.ceil(width / size)
        num_hidden = max(1, round(self.config.mask_ratio * rows * columns))
        scores = _random(num, rows * columns, generator)
        chosen = torch.zeros_like(scores)
        chosen.scatter_(1, scores.argsort(dim=1, stable=True)[:, :num_hidden], 1.0)
        grid = chosen.view(num, 1, rows, columns).to(x0)
        mask = functional.interpolate(grid, scale_factor=float(size), mode="nearest")
        return mask[:, :, :height, :width]

    @torch.no_grad()
    def ddim_sample(
        self,
        model: Predictor,
        shape: tuple[int, int, int, int],
        steps: int,
        generator: torch.Generator,
    ) -> torch.Tensor:
        """Draw images by deterministic DDIM (Song et al. 2021, arXiv 2010.02502, equation 12).

        Parameters
        ----------
        model
            The network that was trained with this objective, in eval mode.
        shape
            (N, C, H, W).
        steps
            Network calls; evenly spaced time steps from T-1 down to 0.
        generator
            Draws the starting noise: the only randomness.

        Returns
        -------
        torch.Tensor
            float32 (N, C, H, W) in [-1, 1]. With the autoencoding objective, which has no
            sampler, what the network makes of a wholly hidden image.
        """
        device = self.signal_T.device
        if self.config.objective == "autoencoding":
            t = torch.zeros(shape[0], dtype=torch.int64, device=device)
            return model(torch.zeros(shape, device=device), t).float().clamp(-1.0, 1.0)
        if steps < 1:
            msg = f"DDIM needs at least one step, got {steps}"
            raise ValueError(msg)
        last = self.config.timesteps - 1
        times = torch.linspace(last, 0, min(steps, last + 1)).round().to(torch.int64).tolist()
        x_t = torch.randn(shape, generator=generator, device=generator.device).to(device)
        x_0 = x_t
        for i, now in enumerate(times):
            t = torch.full((shape[0],), now, dtype=torch.int64, device=device)
            x_0 = self.predict_x0(x_t, t, model(x_t, t).float()).clamp(-1.0, 1.0)
            if i + 1 < len(times):
                direction = (x_t - self.signal_T[now] * x_0) / self.noise_T[now]
                following = times[i + 1]
                x_t = self.signal_T[following] * x_0 + self.noise_T[following] * direction
        return x_0

    def predict_x0(
        self, x_t: torch.Tensor, t: torch.Tensor, prediction: torch.Tensor
    ) -> torch.Tensor:
        """Return the clean image that a prediction of this objective stands for."""
        signal, noise = _per_sample(self.signal_T, t), _per_sample(self.noise_T, t)
        if self.config.objective == "noise":
            return (x_t - noise * prediction) / signal
        if self.config.objective == "velocity":
            return signal * x_t - noise * prediction
        return prediction


def p2_weights(alphas_cumprod: torch.Tensor, *, k: float, gamma: float) -> torch.Tensor:
    """Return 1 / (k + SNR_t)^gamma with SNR = abar / (1 - abar), dtype of the input.

    P2 weighting (Choi et al. 2022, arXiv 2204.00227, equation 7). With k = 1, gamma = 1 it is
    1 - abar_t. Note the weight of t = 0, the step that segmentation uses: 1e-4 (defect D8).
    """
    # (1 - abar) / (k (1 - abar) + abar) is the same and exact where 1 - abar is small.
    remainder = 1.0 - alphas_cumprod
    return (remainder / (k * remainder + alphas_cumprod)) ** gamma


def _random(num: int, width: int, generators: Generators | None) -> torch.Tensor:
    """Draw float32 (num, width) in [0, 1)."""
    if generators is None or isinstance(generators, torch.Generator):
        device = generators.device if generators is not None else None
        return torch.rand(num, width, generator=generators, device=device)
    rows = [torch.rand(width, generator=g, device=g.device) for g in generators]
    return torch.stack(rows)


def _per_sample(table_T: torch.Tensor, t_N: torch.Tensor) -> torch.Tensor:
    return table_T[t_N][:, None, None, None]
