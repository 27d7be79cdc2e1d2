"""Text to image, image to image and in-painting with Stable Diffusion: three ways to begin, one way to denoise.

Each is called as task(sd, run, batch) and returns latents [B, C, h, w]. `StableDiffusion.generate` checks what the user
gives, and calls one of them for every batch. Below the tasks stands what they are made of: denoising, noise, the
picture that is edited; then the checks.
"""

import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from nanodiff import fast, rng
from nanodiff.diffusion import guidance, process, samplers
from nanodiff.diffusion.grid import Grid
from nanodiff.errors import check, check_finite, nearest

OUTPUTS = ("pil", "tensor", "latents")


@dataclass
class Run:
    """How to sample: the same for every batch."""
    sampler: str
    grid: Grid
    options: dict  # the sampler's own, such as eta
    guidance: float  # scale of classifier-free guidance; 1: off
    guidance_start: float  # share of the T time steps, from noise on, in which guidance does not act
    strength: float  # share of the steps that an edit takes
    on_step: Callable | None
    progress: bool


@dataclass
class Batch:
    """What B pictures are made of; the last three are None where they do not apply."""
    texts: tuple  # text states [B, 77, D] of the prompts, and of the negative texts
    noise: torch.Tensor  # [B, C, h, w] of unit variance
    draw: Callable  # draw(i, x): the noise that step i adds
    original: torch.Tensor | None  # latents [B, C, h, w] of the picture that is edited
    keep: torch.Tensor | None  # [B, 1, h, w], 1 where the original stays
    condition: torch.Tensor | None  # [B, C + 1, h, w], what a U-Net of nine channels is shown of the original


# --- the three tasks ------------------------------------------------------------------------------------------------

def text_to_image(sd, run, batch):
    """Latents made of noise alone (Rombach et al. 2022, arXiv 2112.10752; report figure 38)."""
    return denoise(sd, run, batch, run.grid, run.grid.begin(batch.noise))


def image_to_image(sd, run, batch):
    """Latents made of the noised original: SDEdit (Meng et al. 2021, arXiv 2108.01073). See `Grid.cut` for strength."""
    grid = run.grid.cut(run.strength)
    return denoise(sd, run, batch, grid, grid.begin(batch.noise, batch.original))


def inpaint(sd, run, batch):
    """Latents of which a part is kept and the rest made anew: the original is put into every estimate of x0.

    So the kept part has its own noise at every level (Lugmayr et al. 2022, arXiv 2201.09865, algorithm 1 without
    resampling). With strength 1 the rest begins as noise alone. A U-Net of nine channels is shown the original instead.
    """
    if batch.condition is not None:
        return text_to_image(sd, run, batch) if run.strength == 1 else image_to_image(sd, run, batch)

    def put_original(x0):
        return batch.keep * batch.original + (1 - batch.keep) * x0

    grid, first_input = run.grid.cut(run.strength), None
    x = grid.begin(batch.noise, batch.original)
    if run.strength == 1:
        x = grid.begin(batch.keep * x + (1 - batch.keep) * batch.noise)
        first_input = batch.noise  # as in diffusers, the network sees no trace of the original in its first call
    return put_original(denoise(sd, run, batch, grid, x, put_original, first_input))


# --- denoising ------------------------------------------------------------------------------------------------------

def denoise(sd, run, batch, grid, x, clip=None, first_input=None):
    """The last state [B, C, h, w] of the run's sampler on a grid, from its first state x.

    clip         a function of the estimates of x0
    first_input  what the network is shown in the place of x at the first level
    Diverged, with the step, when a state is not finite.
    """
    predict = predictor(sd, run, batch, grid)
    if first_input is not None:
        guided, predict = predict, lambda x, level: guided(first_input if level == grid.levels[0] else x, level)
    network = samplers.Denoiser(predict, sd.kind, clip)
    finite, started, show = [], time.time(), run.progress and sys.stderr.isatty()
    for i, (level, x) in enumerate(samplers.by_name[run.sampler](network, x, grid, batch.draw, **run.options)):
        finite.append(x.isfinite().all())
        if x.device.type == "cpu":  # a GPU is not made to wait for this at every step
            check_finite(finite, i)
        if show:
            show_progress(grid, level, started)
        if run.on_step:
            run.on_step(i, level.t_like(x), x)
    check_finite(finite)
    if show:
        print("\r" + 40 * " " + "\r", end="", file=sys.stderr, flush=True)
    return x


