"""The diffusion process against its formulas in float64, its objectives, and DDIM."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from wsiseg.models.diffusion import Diffusion, noise_schedule, p2_weights
from wsiseg.settings.model import DiffusionConfig

SCHEDULES = ("quadratic", "linear", "cosine", "sigmoid")
OBJECTIVES = ("noise", "velocity", "masked", "autoencoding")
NOISED = ("noise", "velocity", "masked")


def process(**values):
    return Diffusion(DiffusionConfig(**values))


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def drawn(num=3, side=8, seed=0):
    """Return clean images in [-1, 1] and noise."""
    random = generator(seed)
    x0 = 2 * torch.rand(num, 3, side, side, generator=random) - 1
    return x0, torch.randn(num, 3, side, side, generator=random)


class Recorder:
    """A network that keeps what it is given and answers with a constant."""

    def __init__(self, answer=0.0):
        self.answer = answer
        self.seen: list[torch.Tensor] = []
        self.times: list[torch.Tensor] = []

    def __call__(self, x, t):
        self.seen.append(x)
        self.times.append(t)
        return torch.full_like(x, self.answer)


# Schedule.


@pytest.mark.parametrize(("schedule", "last"), [("quadratic", 7.3e-4), ("linear", 4.0e-5)])
def test_the_signal_that_is_left_at_the_end_is_the_published_one(schedule, last):
    assert process(schedule=schedule).alphas_cumprod[-1].item() == pytest.approx(last, rel=0.02)


def test_the_quadratic_schedule_is_linear_in_the_root_of_beta():
    betas = noise_schedule("quadratic", 1000).numpy()
    exact = np.linspace(math.sqrt(1e-4), math.sqrt(0.02), 1000) ** 2
    assert np.abs(betas - exact).max() < 1e-16


def test_the_cosine_schedule_follows_its_signal_where_it_is_not_clipped():
    signal = process(schedule="cosine").alphas_cumprod.numpy()
    steps = (np.arange(1001) / 1000 + 0.008) / 1.008
    exact = np.cos(steps * np.pi / 2) ** 2
    assert np.abs(signal[50:950] - exact[51:951] / exact[0]).max() < 0.01


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("timesteps", [2, 10, 1000])
def test_noise_only_grows(schedule, timesteps):
    diffusion = process(schedule=schedule, timesteps=timesteps)
    assert ((diffusion.betas > 0) & (diffusion.betas < 1)).all()
    assert (diffusion.alphas_cumprod.diff() < 0).all()
    assert diffusion.alphas_cumprod[0] < 1
    assert diffusion.noise_T.diff().min() >= 0


def test_a_schedule_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="no noise schedule 'cubic'"):
        noise_schedule("cubic", 10)


def test_tables_are_in_no_state_dict_and_follow_the_device():
    diffusion = process()
    assert diffusion.state_dict() == {}
    assert [*diffusion.parameters()] == []
    assert diffusion.to("meta").signal_T.device.type == "meta"


# Noising.


@settings(max_examples=40, deadline=None)
@given(st.sampled_from(SCHEDULES), st.lists(st.integers(0, 999), min_size=3, max_size=3))
def test_q_sample_is_its_formula_in_float64(schedule, steps):
    diffusion = process(schedule=schedule)
    x0, noise = drawn()
    t = torch.tensor(steps)
    betas = noise_schedule(schedule, 1000).numpy()
    remaining = np.array([np.prod(1.0 - betas[: step + 1]) for step in steps])
    remaining = remaining[:, None, None, None]
    exact = np.sqrt(remaining) * x0.numpy() + np.sqrt(1 - remaining) * noise.numpy()
    assert np.abs(diffusion.q_sample(x0, t, noise).numpy() - exact).max() < 2e-6


def test_the_first_step_is_nearly_clean_and_the_last_nearly_noise():
    x0, noise = drawn()
    first = process().q_sample(x0, torch.zeros(3, dtype=torch.int64), noise)
    last = process().q_sample(x0, torch.full((3,), 999), noise)
    assert (first - x0).abs().max() < 0.05
    assert (last - noise).abs().max() < 0.05


# Weights.


def test_p2_weights_are_one_minus_the_signal_for_k_1_and_gamma_1():
    diffusion = process()
    exact = 1.0 - diffusion.alphas_cumprod
    weights = p2_weights(diffusion.alphas_cumprod, k=1.0, gamma=1.0)
    assert torch.allclose(weights, exact, rtol=1e-12)
    shown = diffusion.loss_weights(torch.tensor([0, 499, 999]))
    assert shown.tolist() == pytest.approx([1e-4, 0.667, 0.9993], rel=1e-3)


@settings(max_examples=40, deadline=None)
@given(st.floats(0.01, 10), st.floats(0, 4), st.sampled_from(SCHEDULES))
def test_p2_weights_are_their_formula_in_the_ratio_of_signal_to_noise(k, gamma, schedule):
    signal = process(schedule=schedule).alphas_cumprod
    exact = 1 / (k + signal / (1 - signal)) ** gamma
    assert torch.allclose(p2_weights(signal, k=k, gamma=gamma), exact, rtol=1e-9)


def test_gamma_0_is_the_plain_loss():
    assert (process(p2_gamma=0.0).weight_T == 1).all()


def test_d8_the_step_of_clean_images_hardly_counts_with_the_released_weights():
    assert process().loss_weights(torch.tensor([0])).item() == pytest.approx(1e-4, rel=1e-4)
    assert process(p2_gamma=0.0).loss_weights(torch.tensor([0])).item() == 1.0


# Objectives.


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_d2_the_loss_of_a_sample_does_not_depend_on_the_batch(objective):
    diffusion = process(objective=objective, mask_size=4)
    x0, noise = drawn(num=4)
    t = torch.tensor([0, 10, 500, 999])
    together = diffusion.loss(Recorder(0.3), x0, t, noise, generator())
    assert together.shape == (4,)
    twice = [torch.cat((v, v)) for v in (x0, t, noise)]
    doubled = diffusion.loss(Recorder(0.3), *twice, generator())
    assert torch.allclose(doubled[:4], together)
    if objective in ("noise", "velocity"):
        alone = diffusion.loss(Recorder(0.3), x0[2:3], t[2:3], noise[2:3])
        assert torch.allclose(alone, together[2:3])


def test_the_loss_of_a_known_error_is_its_weighted_mean_square():
    x0, noise = drawn()
    t = torch.tensor([3, 400, 999])
    loss = process().loss(lambda x, _: noise + 0.5, x0, t, noise)
    assert torch.allclose(loss, 0.25 * process().loss_weights(t))


@pytest.mark.parametrize("objective", NOISED)
def test_a_network_that_knows_the_answer_has_no_loss_and_gives_the_image_back(objective):
    diffusion = process(objective=objective)
    x0, noise = drawn()
    t = torch.tensor([0, 500, 999])
    signal, sigma = (
        table[t][:, None, None, None] for table in (diffusion.signal_T, diffusion.noise_T)
    )
    answer = {"noise": noise, "velocity": signal * noise - sigma * x0, "masked": x0}[objective]
    loss = diffusion.loss(lambda x, _: answer, x0, t, noise, generator())
    assert loss.abs().max() < 1e-10
    x_t = diffusion.q_sample(x0, t, noise)
    assert torch.allclose(diffusion.predict_x0(x_t, t, answer), x0, atol=1e-4)


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 20), st.integers(1, 20), st.integers(1, 7), st.floats(0.01, 0.95),
    st.sampled_from(["masked", "autoencoding"]),
)  # fmt: skip
def test_hidden_patches_are_whole_as_many_in_each_sample_and_all_that_counts(
    height, width, size, ratio, objective
):
    diffusion = process(objective=objective, mask_size=size, mask_ratio=ratio)
    x0 = torch.rand(3, 3, height, width, generator=generator(1)) + 1.0
    noise = torch.randn(3, 3, height, width, generator=generator(2))
    network = Recorder(5.0)
    t = torch.tensor([900, 900, 900])
    loss = diffusion.loss(network, x0, t, noise, generator(3))
    hidden = (network.seen[0] != x0).any(dim=1)
    rows, columns = -(-height // size), -(-width // size)
    num_hidden = max(1, round(ratio * rows * columns))
    for sample in range(3):
        blocks = [
            hidden[sample, y : y + size, x : x + size]
            for y in range(0, height, size)
            for x in range(0, width, size)
        ]
        assert all(block.all() or not block.any() for block in blocks)
        assert sum(bool(block.any()) for block in blocks) == num_hidden
        error = (5.0 - x0[sample]).square().mean(dim=0)[hidden[sample]].mean()
        weight = 1.0 if objective == "autoencoding" else diffusion.loss_weights(t)[sample]
        assert torch.isclose(loss[sample], weight * error, rtol=1e-4)


def test_masked_autoencoding_sees_nothing_of_what_is_hidden_at_step_0():
    diffusion = process(objective="autoencoding", mask_size=4)
    x0, noise = drawn()
    network = Recorder()
    diffusion.loss(network, x0, torch.tensor([1, 2, 3]), noise, generator())
    changed = network.seen[0] != x0
    assert (network.seen[0][changed] == 0).all()
    assert (network.times[0] == 0).all()


@pytest.mark.parametrize("objective", ["masked", "autoencoding"])
def test_masks_repeat_with_their_generator(objective):
    diffusion = process(objective=objective, mask_size=2)
    x0, noise = drawn()
    t = torch.tensor([999, 999, 999])
    seen = []
    for seed in (1, 1, 2):
        network = Recorder()
        diffusion.loss(network, x0, t, noise, generator(seed))
        seen.append(network.seen[0])
    assert torch.equal(seen[0], seen[1])
    assert not torch.equal(seen[0], seen[2])


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_losses_of_extreme_images_are_finite(objective):
    diffusion = process(objective=objective, schedule="cosine")
    t = torch.tensor([0, 999])
    for value in (-1.0, 0.0, 1.0, 1e6):
        x0 = torch.full((2, 3, 16, 16), value)
        loss = diffusion.loss(Recorder(), x0, t, torch.randn(2, 3, 16, 16), generator())
        assert loss.isfinite().all()


# Sampling.


SHAPE = (2, 3, 8, 8)


@pytest.mark.parametrize("objective", OBJECTIVES)
def test_ddim_repeats_with_its_generator_and_stays_in_range(objective):
    diffusion = process(objective=objective)

    def network(x, t):
        return torch.sin(3 * x + t[:, None, None, None] / 100)

    one, again, other = (
        diffusion.ddim_sample(network, SHAPE, 7, generator(seed)) for seed in (4, 4, 5)
    )
    assert one.shape == SHAPE
    assert one.dtype == torch.float32
    assert torch.equal(one, again)
    assert torch.equal(one, other) is (objective == "autoencoding")
    assert one.abs().max() <= 1.0


@pytest.mark.parametrize("objective", NOISED)
@pytest.mark.parametrize("steps", [1, 2, 10, 50])
def test_ddim_with_a_network_that_knows_the_image_gives_that_image(objective, steps):
    diffusion = process(objective=objective)
    x0 = drawn(num=2)[0]

    def network(x, t):
        signal, sigma = (
            table[t][:, None, None, None] for table in (diffusion.signal_T, diffusion.noise_T)
        )
        noise = (x - signal * x0) / sigma
        answers = {"noise": noise, "velocity": signal * noise - sigma * x0, "masked": x0}
        return answers[objective]

    assert torch.allclose(diffusion.ddim_sample(network, SHAPE, steps, generator()), x0, atol=1e-3)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("objective", NOISED)
def test_ddim_of_a_wrong_network_is_finite_though_hardly_any_signal_is_left(schedule, objective):
    diffusion = process(schedule=schedule, objective=objective)
    sample = diffusion.ddim_sample(Recorder(3.0), SHAPE, 20, generator())
    assert sample.isfinite().all()


@pytest.mark.parametrize(("steps", "calls"), [(1, 1), (4, 4), (10, 10), (99, 10)])
def test_ddim_walks_evenly_from_the_last_step_down(steps, calls):
    network = Recorder()
    process(timesteps=10).ddim_sample(network, SHAPE, steps, generator())
    walked = [int(t[0]) for t in network.times]
    assert len(walked) == calls
    assert walked[0] == 9
    assert walked == sorted({*walked}, reverse=True)
    assert calls == 1 or walked[-1] == 0


def test_ddim_leaves_no_graph_behind_and_needs_a_step():
    weight = torch.ones(1, requires_grad=True)
    sample = process().ddim_sample(lambda x, _: x * weight, SHAPE, 2, generator())
    assert not sample.requires_grad
    with pytest.raises(ValueError, match="at least one step"):
        process().ddim_sample(Recorder(), SHAPE, 0, generator())
