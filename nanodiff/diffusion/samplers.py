"""Samplers: from noise to a picture in few steps. Each is one function, to be read from top to bottom.

All are called as

    sampler(denoise, x, schedule, steps, *, kind="noise", noises=None, generator=None, on_step=None, ...)

denoise    a function (x [B, ...], t [B]) -> what the network predicts; t is int64 where every step of the run is
           a whole number, else float (float64 for float64 x, else float32)
x          start noise [B, ...] of unit variance; never changed in place
kind       what denoise predicts: "noise", "x0" or "v"
noises     noises[i] is the noise that step i adds, so that a run can be replayed; otherwise it is drawn from
generator  one torch.Generator, or a list with one for each sample, on the device of x
on_step    called as on_step(i, t, x) after model call i with the t [B] that the model was given and the state that
           followed, in the sampler's own space: sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise for ddpm, ddim, pndm,
           dpmpp_2m and unipc; x0 + sigma noise for euler, euler_a and heun
clip       None, or a bound: x0 is cut to [-clip, clip] and the noise derived again from it; or a function that returns
           another x0, such as one with the known part of a picture put in (inpainting)
spacing, offset    which t are visited, see `Schedule.timesteps`
sigmas     a grid of one's own instead: steps + 1 falling values of sigma = sqrt((1 - alpha_bar) / alpha_bar), of which
           only the last may be 0; t is interpolated in log sigma and stays within the schedule's 0 ... T-1
image, strength    start from a clean picture [B, ...] with x as its noise (SDEdit, Meng et al. 2021, arXiv 2108.01073):
           the last max(1, int(steps * strength)) steps are taken. Strength is a share of the steps, not of the noise.

They return the last state. ValueError: a wrong kind, spacing, sigmas or strength; kind "noise" with zero terminal SNR.
All coefficients are Python floats made before the loop, so that a run on a GPU never waits for the host.
"""

import inspect
import math

import numpy as np
import torch

from . import process


# --- the grid: which t are visited, and how much noise there is ------------------------------------------------------

def _alpha_bar_grid(schedule, steps, spacing, offset, final_alpha, sigmas):
    """Steps t, and alpha_bar of the states before, between and after them (one value more)."""
    if final_alpha not in ("first", "one"):
        raise ValueError(f'final_alpha must be "first" or "one", not "{final_alpha}"')
    if sigmas is not None:
        t, sigma = _own_grid(schedule, steps, sigmas)
        return t, [1 / (1 + s**2) for s in sigma]
    table = schedule.alpha_bar.tolist()
    t = schedule.timesteps(steps, spacing, offset).tolist()
    return t, [table[i] for i in t] + [table[0] if final_alpha == "first" else 1.0]


def _sigma_grid(schedule, steps, spacing, offset, karras, sigmas, whole):
    """Steps t, and sigma of the states before, between and after them (one value more); `whole` rounds t."""
    if sigmas is not None:
        return _own_grid(schedule, steps, sigmas)
    table = _sigma_table(schedule)
    t = schedule.timesteps(steps, spacing, offset).tolist()
    if not whole and spacing == "linspace":
        t = np.linspace(0, schedule.T - 1, steps)[::-1].tolist()
    elif whole and spacing != "trailing" and steps < schedule.T:  # the last of steps + 1 is left to the clean picture
        t = schedule.timesteps(steps + 1, spacing, offset).tolist()[:-1]
    sigma = np.interp(t, np.arange(schedule.T), table).tolist()
    if karras:  # Karras et al. 2022, equation 5 with rho = 7
        top, bottom = (table[-1], table[0]) if whole else (sigma[0], sigma[-1])
        ramp = np.linspace(0, 1, steps)
        sigma = ((top ** (1 / 7) + ramp * (bottom ** (1 / 7) - top ** (1 / 7))) ** 7).tolist()
        t = _t_of_sigma(schedule, sigma)
        t = [round(i) for i in t] if whole else t
    return t, sigma + [0.0]


def _own_grid(schedule, steps, sigmas):
    sigma = [float(s) for s in sigmas]
    if len(sigma) != steps + 1 or sigma[-1] < 0 or not all(a > b for a, b in zip(sigma, sigma[1:])):
        raise ValueError(f"sigmas must be {steps + 1} strictly falling numbers for {steps} steps, none below 0")
    return _t_of_sigma(schedule, [s for s in sigma if s > 0]), sigma


