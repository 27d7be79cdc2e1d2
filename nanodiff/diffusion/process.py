"""The forward process q, its exact posterior, and what a network can be asked to predict.

Pictures and noise are [B, ...] tensors of one shape, t is an int64 tensor [B] that counts 0 ... T-1.
Source: Ho et al. 2020 (arXiv 2006.11239), section 2; report section 3.1, figures 22, 24-26.
"""

import torch

KINDS = ("noise", "x0", "v")


def at(table, t, like):
    """Row t of a float64 table [T] as [B, 1, ...] in the dtype of `like`, so that it multiplies pictures."""
    if not like.is_floating_point():
        raise ValueError(f"pictures must be floating point, not {like.dtype}: scale 0 ... 255 to [-1, 1] first")
    return table.to(t.device)[t].to(like.dtype).view(-1, *[1] * (like.ndim - 1))


def check_kind(schedule, kind):
    """Raises ValueError unless `kind` is "noise", "x0" or "v" and the schedule leaves it something to predict."""
    if kind not in KINDS:
        raise ValueError(f'kind must be "noise", "x0" or "v", not "{kind}"')
    if kind == "noise" and schedule.ends_in_pure_noise:
        raise ValueError('a schedule with zero terminal SNR needs kind "v" or "x0": at its last step x_t is all noise')


# --- the forward process -------------------------------------------------------------------------------------------

def q_step(schedule, x_before, t, noise):
    """One noising step, x_t ~ q(x_t | x_{t-1}) = N(sqrt(1 - beta_t) x_{t-1}, beta_t)  (Ho et al., equation 2)."""
    return at(schedule.alpha.sqrt(), t, x_before) * x_before + at(schedule.beta.sqrt(), t, x_before) * noise


def q_sample(schedule, x0, t, noise):
    """All steps at once, x_t ~ q(x_t | x_0) = N(sqrt(alpha_bar_t) x_0, 1 - alpha_bar_t)  (Ho et al., equation 4)."""
    return at(schedule.alpha_bar.sqrt(), t, x0) * x0 + at((1 - schedule.alpha_bar).sqrt(), t, x0) * noise


def posterior(schedule, x0, x_t, t):
    """Mean [B, ...] and variance [B, 1, ...] of q(x_{t-1} | x_t, x_0)  (Ho et al., eq. 6-7; report figures 24-25)."""
    mean = at(schedule.posterior_mean_x0, t, x_t) * x0 + at(schedule.posterior_mean_xt, t, x_t) * x_t
    return mean, at(schedule.posterior_variance, t, x_t)


# --- noise, x0 and v: three names for one prediction ----------------------------------------------------------------

def x0_from(prediction, kind, x_t, signal, sigma):
    """x0 from a prediction of any kind, where x_t = signal * x0 + sigma * noise and signal^2 + sigma^2 = 1."""
    if kind == "noise":
        return (x_t - sigma * prediction) / signal
    return prediction if kind == "x0" else signal * x_t - sigma * prediction


def noise_from(prediction, kind, x_t, signal, sigma):
    """The noise from a prediction of any kind, where x_t = signal * x0 + sigma * noise and signal^2 + sigma^2 = 1."""
    if kind == "x0":
        return (x_t - signal * prediction) / sigma
    return prediction if kind == "noise" else sigma * x_t + signal * prediction


def _signal_and_sigma(schedule, t, like):
    return at(schedule.alpha_bar.sqrt(), t, like), at((1 - schedule.alpha_bar).sqrt(), t, like)


def to_x0(schedule, prediction, kind, x_t, t):
    """The clean picture that a prediction of kind "noise", "x0" or "v" stands for."""
    check_kind(schedule, kind)
    return x0_from(prediction, kind, x_t, *_signal_and_sigma(schedule, t, x_t))


def to_noise(schedule, prediction, kind, x_t, t):
    """The noise that a prediction of kind "noise", "x0" or "v" stands for."""
    check_kind(schedule, kind)
    return noise_from(prediction, kind, x_t, *_signal_and_sigma(schedule, t, x_t))


