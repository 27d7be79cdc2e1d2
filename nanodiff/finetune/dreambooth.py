"""DreamBooth: a rare word and a class noun for a few pictures, and pictures of the class noun so that it keeps its meaning.

The model is trained on "a sks texture" with the new pictures and, beside them, on "a texture" with pictures that it drew
itself before it was changed:

    loss = E |prediction - target|^2 (new pictures)  +  prior_weight * E |prediction - target|^2 (class pictures)

Without the second term the noun drifts to the new pictures. With --class_answers the second target is not the noise (or
v) that was put in but what the model itself said of that noisy picture before it was taught: the mean of what can be said,
so that far fewer pictures keep far more.
Source: Ruiz et al. 2022 (arXiv 2208.12242), sections 3.1 (identifiers) and 3.2 (prior preservation); Li & Hoiem 2016
(arXiv 1606.09282) for a model's own answers as targets; report section 4.2.3, tables 9 to 12.
"""

import dataclasses
from dataclasses import dataclass
from pathlib import Path

import torch

from nanodiff import plots, rng, worlds
from nanodiff.data import captions, folder, images
from nanodiff.diffusion import process
from nanodiff.errors import UserError, check
from nanodiff.finetune import teaching
from nanodiff.pipelines.stable_diffusion import AT_ONCE as LATENT_PIXELS
from nanodiff.training import latents
from nanodiff.training.batches import Batches

AT_ONCE = 16  # class pictures that are drawn in one call


@dataclass
class PriorConfig:
    class_prompt: str = ""  # the prompt without the new word, such as "a woven texture"; or several, with | between
    class_pictures: str = ""  # their folder, filled up (default: the run's); with no prompt: one with captions, or worlds
    class_count: int = 100  # pictures of it
    class_batch: int = 0  # of them in a micro-batch (0: as many as --batch)
    class_answers: int = 0  # noisy copies of each whose target is the model's answer from before (0: the noise put in)
    prior_weight: float = 1.0  # of the loss on them


@dataclass
class Prior:
    """What `beside` needs: batches of class pictures as latents, the text states of their prompts, and answers to keep."""
    config: object
    batches: Batches
    states: object  # rows [B] -> [B, 77, D]
    answers: object = None  # [N, --class_answers, C, h, w]; None: the targets are what was put in


def wanted(config):
    """Whether the flags ask for prior preservation."""
    return bool(config.class_prompt or config.class_pictures)


def check_flags(config, on=True):
    """UserError for every flag whose value alone is wrong; on: whether prior preservation is asked for."""
    if not on:
        for field in dataclasses.fields(PriorConfig):
            check(getattr(config, field.name) == field.default, f"--{field.name} is for prior preservation; expected "
                  f"{'--dreambooth' if hasattr(config, 'dreambooth') else '--class_prompt'} with it")
        return
    check(wanted(config), "prior preservation needs the class noun; expected --class_prompt, such as \"a woven "
          "texture\"")
    check(config.prompt or config.data == "woven" or not teaching.is_drawn(config.data), "the new pictures need a word "
          "of their own; expected --prompt, such as \"a sks woven texture\", or a folder whose captions have it")
    if config.class_prompt:
        check(class_prompts(config), f'--class_prompt "{config.class_prompt}" holds no prompt; expected one, or several with '
              "| between")
        check(config.class_prompt != config.prompt, f'--class_prompt and --prompt are both "{config.prompt}"; expected a '
              "word more in --prompt")
    check(config.class_batch >= 0, f"--class_batch is {config.class_batch}; expected 1 or more, or 0 for as many as --batch")
    check(config.class_answers >= 0, f"--class_answers is {config.class_answers}; expected 0 or more, such as 2")
    check(config.class_count >= 1, f"--class_count is {config.class_count}; expected 1 or more")
    batch, flag = config.class_batch or config.batch, "class_batch" if config.class_batch else "batch"
    check(batch <= config.class_count, f"--{flag} {batch} is more than --class_count {config.class_count}; expected at most "
          "that")
    check(not (config.class_prompt and config.class_pictures == "worlds"), "--class_pictures worlds have captions of their "
          "own; expected no --class_prompt, or the folder for its pictures")
    if not config.class_prompt and config.class_pictures != "worlds":
        check(Path(config.class_pictures).is_dir(), f"--class_pictures {config.class_pictures} is no folder; expected one of "
              "pictures with captions, worlds, or --class_prompt, of which pictures can be drawn")
        there = len(folder.find(config.class_pictures))
        check(there >= config.class_count, f"--class_pictures {config.class_pictures} holds {there} pictures; expected "
              f"--class_count {config.class_count} or more, or --class_prompt, of which more can be drawn")
    check(config.prior_weight >= 0, f"--prior_weight is {config.prior_weight}; expected 0 or more, such as 1")


