"""Editing from a state: noise a picture in part and denoise it again, start many from one state, mix two states.

In all of them `name` is a sampler's, `denoise` a denoise(x, t), `schedule` a Schedule, and `options` go to
`samplers.sample` (kind, generator, noises, clip ...).
"""

import torch

from . import process, samplers
from .schedule import Schedule


def sdedit(name, denoise, image, schedule, steps, strength, noise, **options):
    """The picture drawn again from a noised copy of itself (SDEdit: Meng et al. 2021, arXiv 2108.01073, algorithm 1).

    image [B, ...] clean, noise [B, ...] of unit variance; strength in (0, 1] is the share of the sampler's steps that
    are taken: the more, the less of the picture is left. ValueError for a strength outside (0, 1].
    """
    return samplers.sample(name, denoise, noise, schedule, steps, image=image, strength=strength, **options)


def denoise_from(name, denoise, x_t, schedule, t, steps=None, **options):
    """Denoise a state x_t = sqrt(alpha_bar_t) x0 + sqrt(1 - alpha_bar_t) noise [B, ...] that stands at step t.

    All t + 1 steps below are visited, or `steps` of them (trailing spacing: the first is t). The chain below t is a
    schedule of its own, whose last step is t. ValueError for t outside 0 ... T-1.
    """
    if not 0 <= t < schedule.T:
        raise ValueError(f"t must be between 0 and {schedule.T - 1}, not {t}")
    below = Schedule.from_betas(schedule.beta[: t + 1])
    options = {"spacing": "trailing", "offset": 0, **options}
    return samplers.sample(name, denoise, x_t, below, steps or t + 1, is_state=True, **options)


def noise_and_denoise(name, denoise, image, schedule, t, noise, steps=None, **options):
    """Noise a picture [B, ...] to step t and denoise it from there: what survives is what x_t still knows.

    Ho et al. 2020 (arXiv 2006.11239), section 4.3; report figure 39, bottom.
    """
    at_t = torch.full((len(image),), t, dtype=torch.int64, device=image.device)
    return denoise_from(name, denoise, process.q_sample(schedule, image, at_t, noise), schedule, t, steps, **options)


def share(name, denoise, x_t, schedule, t, count, steps=None, **options):
    """`count` pictures [count, ...] denoised from one state x_t [1, ...] with different noises on the way.

    The sampler must be stochastic (ddpm, ddim with eta > 0, euler_a), or all are the same. The larger t, the less
    they share: Ho et al. 2020, figure 7; report figure 39.
    """
    return denoise_from(name, denoise, x_t.expand(count, *x_t.shape[1:]), schedule, t, steps, **options)


def interpolate(a, b, weight):
    """Between two states or noises [B, ...] along the great circle, from a (weight 0) to b (weight 1).

    weight is a number or a tensor [B]; a or b with B = 1 serves a whole batch. Unlike (1 - w) a + w b, of which half
    the variance is gone halfway, this keeps the variance of independent noise. Parallel states are mixed linearly.
    Source: Song et al. 2021 (arXiv 2010.02502), section 5.3 and appendix D.5 (Shoemake's slerp).
    """
    weight = torch.as_tensor(weight, dtype=a.dtype, device=a.device).view(-1, *[1] * (a.ndim - 1))  # [B or 1, 1, ...]

    def dot(p, q):
        return (p * q).flatten(1).sum(1).view(-1, *[1] * (a.ndim - 1))  # [B, 1, ...]

    cosine = dot(a, b) / (dot(a, a) * dot(b, b)).sqrt().clamp(min=torch.finfo(a.dtype).tiny)
    angle = cosine.clamp(-1, 1).acos()
    parallel = angle.sin().abs() < 1e-3
    sine = torch.where(parallel, torch.ones_like(angle), angle.sin())
    share_a = torch.where(parallel, 1 - weight, ((1 - weight) * angle).sin() / sine)
    share_b = torch.where(parallel, weight, (weight * angle).sin() / sine)
    return share_a * a + share_b * b
