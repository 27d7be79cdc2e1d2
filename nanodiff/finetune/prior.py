"""Prior preservation (DreamBooth): pictures of a class noun, so that it keeps its meaning while a word is learned.

The model is trained on "a sks texture" with the new pictures and on "a texture" with pictures that it drew itself
before:

    loss = E |prediction - target|^2 (new pictures)  +  prior_loss_weight * E |prediction - target|^2 (class pictures)

Without the second term the noun drifts to the new pictures. With --teacher_predictions the second target is what the
model predicted for that noisy picture before fine-tuning, in place of the noise (or v) that was put in. This is the
mean of all answers that fit, so far fewer pictures preserve far more.
Source: Ruiz et al. 2022 (arXiv 2208.12242), section 3.2; Li & Hoiem 2016 (arXiv 1606.09282) for a model's own
predictions as targets; report section 4.2.3, tables 9 to 12.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from nanodiff import fast, plots, rng, worlds
from nanodiff.data import folder
from nanodiff.data.captions import is_plain
from nanodiff.data.images import Images
from nanodiff.diffusion import process
from nanodiff.errors import check
from nanodiff.finetune.lesson import Denoiser, caption_rows, encode_captions, is_drawn, picture_side, step_noise
from nanodiff.pipelines.stable_diffusion import AT_ONCE as LATENT_PIXELS
from nanodiff.training import latents
from nanodiff.training.batches import Batches

AT_ONCE = 16  # class pictures that are drawn in one call
FLAGS = ("class_prompt", "class_data", "num_class_images", "class_batch", "teacher_predictions", "prior_loss_weight")


def check_flags(config):
    """UserError where the flags of prior preservation contradict each other or the lesson's."""
    if not config.with_prior_preservation:
        for field in dataclasses.fields(config):
            check(field.name not in FLAGS or getattr(config, field.name) == field.default, f"--{field.name} is for "
                  "prior preservation; expected --with_prior_preservation with it")
        return
    prompt, count = config.class_prompt, config.num_class_images
    check(prompt or config.class_data, 'prior preservation needs the class noun; expected --class_prompt, such as "a '
          'woven texture"')
    check(config.instance_prompt or config.data == "woven" or not is_drawn(config.data), "the new pictures need a word "
          'of their own; expected --instance_prompt, such as "a sks woven texture", or a folder whose captions have it')
    check(not prompt or class_prompts(config), f'--class_prompt "{prompt}" holds no prompt; expected one, or several '
          "with | between")
    check(not prompt or prompt != config.instance_prompt, f'--class_prompt and --instance_prompt are both "{prompt}"; '
          "expected a word more in --instance_prompt")
    batch, flag = config.class_batch or config.batch, "class_batch" if config.class_batch else "batch"
    check(batch <= count, f"--{flag} {batch} is more than --num_class_images {count}; expected at most that")
    check(not (prompt and config.class_data == "worlds"), "--class_data worlds has captions of its own; remove "
          "--class_prompt, or name the folder for its pictures")
    if not prompt and config.class_data != "worlds":
        check(Path(config.class_data).is_dir(), f"--class_data {config.class_data} is no folder; expected one of "
              "pictures with captions, worlds, or --class_prompt, of which pictures can be drawn")
        found = len(folder.find(config.class_data))
        check(found >= count, f"--class_data {config.class_data} holds {found} pictures; expected --num_class_images "
              f"{count} or more, or --class_prompt, of which more can be drawn")


# --- class pictures ---------------------------------------------------------------------------------------------------

def class_prompts(config):
    """The prompts of --class_prompt."""
    return [prompt.strip() for prompt in config.class_prompt.split("|") if prompt.strip()]


def draw_class_pictures(config, sd, side, place, say=print):
    """A folder with --num_class_images pictures of --class_prompt, of several in turn; sd draws those that are missing.

    Picture i depends on the seed and i alone, so that an interrupted run continues where it stopped. sd must be the
    model before fine-tuning. Returns the folder's first --num_class_images pictures as a data set.
    """
    place = Path(place)
    place.mkdir(parents=True, exist_ok=True)
    found, prompts = folder.find(place) if any(place.iterdir()) else [], class_prompts(config)
    if len(found) < config.num_class_images:
        say(f"{len(found)} of {config.num_class_images} class pictures are in {place}; the others are drawn")
    with fast.packed(sd.unet):
        for first in range(len(found), config.num_class_images, AT_ONCE):
            batch = [prompts[i % len(prompts)] for i in range(first, min(first + AT_ONCE, config.num_class_images))]
            x = sd.generate(batch, steps=config.sample_steps, guidance=config.guidance or None, sampler=config.sampler,
                            seed=config.seed, first=first, height=side, width=side, output="tensor", progress=False)
            for i, (image, prompt) in enumerate(zip(x, batch), first):
                plots.save(plots.to_pil(image), place / f"class-{i:04d}.png", {"prompt": prompt})
    files = folder.find(place)[:config.num_class_images]
    return folder.Folder(place, side, 3, captions=[prompts[i % len(prompts)] for i in range(len(files))], files=files)


