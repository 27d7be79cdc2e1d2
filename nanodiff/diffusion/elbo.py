"""The variational bound: how many bits a diffusion model needs to describe a picture exactly.

    -log p(x_0) <= L_T + sum over t >= 1 of L_t + L_0
    L_T  the last noisy picture is not quite N(0, 1)             prior_kl
    L_t  the reverse step from x_t is not quite the posterior    step_kl
    L_0  the last step has to name the 8-bit value of each pixel decoder_nll

t counts 0 ... T-1, so that L_t is the price of going from index t to index t - 1 and L_0 that of leaving index 0.
Everything is in nats, summed over a picture's dimensions, in float64, until a name says bits_per_dim: divided by
the number of dimensions and by log 2. Source: Ho et al. 2020 (arXiv 2006.11239), equations 5-7 and 13, section 4.3;
Nichol & Dhariwal 2021 (arXiv 2102.09672), section 3; report sections 3.1.2-3.1.3 and 3.3, figures 35 and 40.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from . import gaussian, process


# --- the three kinds of term ---------------------------------------------------------------------------------------

def reverse_variance(schedule, variance="small"):
    """Variance [T] of the model's reverse steps: "small" = beta-tilde, "large" = beta (Ho et al. 2020, section 3.2).

    At t = 0 beta-tilde is 0, which no decoder can have; there that of t = 1 stands in. Raises ValueError otherwise.
    """
    if variance == "large" or (variance == "small" and schedule.T == 1):
        return schedule.beta
    if variance == "small":
        return torch.cat([schedule.posterior_variance[1:2], schedule.posterior_variance[1:]])
    raise ValueError(f'variance must be "small" or "large", not "{variance}"')


def prior_kl(schedule, x0):
    """L_T = KL(q(x_T | x_0) || N(0, 1)) of each picture x0 [B, ...]: [B] nats. No network has a part in it."""
    x0 = x0.double()
    left = schedule.alpha_bar[-1].to(x0.device)  # share of the signal's variance that survives all steps
    # kl_diagonal(sqrt(left) x0, 1 - left, 0, 1), with log1p because `left` is tiny
    return 0.5 * (left * x0**2 - left - torch.log1p(-left)).flatten(1).sum(1)


def step_kl(schedule, x0, x_t, t, x0_prediction, variance="small"):
    """L_t = KL(q(x_{t-1} | x_t, x_0) || p(x_{t-1} | x_t)) of each picture: [B] nats, for t >= 1 (Ho et al., eq. 5-7).

    x0, x_t, x0_prediction [B, ...]; t int64 [B] within 1 ... T-1 and free to differ from picture to picture. The
    model's step has the posterior's mean with x0_prediction for x0, and the variance "small" (beta-tilde: the true
    one) or "large" (beta). Raises ValueError for a t of 0, whose term is `decoder_nll`.
    """
    if bool((t < 1).any()):
        raise ValueError("step_kl needs t >= 1: the step from t = 0 to the picture is the decoder's (decoder_nll)")
    x0, x_t, x0_prediction = x0.double(), x_t.double(), x0_prediction.double()
    mean, true_variance = process.posterior(schedule, x0, x_t, t)
    model_mean, _ = process.posterior(schedule, x0_prediction, x_t, t)
    model_variance = process.at(reverse_variance(schedule, variance), t, x0)
    return gaussian.kl_diagonal(mean, true_variance, model_mean, model_variance).flatten(1).sum(1)


def decoder_nll(x0, mean, log_scale):
    """L_0 = -log p(x0) under a Gaussian that is cut into 256 bins, of each picture: [B] nats (Ho et al., equation 13).

    x0 [B, ...] holds 8-bit values scaled to [-1, 1] and counts as the nearest one; mean [B, ...]; log_scale is the
    log of the standard deviation, a number or a tensor that broadcasts. Bins are 2/255 wide, the first and the last
    reach to infinity, so the 256 probabilities sum to 1. Exact in the far tails too: nothing is clamped.
    """
    mean = mean.double()
    scale = torch.as_tensor(log_scale, dtype=torch.float64, device=mean.device).exp()
    value = ((x0.double() + 1) * 127.5).round()  # 0 ... 255
    middle = value / 127.5 - 1
    low = torch.where(value <= 0, -math.inf, (middle - 1 / 255 - mean) / scale)
    high = torch.where(value >= 255, math.inf, (middle + 1 / 255 - mean) / scale)
    return -_log_probability(low, high).flatten(1).sum(1)


def _log_probability(low, high):
    """log(Phi(high) - Phi(low)) of a standard normal number, low < high, to nearly full relative precision."""
    # Phi is close to 1 on the right, where differences lose all digits; a bin there has a mirror image on the left.
    mirrored = low + high > 0
    low, high = torch.where(mirrored, -high, low), torch.where(mirrored, -low, high)
    log_low, log_high = torch.special.log_ndtr(low), torch.special.log_ndtr(high)
    return log_high + torch.log1p(-(log_low - log_high).exp())


# --- a model's bound, one pass over pictures and steps --------------------------------------------------------------

class Terms(NamedTuple):
    """What one pass measured on N pictures and K strata of time steps.

    Stratum k holds the steps first[k] ... first[k] + size[k] - 1, and stratum 0 is t = 0 alone. Each picture has seen
    one step of every stratum, drawn uniformly.
    """

    first: Tensor  # int64 [K]
    size: Tensor  # int64 [K]
    t: Tensor  # int64 [N, K], the step that was drawn
    nats: Tensor  # float64 [N, K], L_t of that step
    squared_error: Tensor  # float64 [N, K], mean over dimensions of (x0 - predicted x0)^2
    prior: Tensor  # float64 [N], L_T in nats
    dimensions: int


def strata(T, samples=None):
    """First step and size, int64 [K] each, of the strata that share out the steps 0 ... T-1.

    The first is t = 0 alone; `samples` others follow (None: one for each t), narrow near 0, where L_t changes fast.
    Raises ValueError for samples outside 1 ... T-1.
    """
    samples = T - 1 if samples is None else samples
    if not min(1, T - 1) <= samples <= T - 1:
        raise ValueError(f"t_samples must be between 1 and {T - 1}, the steps after t = 0, not {samples}")
    k = torch.arange(samples + 1)
    # Edges grow with the square of k, but by no less than one step.
    edges = torch.maximum(1 + k, 1 + ((T - 1) * (k / max(samples, 1)).double() ** 2).round().long())
    edges = torch.cat([torch.zeros(1, dtype=torch.int64), edges])  # 0, 1, ..., T
    return edges[:-1], edges.diff()


@torch.no_grad()
def terms(denoise, x0, schedule, kind="noise", *, generator, variance="small", t_samples=None, batch=64, clip=False):
    """Measures the terms of the bound on pictures x0 [N, ...]; `bits_per_dim` and `rate_distortion` summarise them.

    denoise(x_t, t)  what the network predicts, of the given kind, for x_t [b, ...] and t int64 [b]
    generator        draws every t and all noise; one generator state gives the same terms whatever `batch` is
    variance         the model's reverse variance, "small" or "large"
    t_samples        None: every t. Otherwise how many strata t >= 1 is split into, one random t from each (Terms)
    clip             clamp the predicted x0 to [-1, 1], as Ho et al. do; still a valid bound, for another model
    Costs N * (t_samples + 1) pictures through the network.
    """
    first, size = strata(schedule.T, t_samples)
    n, count = len(x0), len(size)
    u = torch.rand(n, count, generator=generator, dtype=torch.float64, device=generator.device).cpu()
    t = first + torch.minimum((u * size).long(), size - 1)  # [N, K]
    nats, squared_error = torch.empty(2, n * count, dtype=torch.float64)
    for pairs in torch.arange(n * count).split(batch):  # pair i is picture i // K in stratum i % K
        x, step = x0[(pairs // count).to(x0.device)], t.flatten()[pairs].to(x0.device)
        # The generator once for each picture: torch's numbers would otherwise depend on how many are drawn together.
        x_t = process.q_sample(schedule, x, step, process.randn_like(x, [generator] * len(x)))
        prediction = denoise(x_t, step).double()
        prediction = process.to_x0(schedule, prediction, kind, x_t.double(), step)
        prediction = prediction.clamp(-1, 1) if clip else prediction
        nats[pairs] = _step_nats(schedule, x, x_t, step, prediction, variance).cpu()
        squared_error[pairs] = (x.double() - prediction).square().flatten(1).mean(1).cpu()
    return Terms(first, size, t, nats.view(n, count), squared_error.view(n, count),
                 prior_kl(schedule, x0).cpu(), x0[0].numel())


def _step_nats(schedule, x0, x_t, t, x0_prediction, variance):
    """L_0 where t is 0, L_t elsewhere: [B] nats."""
    nats = torch.empty(len(t), dtype=torch.float64, device=x0.device)
    last, others = t == 0, t > 0
    log_scale = 0.5 * reverse_variance(schedule, variance)[0].log()
    nats[last] = decoder_nll(x0[last], x0_prediction[last], log_scale)
    nats[others] = step_kl(schedule, x0[others], x_t[others], t[others], x0_prediction[others], variance)
    return nats


def bits_per_dim(denoise, x0, schedule, kind="noise", *, generator, **options):
    """The bound on the pictures x0 [N, ...] as a dictionary, `summary(terms(...))`; arguments as for `terms`."""
    return summary(terms(denoise, x0, schedule, kind, generator=generator, **options))


def rate_distortion(denoise, x0, schedule, kind="noise", *, generator, **options):
    """Rate and distortion of progressive coding, `rate_distortion_points(terms(...))`; arguments as for `terms`."""
    return rate_distortion_points(terms(denoise, x0, schedule, kind, generator=generator, **options))


def summary(found):
    """The bound from `terms`, a dictionary of floats and float64 tensors.

    bits_per_dim                    the mean over pictures: an unbiased estimate of the bound, whatever t_samples was
    bits_per_dim_standard_error     spread of `bits_per_dim_of_each` / sqrt(N). Pictures, their random t and their noise
                                    are drawn independently, so it covers all three; nan for a single picture
    prior_, steps_, decoder_bits_per_dim    its parts L_T, the sum of L_t over t >= 1, and L_0
    nats                            the mean over pictures, summed over dimensions
    bits_per_dim_of_each            [N]; compare two models on the same pictures by the differences of these
    curve_t, curve_nats, curve_bits_per_dim    [K] the middle of each stratum and its mean L_t, the price of one step
    """
    unit = found.dimensions * math.log(2)  # nats for a picture in one bit/dim
    steps = (found.nats * found.size)[:, 1:].sum(1)
    each = (found.prior + steps + found.nats[:, 0]) / unit
    curve = found.nats.mean(0)
    return {
        "bits_per_dim": float(each.mean()),
        "bits_per_dim_standard_error": float(each.std() / len(each) ** 0.5) if len(each) > 1 else math.nan,
        "prior_bits_per_dim": float(found.prior.mean() / unit),
        "steps_bits_per_dim": float(steps.mean() / unit),
        "decoder_bits_per_dim": float(found.nats[:, 0].mean() / unit),
        "nats": float(each.mean() * unit),
        "bits_per_dim_of_each": each,
        "curve_t": found.first + (found.size - 1) / 2,
        "curve_nats": curve,
        "curve_bits_per_dim": curve / unit,
    }


def rate_distortion_points(found):
    """Progressive lossy coding from `terms`, t from T-1 down to 0: a dictionary of float64 [K] (Ho et al., sect. 4.3).

    t                    the middle of each stratum
    rate_bits_per_dim    what it has cost to send x_t: L_T and the L of every step above t (L_t itself pays for x_{t-1})
    distortion_rmse      root mean squared error of x0 as predicted from x_t, in units of the 8-bit range [0, 255]
    x_t is drawn from q(x_t | x_0), as what the receiver would hold. Within a stratum both are means over its steps.
    After the last point L_0 buys the picture itself: the bound's bits/dim at distortion 0.
    """
    unit = found.dimensions * math.log(2)
    nats = found.nats.mean(0)
    above = (nats * found.size).flip(0).cumsum(0).flip(0) - nats * found.size  # the strata above this one
    # A step s of the same stratum is above t for s - first of its `size` equally likely t.
    within = (found.nats * (found.t - found.first)).mean(0)
    rate = (found.prior.mean() + above + within) / unit
    return {
        "t": (found.first + (found.size - 1) / 2).double().flip(0),
        "rate_bits_per_dim": rate.flip(0),
        "distortion_rmse": 127.5 * found.squared_error.mean(0).sqrt().flip(0),
    }


# --- the same, exactly, for Gaussian data ---------------------------------------------------------------------------

def gaussian_terms(schedule, mean, std, reverse="exact"):
    """Every term of the bound for one-dimensional data N(mean, std^2) and the best denoiser E[x_0 | x_t], in nats.

    reverse      variance of the reverse steps: "exact" (that of q(x_{t-1} | x_t)), "small" or "large"
    Returns a dictionary, all float64: L_T; L_t [T-1] for t = 1 ... T-1; L_0 (continuous, not cut into bins); total,
    their sum; entropy of the data; and marginal_kl = KL(q(x_T) || N(0, 1)). With the exact reverse steps the bound is
    tight but for its start: total - entropy = marginal_kl. Report section 3.1.2.
    """
    left, beta = schedule.alpha_bar, schedule.beta
    before = torch.cat([left.new_ones(1), left[:-1]])  # alpha_bar one step earlier
    noisy = 1 - left + left * std**2  # variance of x_t
    squared_error = std**2 * (1 - left) / noisy  # of the best denoiser
    if reverse == "exact":
        # Here (posterior variance + spread of its mean) is the model's variance, and the KL is half a log of a ratio.
        nats = 0.5 * torch.log1p(beta[1:] * before[1:] * std**2 / (noisy[1:] * (1 - before[1:])))
        variance = squared_error
    else:
        variance = reverse_variance(schedule, reverse)
        nats = gaussian.kl_diagonal(0.0, schedule.posterior_variance, 0.0, variance)[1:]
        nats = nats + (schedule.posterior_mean_x0**2 * squared_error / (2 * variance))[1:]
    decoder = 0.5 * (math.log(2 * math.pi) + variance[0].log() + squared_error[0] / variance[0])
    end = left[-1]
    prior = 0.5 * (end * (mean**2 + std**2) - end - torch.log1p(-end))
    excess = end * (std**2 - 1)  # variance of x_T above 1
    return {
        "L_T": prior, "L_t": nats, "L_0": decoder, "total": prior + nats.sum() + decoder,
        "entropy": left.new_tensor(0.5 * math.log(2 * math.pi * math.e) + math.log(std)),
        "marginal_kl": 0.5 * (end * mean**2 + excess - torch.log1p(excess)),
    }
