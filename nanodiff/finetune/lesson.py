"""What a fine-tuning learns from: pictures as latents, their captions as text states, and pictures that are held out.

A script loads a frozen model (`load_model`) and pictures (`load_pictures`) before anything is written. `make_lesson`
encodes them once. The loop takes latents, noise and time steps from `noisy_batch`; which caption a picture gets stands
in the script. Report: sections 4.2.1 to 4.2.5, tables 5 to 16.
"""

from dataclasses import dataclass

import torch
from torch import nn

import nanodiff
from nanodiff import rng, worlds
from nanodiff.classifiers import worlds as world_classifier
from nanodiff.data.captions import is_plain
from nanodiff.data.images import some_of, spread
from nanodiff.errors import check
from nanodiff.formats.diffusers_folder import schedule_from, schedule_settings
from nanodiff.pipelines.stable_diffusion import SHIPPED
from nanodiff.training import datasets, latents
from nanodiff.training.batches import Batches
from nanodiff.worlds import prompts as world_prompts

REPORT_PROMPTS = ("two zebras", "a horse on a beach")  # what the report asks a fine-tuned Stable Diffusion for
WOVEN = 450  # slices of drawn specimens in a lesson, 50 of each class
HELD_OUT = 128  # pictures of the held-out loss, at most


def check_flags(config):
    """UserError where the common flags of the five scripts contradict each other."""
    check(not config.retention or any(part.strip() for part in config.retention.split("|")),
          f'--retention is "{config.retention}"; expected prompts with | between')
    check(not config.names or config.data == "woven", f"--names is for --data woven, not for {config.data}; remove it")
    worlds.chosen(config.names, worlds.WOVEN, worlds.WOVEN)


def load_model(path, base_dtype="fp32"):
    """The StableDiffusion of a path ("": the one that ships), frozen, float32 on the CPU; its U-Net in base_dtype."""
    sd = nanodiff.load(path or None)
    for net in (sd.text_model, sd.unet, sd.autoencoder):
        net.requires_grad_(False)
    if base_dtype == "bf16":
        sd.unet.to(torch.bfloat16)
    channels_in, channels_out = sd.unet.config.in_channels, sd.unet.config.out_channels
    check(channels_in == channels_out, f"--model {path} is an inpainting model, whose U-Net takes {channels_in} "
          f"channels; expected one that takes {channels_out}")
    return sd


def end_in_noise(sd):
    """Rescales a model's schedule so that it ends in pure noise, and makes its samplers start there: trailing steps."""
    sd.settings["scheduler"] |= {**schedule_settings(sd.schedule.zero_terminal_snr()), "timestep_spacing": "trailing"}
    sd.schedule, sd.kind = schedule_from(sd.settings["scheduler"])


# --- pictures ---------------------------------------------------------------------------------------------------------

def picture_side(size, sd):
    """The pictures' side in pixels: size, or (0) the model's own; UserError when it does not fit the autoencoder."""
    f, own = sd.factor, sd.settings["unet"].get("sample_size") or 64
    side = size or (own if isinstance(own, int) else own[0]) * f
    check(side % f == 0, f"--size {side} does not fit latents {f} times smaller; expected a multiple of {f}, such as "
          f"{max(1, round(side / f)) * f}")
    return side


def is_drawn(name):
    """True when --data names pictures that nanodiff draws, as many as one wants; False for a folder."""
    return name == "woven" or name in worlds.DRAWN


def load_pictures(config, sd, caption=""):
    """(training, held out): data sets of colour pictures with captions, from the pictures that --data names.

    caption: of all of them ("": their own). At most HELD_OUT pictures are held out.
    """
    side = picture_side(config.size, sd)
    training, held_out = (draw_pictures if is_drawn(config.data) else read_pictures)(config, side)
    for images, kind in ((training, "training"), (held_out, "held-out")):
        if caption:
            images.captions = [caption] * len(images)
        check(images.captions is not None, f"the {kind} pictures of --data {config.data} have no captions; expected "
              "--instance_prompt TEXT, or a folder with captions (see nanodiff/data/caption_files.py)")
    check(config.batch <= len(training), f"--batch {config.batch} is more than the {len(training)} pictures of --data "
          f"{config.data}; expected at most that")
    return training, held_out


def draw_pictures(config, side):
    """(training, held out): slices of drawn specimens, or pictures of one drawn class."""
    print("drawing the pictures: less than a minute", flush=True)
    load = worlds.cut if config.data == "woven" else worlds.load
    options = dict(seed=config.seed, workers=max(1, config.workers))
    names = worlds.chosen(config.names, worlds.WOVEN, worlds.WOVEN) if config.data == "woven" else (config.data,)
    return (load("train", side, config.pictures or WOVEN, names=names, **options),
            load("test", side, HELD_OUT, names=tuple(dict.fromkeys(names)), **options))


def read_pictures(config, side):
    """(training, held out): the pictures or slices of a folder."""
    check(not config.pictures, f"--pictures is for drawn pictures, not for --data {config.data}; expected a folder "
          "that holds as many as you want")
    training = datasets.load(config.data, "train", size=side, channels=3, seed=config.seed)
    held_out, name = datasets.load_held_out(config.data, training, seed=config.seed)
    print(f"held-out loss: {name.rstrip(',')}", flush=True)
    check(not getattr(config, "patience", 0) or not name.startswith("training"), "--patience waits for a loss on "
          f"pictures that are not trained on, and --data {config.data} holds none; expected some in {config.data}/test")
    return training, some_of(held_out, spread(held_out, HELD_OUT))


