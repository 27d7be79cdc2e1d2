"""Samplers: from noise to a picture in few steps. `sample` is the one call for whoever wants a picture.

Below it, every sampler is a generator of states, to be read from top to bottom:

    for level, x in sampler(denoise, x, grid, draw):

denoise   a `Denoiser`: denoise(x, level) -> x0, noise; what the network sees in the state x [B, ...]
x         the first state [B, ...], never changed in place; in every sampler a state is signal * x0 + noise * N(0, 1)
grid      a `Grid`: its levels have t, alpha_bar, signal, noise and sigma before, between and after the steps
draw      a function (i, x) -> the unit noise that step i adds, shaped like x; only stochastic samplers call it
level, x  after each call of the network: the level that it was shown, and the state that followed

Keyword-only parameters are the user's options. All coefficients are Python numbers: a GPU never waits for the host.
"""

import math

from . import process
from .grid import ddim_grid, ddpm_grid, dpm_grid, euler_grid, karras_grid


def sample(name, denoise, x, schedule, steps, *, kind="noise", noises=None, generator=None, on_step=None,
           clip=None, image=None, strength=1.0, is_state=False, **own):
    """The picture [B, ...] that sampler `name` makes of unit noise x [B, ...]: its last state.

    denoise(x, t)      the network's prediction of `kind` "noise", "x0" or "v"; t [B] is int64, or float for fractions
    noises, generator  noises[i] is the noise that step i adds; else it is drawn from a generator, or one each sample
    on_step(i, t, x)   called with the t that the network was shown in its call i, and the state that followed
    clip               see `Denoiser`
    image, strength    start from this clean picture (SDEdit, Meng et al. 2021, arXiv 2108.01073); see `Grid.cut`
    is_state           x is the first state itself
    own                options of the sampler and of its grid, such as eta and spacing; see `options_of`
    ValueError for a wrong kind, spacing, strength or list of sigmas, and for kind "noise" with zero terminal SNR.
    """
    process.check_kind(schedule, kind)
    grid, own = grid_for(name, schedule, steps, **own)
    if image is not None:
        grid = grid.cut(strength)
    elif strength != 1:
        raise ValueError(f"strength {strength} was given without an image; expected both or none")
    network = Denoiser(lambda x, level: denoise(x, level.t_like(x)), kind, clip)
    x = x if is_state else grid.begin(x, image)
    for i, (level, x) in enumerate(by_name[name](network, x, grid, step_noise(noises, generator), **own)):
        if on_step:
            on_step(i, level.t_like(x), x)
    return x


def grid_for(name, schedule, steps, **own):
    """The Grid that sampler `name` goes down, and those of the options `own` that are not the grid's."""
    options = {key: own.pop(key) for key in _options(GRIDS[name]) & own.keys()}
    return GRIDS[name](schedule, steps, **options), own


def step_noise(noises=None, generator=None):
    """The function draw(i, x) of a list of noises, or of a generator or one for each sample."""
    if noises is not None:
        return lambda i, x: noises[i].to(x.dtype)
    return lambda i, x: process.randn_like(x, generator)


class Denoiser:
    """denoise(x, level) -> (x0, noise): the picture and the noise of which a network says that a state x is made.

    predict  a function (x [B, ...], level) -> what the network predicts, of `kind` "noise", "x0" or "v"
    clip     None; or a bound, and x0 is cut to [-clip, clip]; or a function x0 -> x0, such as one that puts the known
             part of a picture in. The noise follows from the clipped x0
    """

    def __init__(self, predict, kind="noise", clip=None):
        self.predict, self.kind, self.clip = predict, kind, clip

    def __call__(self, x, level):
        return self.split(self.predict(x, level), self.kind, x, level)

    def split(self, prediction, kind, x, level):
        """(x0, noise) from a prediction of some kind."""
        x0 = process.x0_from(prediction, kind, x, level.signal, level.noise)
        if self.clip is not None:
            x0 = prediction = self.clip(x0) if callable(self.clip) else x0.clamp(-self.clip, self.clip)
            kind = "x0"
        return x0, process.noise_from(prediction, kind, x, level.signal, level.noise)


