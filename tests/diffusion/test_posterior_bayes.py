"""The posterior q(x_{t-1} | x_t, x_0) against Bayes' rule itself: likelihood times prior, added up on a grid."""

import pytest
import torch

from nanodiff.diffusion import Schedule, process


def moments(log_density, x):
    """Mean and variance [T, 1] of densities on grids, both [T, points]; evenly spaced points."""
    weight = (log_density - log_density.max(1, keepdim=True).values).exp()
    weight = weight / weight.sum(1, keepdim=True)
    mean = (weight * x).sum(1, keepdim=True)
    return mean, (weight * (x - mean) ** 2).sum(1, keepdim=True)


def brute_force(schedule, x0, x_t, t):
    """Mean and variance [T, 1] of x_{t-1} by adding up q(x_t | x_{t-1}) q(x_{t-1} | x_0), with no posterior formula."""
    before = schedule.alpha_bar[t - 1].view(-1, 1)
    alpha, beta = schedule.alpha[t].view(-1, 1), schedule.beta[t].view(-1, 1)

    def log_density(x):
        return -(x - before.sqrt() * x0) ** 2 / (2 * (1 - before)) - (x_t - alpha.sqrt() * x) ** 2 / (2 * beta)

    # A coarse grid around where either factor peaks, as wide as the narrower of the two and some more on each side ...
    peak1, width1 = before.sqrt() * x0, (1 - before).sqrt()
    peak2 = torch.where(alpha > 0, x_t / alpha.sqrt(), peak1)  # alpha = 0: x_t says nothing about x_{t-1}
    width2 = torch.where(alpha > 0, (beta / alpha).sqrt(), width1)
    width = torch.minimum(width1, width2)
    low, high = torch.minimum(peak1, peak2) - 8 * width, torch.maximum(peak1, peak2) + 8 * width
    x = low + (high - low) * torch.linspace(0, 1, 2001, dtype=torch.float64)  # [T, points]
    mean, variance = moments(log_density(x), x)
    # ... then a fine one over 12 standard deviations of what the coarse one found.
    x = mean + variance.sqrt() * torch.linspace(-12, 12, 601, dtype=torch.float64)
    return moments(log_density(x), x)


SCHEDULES = {
    "linear": Schedule.linear(), "scaled_linear": Schedule.scaled_linear(), "cosine": Schedule.cosine(),
    "zero terminal SNR": Schedule.linear().zero_terminal_snr(), "T = 2": Schedule.from_betas([0.1, 0.6]),
    "T = 10": Schedule.linear(10, 0.01, 0.5), "cosine, T = 25": Schedule.cosine(25),
}


@pytest.mark.parametrize("name", SCHEDULES)
def test_posterior_matches_bayes_on_a_grid_at_every_t(name):
    schedule = SCHEDULES[name]
    t = torch.arange(1, schedule.T)
    for x0, x_t in ((0.7, -1.1), (-1.0, 0.4), (1.0, 2.0)):
        x0, x_t = (torch.full((len(t), 1), value, dtype=torch.float64) for value in (x0, x_t))
        mean, variance = process.posterior(schedule, x0, x_t, t)
        expected_mean, expected_variance = brute_force(schedule, x0, x_t, t)
        torch.testing.assert_close(mean, expected_mean, rtol=0, atol=1e-9)
        torch.testing.assert_close(variance, expected_variance, rtol=1e-8, atol=0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_posterior_at_the_first_step_is_x0_itself(name):
    x0, x_t = torch.randn(2, 5, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean, variance = process.posterior(SCHEDULES[name], x0, x_t, torch.zeros(5, dtype=torch.int64))
    torch.testing.assert_close(mean, x0, rtol=0, atol=1e-10)
    assert variance.shape == (5, 1) and float(variance.abs().max()) == 0
