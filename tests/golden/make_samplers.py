"""Makes schedules.safetensors, samplers.safetensors and timesteps.json with diffusers (0.42.1) as the reference.

Run it where diffusers is installed, from the repository's root: python tests/golden/make_samplers.py
The model is the exact posterior mean of a small mixture, so every number can be had again from the files alone.
diffusers keeps float32 tables; here the names float32 in its modules stand for float64 while it runs.
"""

import importlib
import json
import math
import pathlib

import numpy as np
import torch
from safetensors.torch import save_file

HERE = pathlib.Path(__file__).resolve().parent
BETAS = dict(num_train_timesteps=1000, beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
LEADING = dict(BETAS, timestep_spacing="leading", steps_offset=1)
LINEAR = dict(num_train_timesteps=1000, beta_start=1e-4, beta_end=0.02, beta_schedule="linear")
MODULES = {
    "ddpm": ("scheduling_ddpm", "DDPMScheduler"), "ddim": ("scheduling_ddim", "DDIMScheduler"),
    "pndm": ("scheduling_pndm", "PNDMScheduler"), "euler": ("scheduling_euler_discrete", "EulerDiscreteScheduler"),
    "euler_a": ("scheduling_euler_ancestral_discrete", "EulerAncestralDiscreteScheduler"),
    "heun": ("scheduling_heun_discrete", "HeunDiscreteScheduler"),
    "dpm++2m": ("scheduling_dpmsolver_multistep", "DPMSolverMultistepScheduler"),
    "unipc": ("scheduling_unipc_multistep", "UniPCMultistepScheduler"),
}
MODULES["dpm++2m_karras"] = MODULES["dpm++2m"]
KINDS = {"noise": "epsilon", "x0": "sample", "v": "v_prediction"}
DEFAULTS = {  # Stable Diffusion's configurations; diffusers' own defaults for the samplers in sigma
    "ddpm": dict(LEADING, clip_sample=False), "ddim": dict(LEADING, clip_sample=False, set_alpha_to_one=False),
    "pndm": dict(LEADING, skip_prk_steps=True, set_alpha_to_one=False),
    "euler": BETAS, "euler_a": BETAS, "heun": BETAS, "dpm++2m": BETAS, "unipc": BETAS,
    "dpm++2m_karras": dict(BETAS, use_karras_sigmas=True),
}
TRAILING = dict(timestep_spacing="trailing", steps_offset=0)
ZERO_SNR = dict(BETAS, **TRAILING, rescale_betas_zero_snr=True)
# name of the case: sampler, diffusers' configuration, step arguments, kind
VARIANTS = {
    "ddim_eta_half": ("ddim", DEFAULTS["ddim"], dict(eta=0.5), "noise"),
    "ddim_eta_one": ("ddim", DEFAULTS["ddim"], dict(eta=1.0), "noise"),
    "ddim_alpha_one": ("ddim", dict(BETAS, clip_sample=False), {}, "noise"),
    "ddim_zero_snr": ("ddim", dict(ZERO_SNR, clip_sample=False), {}, "v"),
    "ddim_clip": ("ddim", dict(LINEAR, clip_sample=True), dict(use_clipped_model_output=True), "noise"),
    "ddpm_clip": ("ddpm", dict(LINEAR, clip_sample=True), {}, "noise"),
    "ddpm_large": ("ddpm", dict(LINEAR, clip_sample=False, variance_type="fixed_large"), {}, "noise"),
    "ddpm_trailing": ("ddpm", dict(BETAS, **TRAILING, clip_sample=False), {}, "noise"),
    "pndm_alpha_one": ("pndm", dict(BETAS, skip_prk_steps=True, set_alpha_to_one=True), {}, "noise"),
    "euler_leading": ("euler", LEADING, {}, "noise"),
    "euler_trailing": ("euler", dict(BETAS, **TRAILING), {}, "noise"),
    "euler_karras": ("euler", dict(BETAS, use_karras_sigmas=True), {}, "noise"),
    "euler_zero_snr": ("euler", ZERO_SNR, {}, "v"),
    "euler_a_leading": ("euler_a", LEADING, {}, "noise"),
    "heun_karras": ("heun", dict(BETAS, use_karras_sigmas=True), {}, "noise"),
    "dpm++2m_leading": ("dpm++2m", LEADING, {}, "noise"),
    "dpm++2m_trailing": ("dpm++2m", dict(BETAS, **TRAILING), {}, "noise"),
    "dpm++2m_ends_above_0": (
        "dpm++2m", dict(BETAS, final_sigmas_type="sigma_min", lower_order_final=False), {}, "noise"),
    "unipc_leading": ("unipc", LEADING, {}, "noise"),
    "unipc_karras": ("unipc", dict(BETAS, use_karras_sigmas=True), {}, "noise"),
}


class With:
    """A module seen with some of its names exchanged."""

    def __init__(self, module, **names):
        self.__dict__.update(names, _module=module)

    def __getattr__(self, name):
        return getattr(self._module, name)


def scheduler_class(sampler, noises=None):
    """diffusers' class in float64, taking its step noises from an iterator."""
    module = importlib.import_module("diffusers.schedulers." + MODULES[sampler][0])
    module.torch, module.np = With(torch, float32=torch.float64), With(np, float32=np.float64)
    module.randn_tensor = lambda *args, **kwargs: next(noises)
    return getattr(module, MODULES[sampler][1])


def predict(mixture, scheduler, x, t, kind):
    """The posterior mean of the mixture as a prediction; sigma is linear between whole t."""
    alpha_bar = (1 - scheduler.betas.double()).cumprod(0).numpy()
    if t == int(t):
        a = float(alpha_bar[int(t)])
    else:
        a = 1 / (1 + float(np.interp(t, np.arange(len(alpha_bar)), np.sqrt((1 - alpha_bar) / alpha_bar))) ** 2)
    means, stds, weights = (mixture[k].numpy() for k in ("means", "stds", "weights"))
    y = x.numpy()
    score = np.zeros_like(y)
    for b in range(len(y)):  # Tweedie: noise = -sigma * score, with the score of each component and its share
        variance = a * stds**2 + 1 - a
        away = math.sqrt(a) * means - y[b]
        share = weights * np.exp(-0.5 * (away**2).sum(1) / variance) / variance ** (y.shape[1] / 2)
        score[b] = (share[:, None] * away / variance[:, None]).sum(0) / share.sum()
    noise = -math.sqrt(1 - a) * score
    if kind == "noise":
        return torch.from_numpy(noise)
    x0 = (y + (1 - a) * score) / math.sqrt(a) if a > 0 else (weights[:, None] * means).sum(0) + 0 * y
    return torch.from_numpy(x0 if kind == "x0" else math.sqrt(a) * noise - math.sqrt(1 - a) * x0)


def run(sampler, config, step_arguments, kind, steps, mixture):
    scheduler = scheduler_class(sampler, iter(mixture["noises"]))(**config, prediction_type=KINDS[kind])
    scheduler.set_timesteps(steps)
    x = mixture["x"] * float(scheduler.init_noise_sigma)
    states, seen = [], []
    for t in scheduler.timesteps:
        seen.append(float(t))
        prediction = predict(mixture, scheduler, scheduler.scale_model_input(x, t), seen[-1], kind)
        x = scheduler.step(prediction, t, x, **step_arguments).prev_sample
        states.append(x.clone())
    return torch.stack(states), torch.tensor(seen, dtype=torch.float64), getattr(scheduler, "sigmas", None)


def make_trajectories():
    draw = torch.Generator().manual_seed(20)
    tables = {
        "means": torch.tensor([[-0.9, 0.4, 0.2], [0.6, 0.7, -0.8], [1.2, -1.0, 0.5]], dtype=torch.float64),
        "stds": torch.tensor([0.3, 0.15, 0.5], dtype=torch.float64),
        "weights": torch.tensor([0.5, 0.2, 0.3], dtype=torch.float64),
        "x": torch.randn(2, 3, generator=draw, dtype=torch.float64),
        "noises": torch.randn(25, 2, 3, generator=draw, dtype=torch.float64),
    }
    cases = {f"{sampler}|{kind}": (sampler, config, {}, kind) for sampler, config in DEFAULTS.items() for kind in KINDS
             if (sampler, kind) not in (("pndm", "x0"), ("euler_a", "x0"))}  # which diffusers does not have
    cases |= {f"{name}|{case[3]}": case for name, case in VARIANTS.items()}
    result = dict(tables)
    for name, case in cases.items():
        for steps in (10, 25):
            states, seen, sigmas = run(*case, steps, tables)
            result[f"{name}|{steps}/states"], result[f"{name}|{steps}/t"] = states, seen
            if "ends_above_0" in name:
                result[f"{name}|{steps}/sigmas"] = sigmas.double().clone()
    save_file({k: v.contiguous() for k, v in result.items()}, HERE / "samplers.safetensors")


def make_schedules():
    """Full tables for T = 50; every 37th row and the last for T = 1000. Posterior tables as numpy has them."""
    result = {}
    for kind, start, end in (("linear", 1e-4, 0.02), ("scaled_linear", 0.00085, 0.012), ("squaredcos_cap_v2", 0, 0)):
        for T in (50, 1000):
            for zero_snr in (False, True):
                scheduler = scheduler_class("ddpm")(num_train_timesteps=T, beta_start=start, beta_end=end,
                                                    beta_schedule=kind, rescale_betas_zero_snr=zero_snr)
                beta = scheduler.betas.double().numpy()
                alpha_bar = np.cumprod(1 - beta)
                before = np.append(1.0, alpha_bar[:-1])
                with np.errstate(divide="ignore"):
                    tables = dict(
                        beta=beta, alpha_bar=alpha_bar, snr=alpha_bar / (1 - alpha_bar),
                        sigma=np.sqrt((1 - alpha_bar) / alpha_bar),
                        posterior_variance=beta * (1 - before) / (1 - alpha_bar),
                        posterior_mean_x0=beta * np.sqrt(before) / (1 - alpha_bar),
                        posterior_mean_xt=(1 - before) * np.sqrt(1 - beta) / (1 - alpha_bar))
                rows = np.arange(T) if T == 50 else np.append(np.arange(0, T, 37), T - 1)
                for name, table in tables.items():
                    result[f"{kind}|{T}|{zero_snr}|{name}"] = torch.from_numpy(table[rows].copy())
    save_file(result, HERE / "schedules.safetensors")


def make_timesteps():
    spacings = {"default": {}, "leading": dict(timestep_spacing="leading", steps_offset=0), "trailing": TRAILING,
                "linspace": dict(timestep_spacing="linspace", steps_offset=0)}
    result = {}
    for sampler, config in DEFAULTS.items():
        for spacing, change in spacings.items():
            for steps in (1, 3, 10, 26, 30, 48):
                if sampler == "dpm++2m_karras" and spacing != "default":
                    continue
                scheduler = scheduler_class(sampler)(**{**config, **change})
                scheduler.set_timesteps(steps)
                result[f"{sampler}|{spacing}|{steps}"] = [round(float(t), 9) for t in scheduler.timesteps]
    (HERE / "timesteps.json").write_text(json.dumps(result, separators=(",", ":")) + "\n")


if __name__ == "__main__":
    torch.set_default_dtype(torch.float64)
    make_schedules()
    make_timesteps()
    make_trajectories()