# --- one step at a time ----------------------------------------------------------------------------------------------

def ddpm(denoise, x, grid, draw, *, variance="small"):
    """Ancestral sampling: every step draws from the posterior (Ho et al. 2020, arXiv 2006.11239, algorithm 2).

    variance "small" is the posterior's own, "large" the step's beta (section 3.2).
    """
    if variance not in ("small", "large"):
        raise ValueError(f'variance must be "small" or "large", not "{variance}"')
    for i, (now, after) in enumerate(grid.steps):
        x0, _ = denoise(x, now)
        alpha = now.alpha_bar / after.alpha_bar  # of the one step of q that leads from `after` to `now`
        beta, ratio = 1 - alpha, (after.noise / now.noise) ** 2
        x = after.signal * beta / now.noise**2 * x0 + math.sqrt(alpha) * ratio * x
        std = math.sqrt(beta * (ratio if variance == "small" else 1))
        if std > 0 and not (now.t == 0 and after.noise == 0):
            x = x + std * draw(i, x)
        yield now, x


def ddim(denoise, x, grid, draw=None, *, eta=0.0):
    """DDIM (Song et al. 2021, arXiv 2010.02502, equations 12, 16): eta = 0 adds no noise, eta = 1 as much as DDPM."""
    for i, (now, after) in enumerate(grid.steps):
        x0, noise = denoise(x, now)
        new = eta**2 * (1 - (after.sigma / now.sigma) ** 2)  # the share of new noise in the variance after the step
        x = after.signal * x0 + after.noise * math.sqrt(max(1 - new, 0)) * noise
        if new * after.noise > 0:
            x = x + after.noise * math.sqrt(new) * draw(i, x)
        yield now, x


def euler(denoise, x, grid, draw=None):
    """Euler's method for dy / dsigma = noise, where y = x / signal (Karras et al. 2022, arXiv 2206.00364): DDIM."""
    return ddim(denoise, x, grid)


def euler_a(denoise, x, grid, draw):
    """Ancestral Euler (k-diffusion): down to sigma'^2 / sigma, then new noise up to sigma'. It is DDIM with eta = 1."""
    return ddim(denoise, x, grid, draw, eta=1.0)


def heun(denoise, x, grid, draw=None):
    """Heun's second order method: Euler, then again with the mean of both slopes (Karras et al. 2022, algorithm 1).

    Two calls a step, but one for a step to sigma = 0: 2 * steps - 1 in all.
    """
    for now, after in grid.steps:
        x0, noise = denoise(x, now)
        x = after.signal * x0 + after.noise * noise
        yield now, x
        if after.noise > 0:
            _, noise_there = denoise(x, after)
            x = x + after.signal * (after.sigma - now.sigma) / 2 * (noise_there - noise)
            yield after, x


# --- with a memory of earlier calls ----------------------------------------------------------------------------------

