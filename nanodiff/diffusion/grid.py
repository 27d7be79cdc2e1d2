"""Grids: the noise levels that a sampling run goes down, and the t that the network is shown at each.

A grid is laid in one of three ways. Each is the habit of one family of samplers in diffusers:

                ddim_grid                euler_grid                  dpm_grid
    samplers    ddpm, ddim, pndm         euler, euler_a, heun        dpm++2m, unipc
    t           whole numbers            fractions with linspace     whole numbers
                                         or karras
    steps       at every t               at every t                  at all of steps + 1 t but the last
                                                                     (trailing: at every t)
    ends at     the clean picture, or    the clean picture           the clean picture
                at alpha_bar[0]
    karras      -                        between the first and last  between the ends of the schedule
                                         sigma of the spacing
    start       unit noise               noise of the first level    unit noise
                                         (leading: unit noise)

Any sampler runs on any grid, but heun needs finite sigmas. Without signal (zero terminal SNR) sigma is infinite on a
ddim_grid; the other two put 4096 in its place. All numbers are Python's, so a run on a GPU never waits for the host.
"""

import dataclasses
import itertools
import math
import typing

import numpy as np
import torch


class Level(typing.NamedTuple):
    """How much noise the state x = signal * x0 + noise * N(0, 1) holds; signal^2 + noise^2 = 1.

    t is what the network is shown: an int, a float on a grid with fractions, None for the clean picture.
    """
    t: int | float | None
    signal: float
    noise: float

    @property
    def alpha_bar(self):
        return self.signal**2

    @property
    def sigma(self):
        """noise / signal: the noise beside a picture of full strength (Karras et al. 2022). Infinite without signal."""
        return self.noise / self.signal if self.signal > 0 else math.inf

    @property
    def half_log_snr(self):
        """log(signal / noise), the lambda of DPM-Solver. Infinite without noise."""
        return -math.log(self.sigma) if self.noise > 0 else math.inf

    def t_like(self, x):
        """t as the tensor [B] that the network is shown: int64; fractions in float64 for float64 x, else float32."""
        dtype = torch.int64 if isinstance(self.t, int) else torch.promote_types(x.dtype, torch.float32)
        return torch.full((len(x),), self.t, dtype=dtype, device=x.device)


@dataclasses.dataclass(frozen=True)
class Grid:
    """levels: one more than there are steps, from noise to picture; start: the first state is start * unit noise."""
    levels: tuple
    start: float = 1.0

    @property
    def steps(self):
        """A list of (level before, level after), one pair for each step."""
        return list(itertools.pairwise(self.levels))

    def cut(self, strength):
        """The grid of an edit: the last max(1, int(steps * strength)) steps. Strength is a share of the steps, not of
        the noise. ValueError for a strength outside (0, 1]."""
        if not 0 < strength <= 1:
            raise ValueError(f"strength must be above 0 and at most 1, not {strength}")
        steps = len(self.levels) - 1
        left = max(1, int(steps * strength + 1e-9))  # 50 * 0.58 is a little below 29
        return Grid(self.levels[steps - left:], self.start)

    def begin(self, noise, image=None):
        """The first state [B, ...]: made of unit noise [B, ...], or of that and the clean picture that is edited."""
        if image is None:
            return self.start * noise
        return self.levels[0].signal * image + self.levels[0].noise * noise


# --- the three ways to lay a grid ------------------------------------------------------------------------------------
# Keyword-only parameters are the user's options. spacing, offset: see `Schedule.timesteps`; sigmas: see `sigmas_grid`.

def ddim_grid(schedule, steps, *, spacing="leading", offset=1, final_alpha="first", sigmas=None):
    """The grid of ddim and pndm. final_alpha "first" ends at alpha_bar[0] and so leaves a trace of noise, as Stable
    Diffusion does; "one" ends at x0."""
    if final_alpha not in ("first", "one"):
        raise ValueError(f'final_alpha must be "first" or "one", not "{final_alpha}"')
    if sigmas is not None:
        return sigmas_grid(schedule, steps, sigmas)
    table, t = schedule.alpha_bar.tolist(), schedule.timesteps(steps, spacing, offset).tolist()
    alpha_bar = [table[i] for i in t] + [table[0] if final_alpha == "first" else 1.0]
    t += [0] if final_alpha == "first" else []
    return _grid(t, [(math.sqrt(a), math.sqrt(1 - a)) for a in alpha_bar])


def ddpm_grid(schedule, steps, *, spacing="leading", offset=1, sigmas=None):
    """The grid of ddpm: `ddim_grid` down to x0."""
    return ddim_grid(schedule, steps, spacing=spacing, offset=offset, final_alpha="one", sigmas=sigmas)