def predictor(sd, run, batch, grid):
    """predict(x, level): the U-Net's prediction, guided away from the negative texts where guidance acts."""
    dtype = sd.unet.dtype
    wanted, negative = (states.to(dtype) for states in batch.texts)
    both = torch.cat([negative, wanted])  # [2B, 77, D]; once a run, as are its keys and values and the embeddings of t
    unet = fast.once_a_run(sd.unet, [level.t for level in grid.levels[:-1]])

    def network(x, level, context):
        t = level.t_like(x) if sd.compiled else level.t
        if batch.condition is not None:
            x = torch.cat([x, batch.condition.repeat(len(x) // len(batch.condition), 1, 1, 1)], 1)
        return unet(x.to(dtype), t, context).float()  # the state stays float32

    def unguided(x, level):
        return network(x, level, wanted)

    def guided(x, level):
        return guidance.combine(network(torch.cat([x, x]), level, both), run.guidance)

    if run.guidance == 1:
        return unguided
    return guidance.below((1 - run.guidance_start) * sd.schedule.T, guided, unguided)


def show_progress(grid, level, started):
    """Writes which step of the grid is done, and the seconds that are left, over the last line of stderr."""
    steps = len(grid.steps)
    done = min(grid.levels.index(level) + 1, steps)
    left = (time.time() - started) / done * (steps - done)
    print(f"\rstep {done} of {steps}, {left:.0f} s left ", end="", file=sys.stderr, flush=True)


# --- noise ----------------------------------------------------------------------------------------------------------

class Noise:
    """Where the noise of `total` pictures comes from: a seed, a generator, a list with one for each, or given noises.

    seed, first  picture i has the numbers of (seed, first + i), whatever is drawn beside it
    noises       noises[i] is the noise that step i adds, [total or 1, C, h, w]
    """

    def __init__(self, total, device, seed=None, first=0, generator=None, noises=None):
        check(seed is None or generator is None, "a seed and a generator were given; expected one of them")
        several = isinstance(generator, (list, tuple))
        check(not several or len(generator) == total, f"{len(generator) if several else 1} generators were given for "
              f"{total} pictures; expected one, or one each")
        self.seed = int.from_bytes(os.urandom(4), "little") if seed is None else seed
        self.number = torch.arange(first, first + total, device=device)
        self.generator, self.noises = generator, noises

    def draw(self, shape, stream):
        """[total, *shape] of unit variance; stream: see `rng`."""
        if self.generator is None:
            return rng.normal(self.seed, 0, self.number, shape, stream)
        return process.randn_like(torch.empty(len(self.number), *shape, device=self.number.device), self.generator)

    def of_steps(self, rows, shape):
        """The function draw(i, x) of the pictures `rows` [B]: the noise of latents of a shape that step i adds."""
        if self.noises is not None:
            total, device = len(self.number), self.number.device
            noises = [noise.to(device).expand(total, *shape)[rows] for noise in self.noises]
            return samplers.step_noise(noises=noises)
        if self.generator is None:
            return samplers.step_noise(noises=rng.StepNoises(self.seed, self.number[rows], shape))
        several = isinstance(self.generator, (list, tuple))
        return samplers.step_noise(generator=[self.generator[i] for i in rows.tolist()] if several else self.generator)


def first_noise(sd, latents, shape, noise):
    """[total, *shape] of unit variance: the latents that the user gave, or drawn."""
    if latents is None:
        return noise.draw(shape, rng.SAMPLING)
    total, sides = len(noise.number), [sd.factor * side for side in shape[1:]]
    check(latents.shape == (total, *shape), f"latents have shape {list(latents.shape)}; expected {[total, *shape]} for "
          f"{total} pictures of {sides[0]}x{sides[1]}")
    return latents.to(sd.device, torch.float32)


# --- the picture that is edited -------------------------------------------------------------------------------------

def latent_shape(sd, height=None, width=None):
    """(C, h, w) of the latents of a picture of height x width pixels; None: as the U-Net has been trained."""
    size = sd.settings["unet"].get("sample_size") or 64
    sides = [size, size] if isinstance(size, int) else list(size)
    for i, pixels in enumerate((height, width)):
        if pixels is not None:
            near = max(1, round(pixels / sd.factor)) * sd.factor
            check(0 < pixels <= 2**14 and pixels % sd.factor == 0, f"{('height', 'width')[i]} is {pixels}; expected a "
                  f"multiple of {sd.factor} pixels up to {2**14}, nearest: {min(near, 2**14)}")
            sides[i] = pixels // sd.factor
    return (sd.unet.config.out_channels, *sides)


def read_edit(sd, image, mask, size, noise):
    """(original, keep, condition) as `Batch` has them, for one or for all pictures; all None without an image.

    image, mask: what the user gave or None; size: see `read_image`. UserError for what does not fit this model.
    """
    check_task(sd, image, mask)
    if image is None:
        return None, None, None
    total = len(noise.number)
    image = read_image(sd, image, size, total)
    original = encode(sd, image, noise, rng.EDITED) if image.shape[1] == 3 else image
    if mask is None:
        return original, None, None
    mask = read_mask(sd, mask, total)
    new = F.interpolate(mask, original.shape[2:], mode="nearest")
    if sd.unet.config.in_channels == sd.unet.config.out_channels:
        return original, 1 - new, None
    rest = encode(sd, image * (1 - F.interpolate(mask, image.shape[2:], mode="nearest")), noise, rng.MASKED)
    return original, 1 - new, torch.cat([new.expand(total, -1, -1, -1), rest], 1)


def check_task(sd, image, mask):
    """UserError unless this U-Net can work with what is given: an inpainting model needs a mask, a mask an image."""
    takes, gives = sd.unet.config.in_channels, sd.unet.config.out_channels
    check(takes in (gives, 2 * gives + 1), f"this U-Net takes {takes} channels; expected {gives}, or {2 * gives + 1} "
          "of an inpainting model")
    check(takes == gives or mask is not None, f"this U-Net takes {takes} channels: an inpainting model wants a mask")
    check(mask is None or image is not None, "a mask was given without an image; expected the picture it belongs to")


def read_image(sd, image, size, total):
    """Pixels [B, 3, H, W] in a size that the model takes, or latents [B, C, h, w], from what a user calls an image.

    size   (height, width) in pixels that were asked for; None: the image's own
    total  pictures that are made: B is 1, or as many. UserError for any other image
    """
    from nanodiff.data import images
    x, gives = images.given(image), sd.unet.config.out_channels
    check(x.shape[1] in (3, gives) and x.is_floating_point(), f"the image has {x.shape[1]} channels of {x.dtype}; "
          f"expected 3, or {gives} of a latent, of floating-point numbers")
    check(len(x) in (1, total), f"{len(x)} images were given for {total} pictures; expected 1, or one each")
    height, width = size
    if x.shape[1] == 3:
        check(-1.01 <= float(x.min()) and float(x.max()) <= 1.01, f"the image goes from {float(x.min()):g} to "
              f"{float(x.max()):g}; expected -1 to 1")
        sides = [max(1, round(side / sd.factor)) * sd.factor for side in x.shape[2:]]
        _, h, w = latent_shape(sd, height or sides[0], width or sides[1])
        return images.resize(x, h * sd.factor, w * sd.factor).to(sd.device)
    sides = [sd.factor * side for side in x.shape[2:]]
    check([height or sides[0], width or sides[1]] == sides, "the image is latents of another height and width "
          f"than were asked for; expected none, or {sides[0]} and {sides[1]}")
    check(sd.unet.config.in_channels == gives, "an inpainting model of nine channels wants the picture itself; "
          "expected no latents")
    return x.to(sd.device, torch.float32)


def read_mask(sd, mask, total):
    """[B, 1, H, W] of 0 and 1 (paint anew), B is 1 or total."""
    from nanodiff.data import images
    mask = images.given_mask(mask).to(sd.device)
    check(len(mask) in (1, total), f"{len(mask)} masks were given for {total} pictures; expected 1, or one each")
    return mask


def encode(sd, pixels, noise, stream):
    """Scaled latents [total, C, h, w] of pixels [1 or total, 3, H, W]: a draw from their posterior for each picture."""
    posterior = sd.posterior(pixels)
    drawn = noise.draw(posterior.mean.shape[1:], stream)
    return (posterior.mean + (0.5 * posterior.logvar).exp() * drawn) * sd.autoencoder.config.scaling_factor


# --- texts and checks -----------------------------------------------------------------------------------------------

def pair_texts(prompt, negative, n):
    """(prompts, negative texts): two lists of one length, from a text or a list each."""
    prompts = list(prompt) if isinstance(prompt, (list, tuple)) else [prompt]
    negatives = list(negative) if isinstance(negative, (list, tuple)) else [negative or ""] * len(prompts)
    check(prompts and n >= 1, f"{len(prompts)} prompts and n = {n} were given; expected at least one of each")
    check(len(negatives) == len(prompts), f"{len(negatives)} negative texts were given for {len(prompts)} prompts; "
          "expected one for all, or one for each")
    return prompts, negatives


def check_run(sd, sampler, steps, guidance=1.0, guidance_start=0.0, strength=1.0, options=()):
    """UserError unless the model can be sampled so; options: names of further keywords for the sampler and its grid."""
    check(sampler in samplers.by_name, f'sampler "{sampler}" is unknown; expected one of '
          f"{', '.join(samplers.by_name)}{nearest(sampler, samplers.by_name)}")
    check(isinstance(steps, int) and 1 <= steps <= sd.schedule.T, f"steps is {steps}; expected 1 to the schedule's "
          f"{sd.schedule.T}")
    check(isinstance(guidance, (int, float)) and abs(guidance) < 1e4, f"guidance is {guidance}; expected about 7.5")
    check(0 <= guidance_start < 1, f"guidance_start is {guidance_start}; expected a share from 0 to below 1, as 0.2")
    takes = samplers.options_of(sampler)
    for name in options:
        check(name in takes, f'"{name}" is no option of {sampler}; expected one of {", ".join(sorted(takes))}'
              + nearest(name, takes))
    check(0 < strength <= 1, f"strength is {strength}; expected above 0 and up to 1, such as 0.8")


def check_output(sd, output="pil", skip_last=0, tile=0):
    """UserError unless there are such an output, so many layers to skip, and such tiles."""
    layers = len(sd.text_model.encoder.layers)
    check(0 <= skip_last <= layers, f"skip_last is {skip_last}; expected 0 to {layers}, the text model's layers")
    check(tile == 0 or tile >= 2, f"tile is {tile}; expected 0, or at least 2 latent pixels, such as 64")
    check(output in OUTPUTS, f'output "{output}" is unknown; expected {", ".join(OUTPUTS)}{nearest(output, OUTPUTS)}')
