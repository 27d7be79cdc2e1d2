"""Schedules against reference tables, and which time steps a sampler may visit."""

import json
import pathlib

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from nanodiff.diffusion import Schedule, process, samplers
from nanodiff.rng import time_steps

GOLDEN = pathlib.Path(__file__).parents[1] / "golden"
MAKE = {"linear": Schedule.linear, "scaled_linear": Schedule.scaled_linear, "squaredcos_cap_v2": Schedule.cosine}


def test_every_table_equals_the_reference_within_1e_12():
    tables = load_file(GOLDEN / "schedules.safetensors")
    assert len(tables) == 3 * 2 * 2 * 7
    for key, expected in tables.items():
        kind, T, zero_snr, name = key.split("|")
        schedule = MAKE[kind](int(T))
        if zero_snr == "True":
            schedule = schedule.zero_terminal_snr()
        if name == "sigma":
            table = ((1 - schedule.alpha_bar) / schedule.alpha_bar).sqrt()
        else:
            table = getattr(schedule, name)
        assert table.dtype == torch.float64 and table.shape == (int(T),)
        rows = torch.arange(50) if T == "50" else torch.cat([torch.arange(0, 1000, 37), torch.tensor([999])])
        torch.testing.assert_close(table[rows], expected, rtol=1e-12 if name in ("sigma", "snr") else 0, atol=1e-12)


def test_the_first_step_has_an_exact_posterior():
    for make in MAKE.values():
        schedule = make(50)
        assert schedule.posterior_variance[0] == 0 and schedule.posterior_mean_xt[0] == 0
        assert abs(float(schedule.posterior_mean_x0[0]) - 1) < 1e-12


@pytest.mark.parametrize("factor", [0.5, 1.0, 4.0])
def test_shifted_multiplies_the_noise_beside_the_signal_and_nothing_else(factor):
    for make in (Schedule.linear, Schedule.scaled_linear, Schedule.cosine):
        plain, moved = make(1000), make(1000).shifted(factor)
        assert torch.allclose(moved.snr * factor**2, plain.snr, rtol=1e-9, atol=0)
        back = moved.shifted(1 / factor)
        assert torch.allclose(back.beta, plain.beta, rtol=1e-9, atol=1e-14)
    with pytest.raises(ValueError, match="above 0"):
        Schedule.linear().shifted(0)


def test_zero_terminal_snr_keeps_the_first_step_and_ends_in_pure_noise():
    for make in MAKE.values():
        before, after = make(1000), make(1000).zero_terminal_snr()
        assert float(after.alpha_bar[-1]) == 0 and after.ends_in_pure_noise and not before.ends_in_pure_noise
        assert abs(float(after.alpha_bar[0] - before.alpha_bar[0])) < 1e-15
        assert torch.isfinite(after.posterior_variance).all() and torch.isfinite(after.posterior_mean_x0).all()


def test_loss_weights_come_from_the_rescaled_betas():
    plain = Schedule.scaled_linear()
    zero = plain.zero_terminal_snr()
    t = torch.tensor([500, 999])
    alpha_bar = zero.alpha_bar[t]
    snr = alpha_bar / (1 - alpha_bar)
    expected = (snr.clamp(max=5) / (snr + 1)).float()
    torch.testing.assert_close(process.loss_weight(zero, "v", t, gamma=5), expected)
    assert float(process.loss_weight(zero, "v", t, gamma=5)[1]) == 0
    assert float(process.loss_weight(plain, "v", t, gamma=5)[1]) > 0


def test_from_betas_keeps_the_betas_and_refuses_what_is_none():
    beta = [0.1, 0.2, 1.0]
    schedule = Schedule.from_betas(np.array(beta))
    torch.testing.assert_close(schedule.alpha_bar, torch.tensor([0.9, 0.72, 0.0], dtype=torch.float64))
    for wrong in ([], [0.0, 0.1], [0.1, 1.1], [[0.1]], [float("nan")]):
        with pytest.raises(ValueError):
            Schedule.from_betas(wrong)


def test_from_betas_copies_its_input():
    beta = torch.full((4,), 0.1, dtype=torch.float64)
    schedule = Schedule.from_betas(beta)
    beta.zero_()
    assert float(schedule.beta[0]) == 0.1


@pytest.mark.parametrize("T", [1, 7, 50, 1000])
@pytest.mark.parametrize("spacing,offset", [("leading", 0), ("leading", 1), ("trailing", 0), ("linspace", 0)])
def test_n_steps_are_n_strictly_falling_steps_within_the_table(T, spacing, offset):
    schedule = Schedule.linear(T)
    for n in range(1, T + 1):
        t = schedule.timesteps(n, spacing, offset)
        assert t.dtype == torch.int64 and len(t) == n
        assert (t.diff() < 0).all() and t[0] <= T - 1 and t[-1] >= 0
    assert t.tolist() == list(range(T))[::-1]  # n = T: the whole chain


@pytest.mark.parametrize("n", [3, 5, 21, 50])
def test_trailing_and_linspace_start_at_the_last_step_and_leading_does_not(n):
    schedule = Schedule.scaled_linear()
    assert schedule.timesteps(n, "trailing")[0] == schedule.timesteps(n, "linspace")[0] == 999
    assert schedule.timesteps(n, "leading", 1)[0] < 999
    assert schedule.timesteps(50, "leading", 1)[0] == 981 and schedule.timesteps(3, "leading", 1)[0] == 667


def test_wrong_steps_and_spacings_raise():
    schedule = Schedule.linear(50)
    for n in (0, -1, 51):
        with pytest.raises(ValueError, match="between 1 and"):
            schedule.timesteps(n)
    with pytest.raises(ValueError, match="spacing"):
        schedule.timesteps(5, "trialing")


def test_every_sampler_visits_the_steps_of_the_reference():
    schedule = Schedule.scaled_linear()
    for key, expected in json.loads((GOLDEN / "timesteps.json").read_text()).items():
        name, spacing, steps = key.split("|")
        options = {} if spacing == "default" else dict(spacing=spacing, offset=0)
        seen = []

        def denoise(x, t):
            seen.append(float(t[0]))
            return x

        samplers.sample(name, denoise, torch.zeros(1, 1, dtype=torch.float64), schedule, int(steps), **options)
        assert seen == pytest.approx(expected, abs=1e-8, rel=0), key


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_training_and_the_full_length_sampler_see_the_same_steps(name):
    schedule = Schedule.linear(50)
    trained = set(time_steps(0, 1, torch.arange(10_000), schedule.T).tolist())  # as train_ddpm.py draws them
    seen = set()

    def denoise(x, t):
        seen.add(int(t[0]))
        return x

    samplers.sample(name, denoise, torch.zeros(1, 1), schedule, schedule.T)
    assert seen == trained == set(range(50))