def euler_grid(schedule, steps, *, spacing="linspace", offset=0, karras=False, sigmas=None):
    """The grid of euler, euler_a and heun. karras: levels by `karras_sigmas`."""
    if sigmas is not None:
        grid = sigmas_grid(schedule, steps, sigmas)
        return Grid(grid.levels, start=grid.levels[0].noise)
    t = schedule.timesteps(steps, spacing, offset).tolist()
    if spacing == "linspace":
        t = np.linspace(0, schedule.T - 1, steps)[::-1].tolist()  # not rounded
    sigma = np.interp(t, np.arange(schedule.T), sigma_table(schedule)).tolist()
    if karras:
        sigma = karras_sigmas(sigma[0], sigma[-1], steps)
        t = _t_of(sigma, schedule)
    grid = _grid_of_sigma(t, [*sigma, 0.0])
    # A leading grid starts low, where x0's own unit variance counts beside the noise: so the state has unit variance.
    return grid if spacing == "leading" else Grid(grid.levels, start=grid.levels[0].noise)


def dpm_grid(schedule, steps, *, spacing="linspace", offset=0, karras=False, sigmas=None):
    """The grid of dpm++2m and unipc. karras: levels by `karras_sigmas`."""
    if sigmas is not None:
        return sigmas_grid(schedule, steps, sigmas)
    table, t = sigma_table(schedule), schedule.timesteps(steps, spacing, offset).tolist()
    if spacing != "trailing" and steps < schedule.T:  # the clean picture takes the place of the last of steps + 1
        t = schedule.timesteps(steps + 1, spacing, offset).tolist()[:-1]
    sigma = table[t].tolist()
    if karras:
        sigma = karras_sigmas(table[-1], table[0], steps)
        t = [round(i) for i in _t_of(sigma, schedule)]
    return _grid_of_sigma(t, [*sigma, 0.0])


def karras_grid(schedule, steps, *, spacing="linspace", offset=0, sigmas=None):
    """The grid of dpm++2m_karras: `dpm_grid` with karras."""
    return dpm_grid(schedule, steps, spacing=spacing, offset=offset, karras=True, sigmas=sigmas)


def sigmas_grid(schedule, steps, sigmas):
    """A grid of one's own: steps + 1 falling values of sigma = noise / signal, of which only the last may be 0.

    t is linear in log sigma between the rows of the schedule, and stays within 0 ... T-1. ValueError for other sigmas.
    """
    sigma = [float(s) for s in sigmas]
    if len(sigma) != steps + 1 or sigma[-1] < 0 or not all(a > b for a, b in itertools.pairwise(sigma)):
        raise ValueError(f"sigmas must be {steps + 1} strictly falling numbers for {steps} steps, none below 0")
    return _grid_of_sigma(_t_of([s for s in sigma if s > 0], schedule), sigma)


# --- sigma -----------------------------------------------------------------------------------------------------------

def sigma_table(schedule):
    """sigma = sqrt((1 - alpha_bar) / alpha_bar) of every t: numpy float64 [T].

    4096 stands for infinity where no signal at all is left; what little signal a schedule leaves otherwise counts as
    it is. diffusers does both.
    """
    alpha_bar = schedule.alpha_bar.numpy()
    alpha_bar = np.where(alpha_bar > 0, alpha_bar, 2.0**-24)
    return np.sqrt((1 - alpha_bar) / alpha_bar)


def karras_sigmas(top, bottom, steps, rho=7):
    """A list of sigmas from top to bottom, evenly spaced in sigma^(1 / rho) (Karras et al. 2022, arXiv 2206.00364,
    equation 5)."""
    ramp = np.linspace(0, 1, steps)
    return ((top ** (1 / rho) + ramp * (bottom ** (1 / rho) - top ** (1 / rho))) ** rho).tolist()


def _t_of(sigma, schedule):
    return np.interp(np.log(sigma), np.log(sigma_table(schedule)), np.arange(schedule.T)).tolist()


def _grid_of_sigma(t, sigma):
    signal = [1 / math.sqrt(1 + s**2) for s in sigma]
    return _grid(t, [(a, a * s) for a, s in zip(signal, sigma)])


def _grid(t, parts):
    """parts: (signal, noise) of every level; t: of every level but a clean last one."""
    t = [int(i) for i in t] if all(i == int(i) for i in t) else [float(i) for i in t]
    return Grid(tuple(Level(i, *part) for i, part in itertools.zip_longest(t, parts)))