def to_v(schedule, prediction, kind, x_t, t):
    """The velocity v = sqrt(alpha_bar) noise - sqrt(1 - alpha_bar) x0 that a prediction of any kind stands for."""
    check_kind(schedule, kind)
    if kind == "v":
        return prediction
    signal, sigma = _signal_and_sigma(schedule, t, x_t)
    return signal * noise_from(prediction, kind, x_t, signal, sigma) - sigma * x0_from(
        prediction, kind, x_t, signal, sigma)


# --- training -------------------------------------------------------------------------------------------------------

def target(schedule, kind, x0, noise, t):
    """What the network should predict: the noise (Ho et al., eq. 14), x0 (report fig. 26) or v (Salimans & Ho 2022)."""
    check_kind(schedule, kind)
    if kind == "noise":
        return noise
    if kind == "x0":
        return x0
    signal, sigma = _signal_and_sigma(schedule, t, x0)
    return signal * noise - sigma * x0


def loss_weight(schedule, kind, t, gamma=None):
    """Weight [B] (float32) of each sample's squared error: 1 ("simple"), or min-SNR when `gamma` is given.

    Min-SNR asks for min(snr, gamma) of an x0 error (Hang et al. 2023, arXiv 2303.09556, section 3.4). One and the
    same mistake measured as noise is snr times, measured as v snr + 1 times the x0 error, hence the divisions.
    """
    check_kind(schedule, kind)
    snr = schedule.snr.to(t.device)[t]
    if gamma is None:
        return torch.ones_like(snr, dtype=torch.float32)
    kept = snr.clamp(max=gamma)
    return {"noise": kept / snr, "x0": kept, "v": kept / (snr + 1)}[kind].float()


def elbo_weight(schedule, kind, t):
    """Weight [B] (float64) that turns a sample's squared error into its term of the bound, in nats.

    L_t = weight * |x0 - predicted x0|^2 with weight = (snr(t-1) - snr(t)) / 2 : the mean distance of report figure 26,
    equal to posterior_mean_x0^2 / (2 posterior_variance). Noise and v errors are rescaled as in `loss_weight`.
    At t = 0, where the posterior has no variance, that of t = 1 stands in, as in Ho et al.'s code.
    """
    check_kind(schedule, kind)
    variance = torch.cat([schedule.posterior_variance[1:2], schedule.posterior_variance[1:]])
    variance = variance if schedule.T > 1 else schedule.beta
    weight = (schedule.posterior_mean_x0**2 / (2 * variance)).to(t.device)[t]
    snr = schedule.snr.to(t.device)[t]
    return {"noise": weight / snr, "x0": weight, "v": weight / (snr + 1)}[kind]


# --- noise ----------------------------------------------------------------------------------------------------------

def randn_like(x, generator=None):
    """Standard normal noise shaped like `x` [B, ...], from one generator or from a list with one for each sample.

    With a list, sample i's noise is the same whatever the batch it stands in.
    """
    def draw(shape, generator):
        device = generator.device if generator else x.device
        return torch.randn(shape, generator=generator, dtype=x.dtype, device=device)
    if isinstance(generator, (list, tuple)):
        if len(generator) != len(x):
            raise ValueError(f"{len(generator)} generators were given for a batch of {len(x)}; expected one for each")
        noise = torch.stack([draw(x.shape[1:], one) for one in generator])
    else:
        noise = draw(x.shape, generator)
    return noise if noise.device == x.device else noise.to(x.device)


def offset_noise(like, strength, generator=None):
    """Noise plus `strength` times one shared normal number for each channel of each sample (Guttenberg 2023).

    like [B, C, H, W]; lets a network change the mean brightness, which plain noise almost never hides.
    """
    shared = randn_like(like[:, :, :1, :1], generator)  # [B, C, 1, 1]
    return randn_like(like, generator) + strength * shared