def class_prompts(config):
    """The prompts of --class_prompt."""
    return [prompt.strip() for prompt in config.class_prompt.split("|") if prompt.strip()]


def class_pictures(config, sd, side, where, say=print):
    """A folder with --class_count pictures of --class_prompt, of several in turn: those there are, the others by `sd`.

    Picture i depends on the seed and i alone, so that a broken run goes on where it stopped. sd must be the model as
    it was before it was taught. Returns the folder's first --class_count pictures as a data set.
    """
    where = Path(where)
    where.mkdir(parents=True, exist_ok=True)
    found, prompts = folder.find(where) if any(where.iterdir()) else [], class_prompts(config)
    missing = config.class_count - len(found)
    if missing > 0:
        say(f"{len(found)} of {config.class_count} class pictures are in {where}; the others are drawn")
    for first in range(len(found), config.class_count, AT_ONCE):
        said = [prompts[i % len(prompts)] for i in range(first, min(first + AT_ONCE, config.class_count))]
        x = sd.generate(said, steps=config.sample_steps, guidance=config.guidance or None,
                        sampler=config.sampler, seed=config.seed, first=first, height=side, width=side, output="tensor",
                        progress=False)
        for i, one in enumerate(x, first):
            plots.save(plots.to_pil(one), where / f"class-{i:04d}.png", {"prompt": said[i - first]})
    files = folder.find(where)[:config.class_count]
    return folder.Folder(where, side, 3, captions=[prompts[i % len(prompts)] for i in range(len(files))], files=files)


def known_pictures(config, side):
    """The first --class_count pictures of --class_pictures with captions of their own, as a data set.

    Of the drawn worlds only those whose captions are plain (captions.is_plain).
    """
    n = config.class_count
    if config.class_pictures == "worlds":
        found = worlds.load("train", side, n, seed=config.seed + 1, workers=max(1, config.workers))
        rows = [i for i, caption in enumerate(found.captions) if captions.is_plain(caption)]
        return images.Images(found.pixels[rows], captions=[found.captions[i] for i in rows])
    found = folder.Folder(config.class_pictures, side, 3, files=folder.find(config.class_pictures)[:n])
    check(found.captions is not None, f"--class_pictures {config.class_pictures} has no captions; expected --class_prompt, "
          "or a folder with captions (see nanodiff/data/caption_files.py)")
    return found


def prior(config, sd, side, run, live=False):
    """The Prior of a run; draws class pictures where they are missing and asks for answers, so sd must not have been
    taught yet."""
    if config.class_prompt:
        run.open()  # the drawing may take long: a run that is broken off in it goes on where it was
        if run.rank == 0:
            class_pictures(config, sd, side, config.class_pictures or run.folder / "class", run.print)
        run.wait()
        data = class_pictures(config, sd, side, config.class_pictures or run.folder / "class", run.print)
    else:
        data = known_pictures(config, side)
    batch = config.class_batch or config.batch
    check(batch <= len(data), f"{'--class_batch' if config.class_batch else '--batch'} {batch} is more than the {len(data)} "
          "class pictures; expected at most that")
    known = latents.encode(sd.autoencoder, data, 1, seed=config.seed, say=run.print)
    batches = Batches(known, batch, config.seed + 1, config.accumulate, run.rank, run.world)
    made = Prior(config, batches, teaching.states(sd, known.captions, live))
    if config.class_answers:
        made.answers = answers(made, run, sd, len(known))
    return made


