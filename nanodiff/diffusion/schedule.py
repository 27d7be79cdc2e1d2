"""Noise schedules: how much of the picture is left after t noising steps.

Every table is float64 of shape [T] and starts at the first noising step: index t here is the
paper's t + 1 (Ho et al. 2020, arXiv 2006.11239, section 2). Report: section 3.1.1, figure 36.
"""

import math

import numpy as np
import torch


class Schedule:
    """The tables that follow from the noise variances beta_1 ... beta_T; all float64 [T], index 0 = first step.

    T                    number of noising steps
    beta, alpha          variance added by a step, and 1 - beta
    alpha_bar            product of alpha: the share of the signal's variance left in x_t (Ho et al., equation 4)
    snr                  alpha_bar / (1 - alpha_bar): signal-to-noise ratio of x_t for data of unit variance
    posterior_variance   beta-tilde, the variance of q(x_{t-1} | x_t, x_0); 0 at t = 0 (equation 7)
    posterior_mean_x0, posterior_mean_xt
                         the posterior mean is posterior_mean_x0 * x_0 + posterior_mean_xt * x_t (equation 7)
    ends_in_pure_noise   True when alpha_bar ends at exactly 0 (zero terminal SNR)
    """

    def __init__(self, beta):
        beta = torch.as_tensor(beta, dtype=torch.float64).detach().clone()
        if beta.ndim != 1 or len(beta) == 0 or not bool(((1 - beta < 1) & (beta <= 1)).all()):
            raise ValueError("a schedule needs a one-dimensional list of variances beta with 0 < beta <= 1")
        self.T = len(beta)
        self.beta = beta
        self.alpha = 1 - beta
        self.alpha_bar = self.alpha.cumprod(0)
        before = torch.cat([torch.ones(1, dtype=torch.float64), self.alpha_bar[:-1]])  # alpha_bar one step earlier
        self.snr = self.alpha_bar / (1 - self.alpha_bar)
        self.posterior_variance = beta * (1 - before) / (1 - self.alpha_bar)
        self.posterior_mean_x0 = beta * before.sqrt() / (1 - self.alpha_bar)
        self.posterior_mean_xt = (1 - before) * self.alpha.sqrt() / (1 - self.alpha_bar)
        self.ends_in_pure_noise = float(self.alpha_bar[-1]) == 0.0

    @classmethod
    def linear(cls, T=1000, start=1e-4, end=2e-2):
        """beta grows linearly from `start` to `end` (Ho et al. 2020, section 4; report section 3.1)."""
        return cls(torch.linspace(start, end, T, dtype=torch.float64))

    @classmethod
    def scaled_linear(cls, T=1000, start=0.00085, end=0.012):
        """sqrt(beta) grows linearly: Stable Diffusion's schedule (Rombach et al. 2022, arXiv 2112.10752)."""
        return cls(torch.linspace(start**0.5, end**0.5, T, dtype=torch.float64) ** 2)

    @classmethod
    def cosine(cls, T=1000, s=0.008, max_beta=0.999):
        """alpha_bar follows a squared cosine, beta cut at 0.999 (Nichol & Dhariwal 2021, arXiv 2102.09672, eq. 17)."""
        def alpha_bar(u):
            return math.cos((u + s) / (1 + s) * math.pi / 2) ** 2
        return cls([min(1 - alpha_bar((i + 1) / T) / alpha_bar(i / T), max_beta) for i in range(T)])

    @classmethod
    def from_betas(cls, beta):
        """A schedule from any list, array or tensor of variances, 0 < beta <= 1."""
        return cls(beta)

    @classmethod
    def from_alpha_bar(cls, alpha_bar):
        """The schedule whose signal shares are alpha_bar [T], float64: beta_t = 1 - alpha_bar_t / alpha_bar_(t-1)."""
        return cls(1 - torch.cat([alpha_bar[:1], alpha_bar[1:] / alpha_bar[:-1]]))

    def shifted(self, factor):
        """The same schedule with `factor` times as much noise beside the signal at every step: SNR / factor^2.

        What is large and regular in a picture shows through noise that hides what is small, so larger pictures, and
        regular ones, want more of it (Hoogeboom et al. 2023, arXiv 2301.11093, section 3.1).
        """
        if not factor > 0:
            raise ValueError(f"noise cannot be {factor} times as strong: a factor above 0 is needed")
        alpha_bar = self.alpha_bar / (self.alpha_bar + factor**2 * (1 - self.alpha_bar))
        return Schedule.from_alpha_bar(alpha_bar)

    def zero_terminal_snr(self):
        """The same schedule, shifted and scaled so that x_T is noise alone (Lin et al. 2023, arXiv 2305.08891, alg. 1).

        sqrt(alpha_bar) keeps its first value and ends at exactly 0. Predicting noise is then impossible at the
        last step (there is no signal to recover): use kind "v" or "x0", and trailing spacing.
        """
        if self.T == 1:
            raise ValueError("a schedule of one step cannot both keep its first signal and end without any")
        root = self.alpha_bar.sqrt()
        root = (root - root[-1]) * (root[0] / (root[0] - root[-1]))
        alpha_bar = root**2
        return Schedule.from_alpha_bar(alpha_bar)

    def timesteps(self, steps, spacing="leading", offset=0):
        """The `steps` time steps that a sampler visits: int64, strictly descending, within 0 ... T-1.

        leading    multiples of T // steps, plus `offset` >= 0: never reaches T-1 unless steps = T (Stable Diffusion's)
        trailing   starts at T-1 and goes down by T / steps (Lin et al. 2023, table 2)
        linspace   evenly from T-1 to 0, both included
        Raises ValueError for another spacing, a negative offset or steps outside 1 ... T.
        """
        if offset < 0:
            raise ValueError(f"offset must be 0 or more, not {offset}")
        if not 1 <= steps <= self.T:
            raise ValueError(f"steps must be between 1 and the schedule's {self.T}, not {steps}")
        if spacing == "leading":
            stride = self.T // steps
            top = (steps - 1) * stride
            t = torch.arange(steps) * stride + min(offset, self.T - 1 - top)  # the offset never leaves the table
            return t.flip(0)
        if spacing == "trailing":
            # numpy, because its rounding errors decide which way the ties (t = 499.5) fall in everybody else's runs
            t = np.arange(self.T, 0, -self.T / steps)[:steps]
            return torch.from_numpy(t.round()).long() - 1
        if spacing == "linspace":
            return torch.from_numpy(np.linspace(0, self.T - 1, steps).round()).long().flip(0)
        raise ValueError(f'spacing must be "leading", "trailing" or "linspace", not "{spacing}"')