def _sigma_table(schedule):
    """sqrt((1 - alpha_bar) / alpha_bar) [T]; where no signal is left (zero terminal SNR) 4096 stands for infinity, and
    what little a schedule leaves otherwise counts as it is: diffusers does both."""
    alpha_bar = schedule.alpha_bar.numpy()
    alpha_bar = np.where(alpha_bar > 0, alpha_bar, 2.0**-24)
    return np.sqrt((1 - alpha_bar) / alpha_bar)


def _t_of_sigma(schedule, sigma):
    return np.interp(np.log(sigma), np.log(_sigma_table(schedule)), np.arange(schedule.T)).tolist()


def _skip_steps(t, levels, image, strength):
    """The last steps of a grid, as many as an edit of this strength takes; the cut falls between two whole steps."""
    if not 0 < strength <= 1:
        raise ValueError(f"strength must be above 0 and at most 1, not {strength}")
    steps = len(levels) - 1
    skipped = 0 if image is None else steps - max(1, int(steps * strength + 1e-9))  # 50 * 0.58 is a little below 29
    return t[skipped:], levels[skipped:]


# --- what the loops share --------------------------------------------------------------------------------------------

def _tensors(t, x):
    """Every step t as the tensor [B] that the network is given."""
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    if all(i == int(i) for i in t):
        dtype = torch.int64
    return [torch.full((len(x),), i, dtype=dtype, device=x.device) for i in t]


def _x0_and_noise(prediction, kind, x, signal, sigma, clip):
    """What the prediction says x = signal * x0 + sigma * noise is made of, where signal^2 + sigma^2 = 1."""
    x0 = process.x0_from(prediction, kind, x, signal, sigma)
    if clip is None:
        return x0, process.noise_from(prediction, kind, x, signal, sigma)
    x0 = clip(x0) if callable(clip) else x0.clamp(-clip, clip)
    return x0, (x - signal * x0) / sigma


def _ask_at_sigma(denoise, x, t, sigma, kind, clip):
    """One model call in sigma space: the network sees x = x0 + sigma * noise scaled to unit variance."""
    signal = 1 / math.sqrt(sigma**2 + 1)
    prediction = denoise(signal * x, t)
    return _x0_and_noise(prediction, kind, signal * x, signal, signal * sigma, clip)


def _step_noise(noises, i, x, generator):
    return process.randn_like(x, generator) if noises is None else noises[i].to(x.dtype)


def _start_at_sigma(x, image, sigma, spacing, sigmas):
    """x0 + sigma * noise to start from. Leading grids start low, where x0's unit variance counts beside the noise."""
    if image is not None:
        return image + sigma * x
    return x * (math.sqrt(sigma**2 + 1) if spacing == "leading" and sigmas is None else sigma)


# --- samplers whose state is x_t = sqrt(alpha_bar) x0 + sqrt(1 - alpha_bar) noise ------------------------------------

def ddpm(denoise, x, schedule, steps, *, kind="noise", noises=None, generator=None, on_step=None, clip=None,
         variance="small", spacing="leading", offset=1, sigmas=None, image=None, strength=1.0):
    """Ancestral sampling, a draw from the posterior at every step (Ho et al. 2020, arXiv 2006.11239, algorithm 2).

    variance "small" is the posterior's own, "large" the step's beta (section 3.2).
    """
    process.check_kind(schedule, kind)
    if variance not in ("small", "large"):
        raise ValueError(f'variance must be "small" or "large", not "{variance}"')
    t, alpha_bar = _alpha_bar_grid(schedule, steps, spacing, offset, "one", sigmas)
    t, alpha_bar = _skip_steps(t, alpha_bar, image, strength)
    ends_at_0, t = t[-1] == 0, _tensors(t, x)
    if image is not None:
        x = math.sqrt(alpha_bar[0]) * image + math.sqrt(1 - alpha_bar[0]) * x
    for i in range(len(alpha_bar) - 1):
        now, after = alpha_bar[i], alpha_bar[i + 1]
        alpha = now / after  # of the one step that takes `after` to `now`
        x0, _ = _x0_and_noise(denoise(x, t[i]), kind, x, math.sqrt(now), math.sqrt(1 - now), clip)
        x = (math.sqrt(after) * (1 - alpha) * x0 + math.sqrt(alpha) * (1 - after) * x) / (1 - now)
        std = math.sqrt((1 - alpha) * ((1 - after) / (1 - now) if variance == "small" else 1))
        if std > 0 and not (ends_at_0 and after == 1):
            x = x + std * _step_noise(noises, i, x, generator)
        if on_step:
            on_step(i, t[i], x)
    return x