@torch.no_grad()
def answers(prior, run, sd, n):
    """What the model says of --class_answers noisy copies of each of n class pictures: [n, --class_answers, C, h, w]."""
    found = []
    pixels = prior.batches.data.shape[1] * prior.batches.data.shape[2]  # of a latent
    for some in torch.arange(n * prior.config.class_answers).split(max(1, LATENT_PIXELS // pixels)):
        x0, t, noise, context = noisy_copy(prior, run, sd, some)
        with run.autocast():
            found.append(sd.unet(process.q_sample(sd.schedule, x0, t, noise), t, context).float())
    return torch.cat(found).unflatten(0, (n, -1))


def noisy_copy(prior, run, sd, number):
    """Noisy copies [B] of class pictures, each of which follows from its number (--class_answers to a picture) alone:
    x0, t, noise, context."""
    index = number // prior.config.class_answers
    return noisy(prior, run, sd, prior.batches.data.read(index, number), index, 0, number)


def noisy(prior, run, sd, x0, index, step, position):
    """x0, t, noise, context of class pictures; noise and time steps are not the new pictures'. Some captions are left
    out, as theirs are."""
    config, x0, position = prior.config, x0.to(run.device), position.to(run.device)
    noise = teaching.noise_of(config, step, position, x0.shape[1:], stream=10)
    t = (rng.uniform(config.seed, 12, step, position) * sd.schedule.T).long()
    return x0, t, noise, prior.states(teaching.said(config, step, index, position, stream=13))


def beside(prior, run, sd, step, micro):
    """A micro-batch of class pictures, to stand behind the new ones in one call of the U-Net: x0, t, noise, context and
    target."""
    if prior.answers is None:
        x0, index, position = prior.batches.get(step, micro)
        x0, t, noise, context = noisy(prior, run, sd, x0, index, step, position)
        return x0, t, noise, context, process.target(sd.schedule, sd.kind, x0, noise, t)
    index, _, position = prior.batches.plan(step, micro)  # which ones: a noisy copy reads its own latent
    copies = prior.config.class_answers
    copy = (rng.uniform(prior.config.seed, 14, step, position) * copies).long()
    return *noisy_copy(prior, run, sd, copies * index + copy), prior.answers[index, copy].to(run.device)


# --- words ------------------------------------------------------------------------------------------------------------

def rare_identifiers(tokenizer, n=20, seed=0, length=(3, 4)):
    """n words that CLIP's tokenizer takes whole and hardly anybody writes, in an order drawn by seed.

    The paper looks up rare tokens: single tokens that end a word, of three or four letters, among the last merges of
    the vocabulary, which were the rarest when it was made (Ruiz et al. 2022, section 3.1).
    """
    vocab = tokenizer.vocab
    words = [token.removesuffix("</w>") for token, i in vocab.items()
             if token.endswith("</w>") and i >= len(vocab) // 2]
    words = [word for word in words if word.isascii() and word.isalpha() and length[0] <= len(word) <= length[1]]
    if len(words) < n:
        raise UserError(f"the vocabulary holds {len(words)} rare words of {length[0]} to {length[1]} letters; expected {n}")
    order = torch.randperm(len(words), generator=torch.Generator().manual_seed(seed))
    return [words[i] for i in order[:n].tolist()]


def how_split(tokenizer, word):
    """How a tokenizer reads a word, for people: 'dtd_zigzagged: d | td | _ | zig | zag | ged'."""
    return f"{word}: " + " | ".join(token.removesuffix("</w>") for token in tokenizer.split(word))