def pndm(denoise, x, grid, draw=None, *, average="prediction"):
    """PLMS: DDIM with the mean of the last four predictions (Liu et al. 2022, arXiv 2202.09778, equation 12).

    The first step is made twice, the second time with the mean of both its ends: steps + 1 calls (one for one step).
    The mean is taken of the network's "prediction", as everybody else's Stable Diffusion does. For kind "v" that is
    not the paper's method; average="noise" is: it turns each prediction into noise first.
    """
    if average not in ("prediction", "noise"):
        raise ValueError(f'average must be "prediction" or "noise", not "{average}"')
    weights = {1: (1,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}
    first, *rest = grid.steps
    calls = [(first[0], first), *((now, (now, after)) for now, after in rest)]  # the level shown, the step made
    calls[1:1] = [(first[1], first)] if rest else []
    start, history, kind = x, [], "noise" if average == "noise" else denoise.kind  # history: the newest first
    for i, (shown, (now, after)) in enumerate(calls):
        prediction = denoise.predict(x, shown)
        if average == "noise":
            prediction = process.noise_from(prediction, denoise.kind, x, shown.signal, shown.noise)
        if i == 1:
            x, mean = start, (prediction + history[0]) / 2
        else:
            history = [prediction, *history[:3]]
            mean = sum(w * p for w, p in zip(weights[len(history)], history))
        x0, noise = denoise.split(mean, kind, x, now)
        x = after.signal * x0 + after.noise * noise
        yield shown, x


# In the next two a step is h = the change of log(signal / noise). If x0 stays the same in it, the exact solution is
# x' = noise' / noise * x + signal' (1 - exp(-h)) x0, where exp(-h) = sigma' / sigma.

def dpmpp_2m(denoise, x, grid, draw=None):
    """DPM-Solver++(2M): x0 is extrapolated to the middle of the step (Lu et al. 2022, arXiv 2211.01095, algorithm 2).

    The first step, which has no history, and a step to sigma = 0, where h is infinite, are of first order.
    """
    before = h_before = None
    for i, (now, after) in enumerate(grid.steps):
        x0, _ = denoise(x, now)
        middle, h = x0, after.half_log_snr - now.half_log_snr
        if i > 0 and after.noise > 0:
            middle = x0 + h / (2 * h_before) * (x0 - before)
        x = after.noise / now.noise * x - after.signal * math.expm1(-h) * middle
        before, h_before = x0, h
        yield now, x


def unipc(denoise, x, grid, draw=None):
    """UniPC-2, B2(h) = exp(h) - 1, on x0 (Zhao et al. 2023, arXiv 2302.04867, algorithms 1-2 and appendix A).

    Each call first corrects the step that led to it, then predicts the next: one call a step. The first step and a
    step to sigma = 0 are of first order. The states are the predicted ones.
    """
    x0s, last, corrected, h, h_before = [], None, None, None, None
    for i, (now, after) in enumerate(grid.steps):
        x0, _ = denoise(x, now)
        if i > 0:  # corrector: the step from `last` again, now that x0 is known at its end too
            b1 = -1 / math.expm1(-h) - 1 / h
            change = (x0 - x0s[-1]) / 2
            if i > 1:
                b2 = -1 / math.expm1(-h) - 2 * b1 / h
                back = -h_before / h
                w = (b2 - b1) / (back - 1)
                change = w / back * (x0s[-2] - x0s[-1]) + (b1 - w) * (x0 - x0s[-1])
            x = now.noise / last.noise * corrected - now.signal * math.expm1(-h) * (x0s[-1] + change)
        last, corrected, h_before, h = now, x, h, after.half_log_snr - now.half_log_snr
        middle = x0
        if i > 0 and after.noise > 0:
            middle = x0 + h / (2 * h_before) * (x0 - x0s[-1])
        x = after.noise / now.noise * x - after.signal * math.expm1(-h) * middle
        x0s = [*x0s[-1:], x0]
        yield now, x


by_name = {
    "ddpm": ddpm, "ddim": ddim, "pndm": pndm, "euler": euler, "euler_a": euler_a, "heun": heun,
    "dpm++2m": dpmpp_2m, "dpm++2m_karras": dpmpp_2m, "unipc": unipc,
}
GRIDS = {
    "ddpm": ddpm_grid, "ddim": ddim_grid, "pndm": ddim_grid, "euler": euler_grid, "euler_a": euler_grid,
    "heun": euler_grid, "dpm++2m": dpm_grid, "dpm++2m_karras": karras_grid, "unipc": dpm_grid,
}


def options_of(name):
    """The set of a sampler's and its grid's options: "eta", "spacing" ..."""
    return _options(by_name[name]) | _options(GRIDS[name])


def _options(function):
    """The names of a function's keyword-only parameters."""
    return set(function.__kwdefaults__ or ())
