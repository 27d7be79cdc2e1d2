"""Denoisers that are known exactly, and the order of a sampler measured on one of them (also by the benchmarks)."""

import math

import numpy as np
import torch

from nanodiff.diffusion import samplers


def alpha_bar_at(schedule, t, log=False):
    """alpha_bar at a whole t from the table, between whole t from a sigma (or its logarithm) that is linear in t."""
    t = float(t)
    if t == int(t):
        return float(schedule.alpha_bar[int(t)])
    with np.errstate(divide="ignore"):
        sigma = np.sqrt((1 - schedule.alpha_bar.numpy()) / schedule.alpha_bar.numpy())
    if log:
        return 1 / (1 + math.exp(np.interp(t, np.arange(schedule.T), np.log(sigma))) ** 2)
    return 1 / (1 + float(np.interp(t, np.arange(schedule.T), sigma)) ** 2)


def as_kind(x0, x, alpha_bar, kind):
    """The prediction of a kind that says x0 when it sees x."""
    signal, sigma = math.sqrt(alpha_bar), math.sqrt(1 - alpha_bar)
    noise = (x - signal * x0) / sigma
    return {"noise": noise, "x0": x0, "v": signal * noise - sigma * x0}[kind]


def oracle(schedule, x0, kind, seen=None, log=False):
    """The denoiser that knows the one picture there is; appends every (t, x) that it sees to `seen`."""
    def denoise(x, t):
        if seen is not None:
            seen.append((t, x))
        return as_kind(x0, x, alpha_bar_at(schedule, t[0], log), kind)
    return denoise


def mixture(schedule, means, stds, weights, kind, seen=None):
    """The posterior mean of x0 ~ sum_k weights_k N(means_k, stds_k^2), as a prediction of any kind; float64 inside."""
    def denoise(x, t):
        alpha_bar = alpha_bar_at(schedule, t[0])
        if seen is not None:
            seen.append((t, x))
        y = x.double()
        variance = alpha_bar * stds**2 + 1 - alpha_bar  # [K]
        away = y[:, None] - math.sqrt(alpha_bar) * means  # [B, K, D]
        log_share = weights.log() - 0.5 * y.shape[1] * variance.log() - 0.5 * (away**2).sum(-1) / variance
        x0 = means + (math.sqrt(alpha_bar) * stds**2 / variance)[:, None] * away  # [B, K, D]
        x0 = (log_share.softmax(1)[..., None] * x0).sum(1)
        return as_kind(x0, y, alpha_bar, kind).to(x.dtype)
    return denoise


# --- orders, on data N(MEAN, STD^2) ----------------------------------------------------------------------------------

MEAN, STD = 0.7, 0.5
SIGMA_START, SIGMA_END = 10.0, 0.1


def gaussian(schedule):
    """E[noise | x_t] for Gaussian data at any real t, where log sigma is linear between whole t as on the grids."""
    def denoise(x, t):
        alpha_bar = alpha_bar_at(schedule, t[0], log=True)
        sigma = math.sqrt((1 - alpha_bar) / alpha_bar)
        y = x * math.sqrt(1 + sigma**2)  # x0 + sigma * noise
        return sigma * (y - MEAN) / (STD**2 + sigma**2)
    return denoise


def grid(steps):
    """sigma from 10 to 0.1 in equal ratios."""
    return np.geomspace(SIGMA_START, SIGMA_END, steps + 1).tolist()


def start_scale(name):
    """What a sampler multiplies unit noise by to start at sigma = 10, as a share of the state's own scale there."""
    return SIGMA_START if name in ("euler", "euler_a", "heun") else math.sqrt(1 + SIGMA_START**2)


def end_scale(x):
    """x0 + sigma * noise of the last state, at sigma = 0.1."""
    return x * math.sqrt(1 + SIGMA_END**2)


def ode_error(name, schedule, steps):
    """Largest distance from the exact solution of the probability-flow ODE at sigma = 0.1, from three starts."""
    start = torch.tensor([[-12.0], [3.0], [8.0]], dtype=torch.float64)  # y = x0 + sigma noise
    x = samplers.sample(name, gaussian(schedule), start / start_scale(name), schedule, steps, sigmas=grid(steps))
    shrink = math.sqrt((STD**2 + SIGMA_END**2) / (STD**2 + SIGMA_START**2))
    return float((end_scale(x) - (MEAN + (start - MEAN) * shrink)).abs().max())


def moment_errors(name, schedule, steps, **options):
    """Errors of mean and variance at sigma = 0.1 when the run starts from y ~ N(30, 20) at sigma = 10.

    The denoiser is affine in x, so a run is an affine function of the start and of each step's noise. Its
    coefficients are read off one run with a batch of unit vectors: no randomness, no sampling error. The exact end
    follows from q(y_end | y_start) = N(MEAN + k (y_start - MEAN), (STD^2 + SIGMA_END^2) (1 - k)).
    """
    rows = steps + 2  # nothing; the start; each step's noise
    x = torch.zeros(rows, 1, dtype=torch.float64)
    x[1] = 1
    noises = torch.zeros(steps, rows, 1, dtype=torch.float64)
    for i in range(steps):
        noises[i, i + 2] = 1
    end = end_scale(samplers.sample(name, gaussian(schedule), x, schedule, steps, noises=noises, sigmas=grid(steps),
                                    **options))[:, 0]
    constant, response = end[0], end[1:] - end[0]
    start = response[0] / start_scale(name)
    k = (STD**2 + SIGMA_END**2) / (STD**2 + SIGMA_START**2)
    mean_error = constant + start * 30 - (MEAN + k * (30 - MEAN))
    variance_error = start**2 * 20 + (response[1:] ** 2).sum() - (k**2 * 20 + (STD**2 + SIGMA_END**2) * (1 - k))
    return abs(float(mean_error)), abs(float(variance_error))


def slopes(errors):
    """log2 of how much each doubling of the steps divides the error by."""
    return [math.log2(a / b) for a, b in zip(errors, errors[1:])]