def ddim(denoise, x, schedule, steps, *, kind="noise", noises=None, generator=None, on_step=None, clip=None,
         eta=0.0, spacing="leading", offset=1, final_alpha="first", sigmas=None, image=None, strength=1.0):
    """DDIM (Song et al. 2021, arXiv 2010.02502, equation 12): with eta = 0 no noise is added, with eta = 1 as in DDPM.

    final_alpha "first" ends at alpha_bar[0], as Stable Diffusion does, and so leaves a trace of noise; "one" at x0.
    """
    process.check_kind(schedule, kind)
    t, alpha_bar = _alpha_bar_grid(schedule, steps, spacing, offset, final_alpha, sigmas)
    t, alpha_bar = _skip_steps(t, alpha_bar, image, strength)
    t = _tensors(t, x)
    if image is not None:
        x = math.sqrt(alpha_bar[0]) * image + math.sqrt(1 - alpha_bar[0]) * x
    for i in range(len(alpha_bar) - 1):
        now, after = alpha_bar[i], alpha_bar[i + 1]
        x0, noise = _x0_and_noise(denoise(x, t[i]), kind, x, math.sqrt(now), math.sqrt(1 - now), clip)
        std = eta * math.sqrt((1 - after) / (1 - now) * (1 - now / after))
        x = math.sqrt(after) * x0 + math.sqrt(max(1 - after - std**2, 0)) * noise
        if std > 0:
            x = x + std * _step_noise(noises, i, x, generator)
        if on_step:
            on_step(i, t[i], x)
    return x


def pndm(denoise, x, schedule, steps, *, kind="noise", noises=None, generator=None, on_step=None, clip=None,
         average="prediction", spacing="leading", offset=1, final_alpha="first", sigmas=None, image=None, strength=1.0):
    """PLMS: DDIM with the last four predictions averaged (Liu et al. 2022, arXiv 2202.09778, equation 12).

    The first step is taken twice, the second time with the mean of both its ends: steps + 1 model calls (one for one
    step). What is averaged is the network's own "prediction", as everybody else's Stable Diffusion does; for kind "v"
    that is not the paper's method, and average="noise", which turns each prediction into noise first, is.
    """
    process.check_kind(schedule, kind)
    if average not in ("prediction", "noise"):
        raise ValueError(f'average must be "prediction" or "noise", not "{average}"')
    t, alpha_bar = _alpha_bar_grid(schedule, steps, spacing, offset, final_alpha, sigmas)
    t, alpha_bar = _skip_steps(t, alpha_bar, image, strength)
    signal, sigma = [math.sqrt(a) for a in alpha_bar], [math.sqrt(1 - a) for a in alpha_bar]
    t = _tensors(t, x)
    if image is not None:
        x = signal[0] * image + sigma[0] * x
    weights = {1: (1,), 2: (3 / 2, -1 / 2), 3: (23 / 12, -16 / 12, 5 / 12), 4: (55 / 24, -59 / 24, 37 / 24, -9 / 24)}
    n = len(alpha_bar) - 1
    asked = [0, 1, *range(1, n)] if n > 1 else [0]  # the state that call i sees
    taken = [0, 0, *range(1, n)] if n > 1 else [0]  # the step that it makes
    start, history = x, []  # history: predictions, the newest first
    for i, (here, step) in enumerate(zip(asked, taken)):
        prediction = denoise(x, t[here])
        if average == "noise":
            prediction = process.noise_from(prediction, kind, x, signal[here], sigma[here])
        if i == 1:
            x, mean = start, (prediction + history[0]) / 2
        else:
            history = [prediction, *history[:3]]
            mean = sum(w * p for w, p in zip(weights[len(history)], history))
        x0, noise = _x0_and_noise(
            mean, "noise" if average == "noise" else kind, x, signal[step], sigma[step], clip)
        x = signal[step + 1] * x0 + sigma[step + 1] * noise
        if on_step:
            on_step(i, t[here], x)
    return x


# --- samplers whose state is x0 + sigma * noise ----------------------------------------------------------------------