def read_class_pictures(config, side):
    """The first --num_class_images pictures of --class_data with captions of their own, as a data set.

    Of the drawn worlds only those whose captions are plain (captions.is_plain).
    """
    n = config.num_class_images
    if config.class_data == "worlds":
        world = worlds.load("train", side, n, seed=config.seed + 1, workers=max(1, config.workers))
        index = [i for i, caption in enumerate(world.captions) if is_plain(caption)]
        return Images(world.pixels[index], captions=[world.captions[i] for i in index])
    data = folder.Folder(config.class_data, side, 3, files=folder.find(config.class_data)[:n])
    check(data.captions is not None, f"--class_data {config.class_data} has no captions; expected --class_prompt, or a "
          "folder with captions (see nanodiff/data/caption_files.py)")
    return data


def class_pictures(config, sd, run):
    """The class pictures of a run as a data set, drawn by rank 0 where they are missing."""
    side = picture_side(config.size, sd)
    if not config.class_prompt:
        return read_class_pictures(config, side)
    run.open()  # drawing may take long: an interrupted run can be resumed in it
    place = config.class_data or run.folder / "class"
    if run.rank == 0:
        draw_class_pictures(config, sd, side, place, run.print)
    run.wait()
    return draw_class_pictures(config, sd, side, place, run.print)


# --- the prior batch --------------------------------------------------------------------------------------------------

@dataclass
class Prior:
    """What `prior_batch` needs: batches of class pictures as latents, and their prompts for the Denoiser."""
    config: object
    batches: Batches
    captions: object  # rows [B] -> text states or token ids, see lesson.encode_captions
    teacher_predictions: object = None  # [N, --teacher_predictions, C, h, w]; None: the targets are the noise put in


def make_prior(config, sd, run, learning=False):
    """The Prior of a run, or None without --with_prior_preservation; call it before sd is changed.

    learning: whether the text encoder learns. Class pictures are drawn where they are missing.
    """
    if not config.with_prior_preservation:
        return None
    data = class_pictures(config, sd, run)
    batch, flag = config.class_batch or config.batch, "class_batch" if config.class_batch else "batch"
    check(batch <= len(data), f"--{flag} {batch} is more than the {len(data)} class pictures; expected at most that")
    encoded = latents.encode(sd.autoencoder, data, 1, seed=config.seed, say=run.print)
    batches = Batches(encoded, batch, config.seed + 1, config.gradient_accumulation, run.rank, run.world)
    prior = Prior(config, batches, encode_captions(sd, encoded.captions, learning))
    if config.teacher_predictions:
        prior.teacher_predictions = teacher_predictions(prior, run, sd, len(encoded))
    return prior


@torch.no_grad()
def teacher_predictions(prior, run, sd, n):
    """What the model predicts for the noisy copies of each of n class pictures: [n, --teacher_predictions, C, h, w]."""
    predictions, denoise = [], Denoiser(sd)
    pixels = prior.batches.data.shape[1] * prior.batches.data.shape[2]  # of a latent
    with fast.packed(sd.unet):
        for numbers in torch.arange(n * prior.config.teacher_predictions).split(max(1, LATENT_PIXELS // pixels)):
            x0, t, noise, captions = noisy_copies(prior, run, sd, numbers)
            with run.autocast():
                predictions.append(denoise(process.q_sample(sd.schedule, x0, t, noise), t, captions).float())
    return torch.cat(predictions).unflatten(0, (n, -1))


def noisy_copies(prior, run, sd, numbers):
    """x0, t, noise, captions of noisy copies [B] of class pictures, --teacher_predictions of each picture. A copy
    depends on its number alone."""
    index = numbers // prior.config.teacher_predictions
    return add_noise(prior, run, sd, prior.batches.data.read(index, numbers), index, 0, numbers)


def add_noise(prior, run, sd, x0, index, step, position):
    """x0, t, noise, captions of class pictures. Noise and time steps are not those of the new pictures; captions are
    dropped as theirs are."""
    config, x0, position = prior.config, x0.to(run.device), position.to(run.device)
    noise = step_noise(config, step, position, x0.shape[1:], stream=rng.PRIOR_NOISE)
    t = (rng.uniform(config.seed, rng.PRIOR_TIME, step, position) * sd.schedule.T).long()
    return x0, t, noise, prior.captions(caption_rows(config, step, index, position, stream=rng.PRIOR_DROPOUT))


def prior_batch(prior, run, sd, step, micro):
    """A micro-batch of class pictures, to be concatenated after the instance batch: x0, t, noise, target, captions."""
    if prior.teacher_predictions is None:
        x0, index, position = prior.batches.get(step, micro)
        x0, t, noise, captions = add_noise(prior, run, sd, x0, index, step, position)
        return x0, t, noise, process.target(sd.schedule, sd.kind, x0, noise, t), captions
    index, _, position = prior.batches.plan(step, micro)  # the indices alone: a noisy copy reads its own latent
    copies = prior.config.teacher_predictions
    copy = (rng.uniform(prior.config.seed, rng.PRIOR_COPY, step, position) * copies).long()
    x0, t, noise, captions = noisy_copies(prior, run, sd, copies * index + copy)
    return x0, t, noise, prior.teacher_predictions[index, copy].to(run.device), captions
