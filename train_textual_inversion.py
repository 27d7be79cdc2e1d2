"""Textual inversion: a few pictures become a new word; nothing else changes (Gal et al. 2022; report section 4.2.2).

    python train_textual_inversion.py                                    a word for nine slices of drawn specimens
    python train_textual_inversion.py --word "<dry-warp>" --data FOLDER --kind style --initialiser texture
    python train_textual_inversion.py --vectors 4                        a word of four tokens
    python train_textual_inversion.py --resume runs/textual-inversion-001

Writes WORD's file learned_embeds.safetensors, which diffusers and nanodiff load, and learned_embeds.pt for others.
"""

from dataclasses import dataclass

import torch

from nanodiff import rng
from nanodiff.diffusion import process
from nanodiff.errors import check, nearest
from nanodiff.finetune import teaching, textual_inversion
from nanodiff.flags import entry, parse, resumed
from nanodiff.formats.embedding_file import write_embedding
from nanodiff.training.batches import Batches
from nanodiff.training.run import MAY_CHANGE, Run


@dataclass
class Config(teaching.TeachConfig):
    data: str = "woven"  # woven (slices of drawn specimens), a drawn class, a folder of pictures, TIFF volumes
    pictures: int = 9  # drawn pictures to learn from
    word: str = "<new>"  # the new word; no word of the vocabulary
    vectors: int = 1  # tokens that the word stands for
    initialiser: str = ""  # what the vectors start from: a word of one token, or one for each (default: drawn)
    prompt: str = ""  # what is asked for in the pictures on the way (default: the first of the sentences)
    caption_dropout: float = 0.0  # not used: the word is in every sentence
    kind: str = "style"  # sentences that the word is learned in: object or style
    steps: int = 500  # optimiser steps in all
    batch: int = 8  # pictures a micro-batch and process
    base: str = "fp32"  # numbers of the frozen U-Net: fp32 or bf16 (half the memory; adapters and words stay fp32)
    lr: float = 5e-2  # peak learning rate
    warmup: int = 0  # optimiser steps of linear learning-rate warm-up
    log_every: int = 25  # steps between progress lines
    preview_every: int = 250  # steps between pictures from fixed noise


@entry
def main(argv=None):
    config, given = parse(Config, argv, __doc__)
    if config.resume:
        config = resumed(config, given, "textual-inversion", MAY_CHANGE)
    elif not teaching.is_drawn(config.data) and "pictures" not in given:
        config.pictures = 0
    check_flags(config)
    return train(config)


def train(config):
    """Trains one word; returns the StableDiffusion that knows it, or None when it was stopped before."""
    sd = teaching.load_model(config, config.base)
    side = teaching.side_of(config, sd)
    generator = torch.Generator().manual_seed(config.seed)
    rows = textual_inversion.add_word(sd, config.word, config.vectors, config.initialiser, generator)
    sentences = textual_inversion.sentences(config.word, config.kind)
    training, held_out = teaching.load_pictures(config, side, config.prompt or sentences[0])
    held_out.captions = [sentences[i % len(sentences)] for i in range(len(held_out))]
    old = teaching.retained(config)
    run = Run(config, "textual-inversion")
    for net in (sd.text_model, sd.unet, sd.autoencoder):
        net.to(run.device)
    lesson = teaching.make_lesson(config, sd, training, held_out, run.print)

    net = torch.nn.ParameterList([rows.vectors])
    sd.unet.checkpointing = config.checkpointing
    optimiser = torch.optim.AdamW(net.parameters(), config.lr, betas=(0.9, 0.99), weight_decay=0.0)
    batches = Batches(lesson.training, config.batch, config.seed, config.accumulate, run.rank, run.world)
    states = teaching.states(sd, sentences, live=True)
    start = rows.vectors.detach().clone()
    run.track(net=net, optimiser=optimiser)
    run.print(f'the word "{config.word}" stands for {config.vectors} tokens; it is learned in sentences such as '
              f'"{sentences[0]}"')
    own = teaching.announce(run, sd, [rows.vectors], lesson, config.batch)

    for step in run.steps():
        if run.due(config.preview_every):
            teaching.preview(run, sd, lesson, old)
            if teaching.has_stalled(run):
                break
        for micro in range(config.accumulate):
            x0, index, position = batches.get(step, micro)
            x0, position = x0.to(run.device), position.to(run.device)
            noise = teaching.noise_of(config, step, position, x0.shape[1:])
            t = rng.time_steps(config.seed, step, position, sd.schedule.T)
            sentence = (rng.uniform(config.seed, 8, step, position) * len(sentences)).long().cpu()

            x_t = process.q_sample(sd.schedule, x0, t, noise)
            with run.autocast():
                prediction = sd.unet(x_t, t, states(sentence))
            error = prediction.float() - process.target(sd.schedule, sd.kind, x0, noise, t)  # [B, C, h, w]
            weight = process.loss_weight(sd.schedule, sd.kind, t, config.gamma or None)
            run.backward((weight * error.square().flatten(1).mean(1)).mean(), index)
        run.update(net, optimiser)
        run.log(step)

    if run.rank != 0 or not (run.finished or teaching.has_stalled(run)):
        return None
    teaching.preview(run, sd, lesson, old)
    moved = float((rows.vectors.detach() - start).norm() / rows.vectors.detach().norm())
    vectors = textual_inversion.keep_word(sd)
    write_embedding(run.path("learned_embeds.safetensors"), config.word, vectors)
    write_embedding(run.path("learned_embeds.pt"), config.word, vectors, "a1111")
    run.print(f"the word's vectors moved by {moved:.1%} of their length")
    teaching.finish(run, sd, lesson, old, method="textual inversion", trained=own, change={config.word: moved},
                    file_bytes=run.path("learned_embeds.safetensors").stat().st_size)
    return sd


def check_flags(config):
    """Raises UserError for every flag whose value alone is wrong, before anything is read or written."""
    teaching.check_flags(config)
    known = textual_inversion.TEMPLATES
    check(config.kind in known, f'--kind "{config.kind}" is unknown; expected {", ".join(known)}'
          + nearest(config.kind, known))
    check(config.caption_dropout == 0, f"--caption_dropout {config.caption_dropout} is not for this script, in which no "
          "caption is left out; expected no such flag")
    check(config.vectors >= 1, f"--vectors is {config.vectors}; expected 1 or more")
    check(not config.prompt or config.word in config.prompt, f'--prompt "{config.prompt}" does not hold the word '
          f'"{config.word}"; expected it somewhere, such as "a photo of {config.word}"')


if __name__ == "__main__":
    main()