# --- the lesson -------------------------------------------------------------------------------------------------------

@dataclass
class Lesson:
    """Latents with captions, their batches, and prompts for previews: [(prompt, the classifier's class or None)]."""
    config: object
    training: latents.Latents
    held_out: latents.Latents
    batches: Batches
    prompts: list  # every different caption, at most 12
    retention: list  # what the model could draw before


def make_lesson(config, sd, run, training, held_out):
    """The Lesson of two data sets, encoded once. Moves the model to the run's device, sets --gradient_checkpointing."""
    sd.unet.checkpointing = config.gradient_checkpointing
    for net in (sd.text_model, sd.unet, sd.autoencoder):
        net.to(run.device)
    crops = 1 if config.data in worlds.DRAWN else config.variants
    encoded, held_out_latents = (latents.encode(sd.autoencoder, images, variants, seed=config.seed, say=run.print)
                                 for images, variants in ((training, crops), (held_out, 1)))
    batches = Batches(encoded, config.batch, config.seed, config.gradient_accumulation, run.rank, run.world)
    prompts = caption_classes(training, is_drawn(config.data))
    index = torch.linspace(0, len(prompts) - 1, min(12, len(prompts))).round().long().tolist()
    return Lesson(config, encoded, held_out_latents, batches, [prompts[i] for i in index], retention_prompts(config))


def caption_classes(images, drawn):
    """[(caption, class)] of every different caption: the classifier's class of its pictures, None if it has none.

    drawn: the pictures are drawn ones. The classifier has never seen others.
    """
    classes = {caption: set() for caption in images.captions}
    if images.labels is not None and drawn:
        for caption, label in zip(images.captions, images.labels.tolist()):
            classes[caption].add(images.classes[label])
    known = world_classifier.load_classifier().classes
    return [(caption, min(names) if len(names) == 1 and names <= set(known) else None)
            for caption, names in classes.items()]


def retention_prompts(config):
    """[(prompt, class or None)] of what the model could draw before: --retention, or some of its own world's."""
    if config.retention:
        return [(prompt.strip(), None) for prompt in config.retention.split("|") if prompt.strip()]
    if config.model and config.model != str(SHIPPED):
        return [(prompt, None) for prompt in REPORT_PROMPTS]
    names = worlds.BASE[::len(worlds.BASE) // 12][:12]
    return [(prompt, name) for prompt, name, _ in world_prompts.prompts(1, names, split="val") if is_plain(prompt)]


def noisy_batch(lesson, run, sd, step, micro):
    """x0 and t, noise like x0, index [B] into the lesson and position [B] in the step: a micro-batch of latents."""
    x0, index, position = lesson.batches.get(step, micro)
    x0, position = x0.to(run.device), position.to(run.device)
    t = rng.time_steps(lesson.config.seed, step, position, sd.schedule.T)
    return x0, t, step_noise(lesson.config, step, position, x0.shape[1:]), index, position


def step_noise(config, step, position, shape, stream=rng.NOISE):
    """A step's noise [B, *shape] for the pictures at `position` [B], with the offset noise of --noise_offset."""
    return rng.noise(config.seed, step, position, shape, config.noise_offset, stream)


def caption_rows(config, step, index, position, stream=rng.DROPOUT):
    """The rows [B] of `encode_captions` for a step's pictures: `index` [B], or -1 where the caption is dropped."""
    dropped = rng.uniform(config.seed, stream, step, position) < config.caption_dropout
    return torch.where(dropped.cpu(), -1, index)


def random_rows(config, step, position, n):
    """The rows [B] of `encode_captions` for a step's pictures at `position` [B]: each of n sentences as likely."""
    return (rng.uniform(config.seed, rng.WORDING, step, position) * n).long().cpu()


# --- captions ---------------------------------------------------------------------------------------------------------

def encode_captions(sd, captions, learning):
    """A function of rows [B] of captions to what `Denoiser` takes of them. Row -1 is the empty caption.

    learning: False gives text states [B, 77, D], encoded once; True gives token ids [B, 77], since the text encoder or
    its table of words learns.
    """
    ids = sd.tokenizer([*captions, ""])
    if learning:
        return lambda rows: ids[rows].to(sd.device)
    text_states = latents.cache_text_states(sd.text_model, ids)
    return lambda rows: text_states(rows % len(ids))


class Denoiser(nn.Module):
    """Text encoder and U-Net as one module, so that DistributedDataParallel can average the gradients of both."""

    def __init__(self, sd):
        super().__init__()
        self.text_model, self.unet = sd.text_model, sd.unet

    def forward(self, x_t, t, *captions):
        """The U-Net's prediction [B, C, h, w] for x_t, t [B] and captions: text states or token ids, B rows in all."""
        return self.unet(x_t, t, torch.cat([self.text_states(rows) for rows in captions]))

    def text_states(self, rows):
        """Text states [B, 77, D] of token ids [B, 77], each different caption encoded once; text states stay."""
        if rows.is_floating_point():
            return rows
        ids, place = rows.unique(dim=0, return_inverse=True)
        with torch.autocast(rows.device.type, enabled=False):
            return self.text_model(ids)[0][place]