def euler(denoise, x, schedule, steps, *, kind="noise", noises=None, generator=None, on_step=None, clip=None,
          karras=False, spacing="linspace", offset=0, sigmas=None, image=None, strength=1.0):
    """Euler's method for dx/dsigma = noise (Karras et al. 2022, arXiv 2206.00364, algorithm 1 without line 8)."""
    process.check_kind(schedule, kind)
    t, sigma = _sigma_grid(schedule, steps, spacing, offset, karras, sigmas, whole=False)
    t, sigma = _skip_steps(t, sigma, image, strength)
    t, x = _tensors(t, x), _start_at_sigma(x, image, sigma[0], spacing, sigmas)
    for i in range(len(sigma) - 1):
        x0, noise = _ask_at_sigma(denoise, x, t[i], sigma[i], kind, clip)
        x = x0 + sigma[i + 1] * noise  # = x + (sigma' - sigma) noise
        if on_step:
            on_step(i, t[i], x)
    return x


def euler_a(denoise, x, schedule, steps, *, kind="noise", noises=None, generator=None, on_step=None, clip=None,
            spacing="linspace", offset=0, sigmas=None, image=None, strength=1.0):
    """Ancestral Euler: step down further than the next sigma and add the noise that is missing there (k-diffusion).

    The shares are the posterior's: down = sigma'^2 / sigma, up^2 = sigma'^2 (sigma^2 - sigma'^2) / sigma^2.
    """
    process.check_kind(schedule, kind)
    t, sigma = _sigma_grid(schedule, steps, spacing, offset, False, sigmas, whole=False)
    t, sigma = _skip_steps(t, sigma, image, strength)
    t, x = _tensors(t, x), _start_at_sigma(x, image, sigma[0], spacing, sigmas)
    for i in range(len(sigma) - 1):
        x0, noise = _ask_at_sigma(denoise, x, t[i], sigma[i], kind, clip)
        down = sigma[i + 1] ** 2 / sigma[i]
        up = math.sqrt(sigma[i + 1] ** 2 - down**2)
        x = x0 + down * noise
        if up > 0:
            x = x + up * _step_noise(noises, i, x, generator)
        if on_step:
            on_step(i, t[i], x)
    return x


def heun(denoise, x, schedule, steps, *, kind="noise", noises=None, generator=None, on_step=None, clip=None,
         karras=False, spacing="linspace", offset=0, sigmas=None, image=None, strength=1.0):
    """Heun's second order method: Euler, then again with the mean slope (Karras et al. 2022, algorithm 1).

    Two model calls a step, one for a step to sigma = 0: 2 * steps - 1 in all.
    """
    process.check_kind(schedule, kind)
    t, sigma = _sigma_grid(schedule, steps, spacing, offset, karras, sigmas, whole=False)
    t, sigma = _skip_steps(t, sigma, image, strength)
    t, x = _tensors(t, x), _start_at_sigma(x, image, sigma[0], spacing, sigmas)
    for i in range(len(sigma) - 1):
        x0, noise = _ask_at_sigma(denoise, x, t[i], sigma[i], kind, clip)
        predicted = x0 + sigma[i + 1] * noise
        if on_step:
            on_step(2 * i, t[i], predicted)
        if sigma[i + 1] == 0:
            return predicted
        _, noise_there = _ask_at_sigma(denoise, predicted, t[i + 1], sigma[i + 1], kind, clip)
        x = x + (sigma[i + 1] - sigma[i]) * (noise + noise_there) / 2
        if on_step:
            on_step(2 * i + 1, t[i + 1], x)
    return x


# --- multistep samplers in log-SNR: x_t as in DDIM, sigma as in Euler ------------------------------------------------
# With x_t = signal * y, y = x0 + sigma * noise, a step in which x0 stays the same is y' = r y + (1 - r) x0 with
# r = sigma' / sigma = exp(-h), where h is the step in half the log-SNR, -log sigma.

def dpmpp_2m(denoise, x, schedule, steps, *, kind="noise", noises=None, generator=None, on_step=None, clip=None,
             karras=False, spacing="linspace", offset=0, sigmas=None, image=None, strength=1.0):
    """DPM-Solver++(2M): x0 extrapolated to the middle of the step (Lu et al. 2022, arXiv 2211.01095, algorithm 2).

    First order are the first step, which has no history, and a step to sigma = 0, where log-SNR is infinite.
    """
    process.check_kind(schedule, kind)
    t, sigma = _sigma_grid(schedule, steps, spacing, offset, karras, sigmas, whole=True)
    t, sigma = _skip_steps(t, sigma, image, strength)
    signal = [1 / math.sqrt(1 + s**2) for s in sigma]
    t = _tensors(t, x)
    if image is not None:
        x = signal[0] * (image + sigma[0] * x)
    before = h_before = None
    for i in range(len(sigma) - 1):
        x0, _ = _x0_and_noise(denoise(x, t[i]), kind, x, signal[i], signal[i] * sigma[i], clip)
        r, middle = sigma[i + 1] / sigma[i], x0
        h = -math.log(r) if r > 0 else math.inf
        if i > 0 and r > 0:
            middle = x0 + h / (2 * h_before) * (x0 - before)
        x = signal[i + 1] * (r / signal[i] * x + (1 - r) * middle)
        before, h_before = x0, h
        if on_step:
            on_step(i, t[i], x)
    return x


def dpmpp_2m_karras(denoise, x, schedule, steps, **options):
    """`dpmpp_2m` on the noise levels of Karras et al. 2022 (equation 5, rho = 7), t rounded to whole steps."""
    return dpmpp_2m(denoise, x, schedule, steps, karras=True, **options)


def unipc(denoise, x, schedule, steps, *, kind="noise", noises=None, generator=None, on_step=None, clip=None,
          karras=False, spacing="linspace", offset=0, sigmas=None, image=None, strength=1.0):
    """UniPC-2, B2(h) = exp(h) - 1, on x0 (Zhao et al. 2023, arXiv 2302.04867, algorithms 1-2 and appendix A).

    Each model call first corrects the step that led to it and then predicts the next: one call a step. The first step
    and a step to sigma = 0 are first order. on_step sees the predictions.
    """
    process.check_kind(schedule, kind)
    t, sigma = _sigma_grid(schedule, steps, spacing, offset, karras, sigmas, whole=True)
    t, sigma = _skip_steps(t, sigma, image, strength)
    signal = [1 / math.sqrt(1 + s**2) for s in sigma]
    t = _tensors(t, x)
    if image is not None:
        x = signal[0] * (image + sigma[0] * x)
    y, x0s, h_before = None, [], None  # y: the corrected state where the last step began, over its signal
    for i in range(len(sigma) - 1):
        x0, _ = _x0_and_noise(denoise(x, t[i]), kind, x, signal[i], signal[i] * sigma[i], clip)
        if i > 0:  # corrector: the step from i - 1 again, with the slope of x0 that is now known at its end
            r, h = sigma[i] / sigma[i - 1], math.log(sigma[i - 1] / sigma[i])
            b1 = 1 / (1 - r) - 1 / h
            change = (x0 - x0s[-1]) / 2
            if i > 1:
                b2 = 1 / (1 - r) - 2 * b1 / h
                back = -h_before / h
                w = (b2 - b1) / (back - 1)
                change = w / back * (x0s[-2] - x0s[-1]) + (b1 - w) * (x0 - x0s[-1])
            x = signal[i] * (r * y + (1 - r) * (x0s[-1] + change))
            h_before = h
        y = x / signal[i]
        r, middle = sigma[i + 1] / sigma[i], x0
        if i > 0 and r > 0:
            middle = x0 - math.log(r) / (2 * h_before) * (x0 - x0s[-1])
        x = signal[i + 1] * (r * y + (1 - r) * middle)
        x0s = [*x0s[-1:], x0]
        if on_step:
            on_step(i, t[i], x)
    return x


def visited(sampler, schedule, steps, like, **options):
    """The t [1] that a sampler shows the network, one tensor a call: found by running it on one pixel of 0.

    like: a tensor of the dtype and device that the run will have; options: the run's own.
    """
    seen, zero = [], like.new_zeros(1, 1, 1, 1)

    def look(x, t):
        seen.append(t)
        return x

    options |= {"noises": [zero] * (steps + 1), "generator": None, "on_step": None, "clip": None}
    if options.get("image") is not None:
        options["image"] = zero
    sampler(look, zero, schedule, steps, **options)
    return seen


by_name = {
    "ddpm": ddpm, "ddim": ddim, "pndm": pndm, "euler": euler, "euler_a": euler_a, "heun": heun,
    "dpm++2m": dpmpp_2m, "dpm++2m_karras": dpmpp_2m_karras, "unipc": unipc,
}


def options_of(name):
    """The keywords of a sampler that are a user's choice, such as "eta" and "spacing"."""
    ours = {"denoise", "x", "schedule", "steps", "kind", "noises", "generator", "on_step", "image", "strength", "clip"}
    return set(inspect.signature(by_name[name.removesuffix("_karras")]).parameters) - ours
