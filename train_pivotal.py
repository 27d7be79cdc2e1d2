"""Pivotal tuning: first a new word is learned, then a LoRA around it, with prior preservation (report section 4.2.5).

    python train_pivotal.py                                 a new word for ten slices of drawn specimens
    python train_pivotal.py --data FOLDER --word "<dry-warp>" --class_prompt "a woven texture"
    python train_pivotal.py --resume runs/pivotal-001

The word becomes the point from which the LoRA sets out, and stays as it was learned. Writes learned_embeds.safetensors
and lora.safetensors: a model needs both. Sources: Roich et al. 2021 (arXiv 2106.05744) for the two stages; Gal et al.
2022; Hu et al. 2021; Ruiz et al. 2022.
"""

from dataclasses import dataclass

import torch

from nanodiff import fast, rng
from nanodiff.diffusion import process
from nanodiff.errors import check
from nanodiff.finetune import dreambooth, teaching, textual_inversion
from nanodiff.flags import entry, parse, resumed
from nanodiff.formats.embedding_file import write_embedding
from nanodiff.formats.lora_file import write_lora
from nanodiff.models import lora, lora_extract
from nanodiff.training.batches import Batches
from nanodiff.training.run import MAY_CHANGE, Run


@dataclass
class Config(teaching.TeachConfig, dreambooth.PriorConfig):
    data: str = "woven"  # woven (slices of drawn specimens), a drawn class, a folder of pictures, TIFF volumes
    pictures: int = 10  # drawn pictures to learn from
    word: str = "<new>"  # the new word; no word of the vocabulary
    vectors: int = 1  # tokens that the word stands for
    initialiser: str = ""  # what the vectors start from: a word of one token, or one for each (default: drawn)
    prompt: str = ""  # what is said of every picture in the second stage (default: "a WORD texture")
    word_steps: int = 200  # optimiser steps of the first stage, in which the word alone is trained
    steps: int = 500  # optimiser steps in all
    word_lr: float = 5e-2  # peak learning rate of the word
    lr: float = 1e-3  # peak learning rate of the LoRA
    rank: int = 8  # of every change
    base: str = "fp32"  # numbers of the frozen U-Net: fp32 or bf16 (half the memory; adapters and words stay fp32)
    places: str = "attention,feedforward,resnet"  # attention, feedforward, projection, resnet, with commas between
    batch: int = 8  # pictures a micro-batch and process, and as many class pictures
    warmup: int = 0  # optimiser steps of linear learning-rate warm-up
    log_every: int = 25  # steps between progress lines


@entry
def main(argv=None):
    config, given = parse(Config, argv, __doc__)
    if config.resume:
        config = resumed(config, given, "pivotal", MAY_CHANGE)
    elif not teaching.is_drawn(config.data) and "pictures" not in given:
        config.pictures = 0
    config.prompt = config.prompt or f"a {config.word} texture"
    check_flags(config)
    return train(config)


def train(config):
    """Trains a word, then a LoRA; returns the StableDiffusion with both, or None when it was stopped before."""
    sd = teaching.load_model(config, config.base)
    paths = lora.find_targets(sd.networks, [place.strip() for place in config.places.split(",")])
    side = teaching.side_of(config, sd)
    generator = torch.Generator().manual_seed(config.seed)
    rows = textual_inversion.add_word(sd, config.word, config.vectors, config.initialiser, generator)
    training, held_out = teaching.load_pictures(config, side)
    old = teaching.retained(config)
    run = Run(config, "pivotal")
    for net in (sd.text_model, sd.unet, sd.autoencoder):
        net.to(run.device)
    prior = dreambooth.prior(config, sd, side, run) if dreambooth.wanted(config) else None
    lesson = teaching.make_lesson(config, sd, training, held_out, run.print)

    word = torch.nn.ParameterList([rows.vectors])
    trained = lora.add(sd.networks, paths, config.rank, config.rank, generator, "lora")
    for net in sd.networks.values():
        fast.speed_up(net)  # the layers with adapters, too
    net = torch.nn.ParameterList(trained)
    sd.unet.checkpointing = config.checkpointing
    word_optimiser = torch.optim.AdamW(word.parameters(), config.word_lr, betas=(0.9, 0.99), weight_decay=0.0)
    optimiser = torch.optim.AdamW(net.parameters(), config.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    batches = Batches(lesson.training, config.batch, config.seed, config.accumulate, run.rank, run.world)
    sentences = [config.prompt, *textual_inversion.sentences(config.word)]
    states, learned = teaching.states(sd, sentences, live=True), None
    run.track(word=word, net=net, word_optimiser=word_optimiser, optimiser=optimiser)
    own = teaching.announce(run, sd, [rows.vectors, *trained], lesson, config.batch + (prior.batches.batch if prior else 0))

    for step in run.steps():
        if run.due(config.preview_every):
            teaching.preview(run, sd, lesson, old)
        first = step < config.word_steps  # the word alone; then the LoRA alone, under the prompt alone
        word.requires_grad_(first), net.requires_grad_(not first)
        if not first and learned is None:  # the word stays as it is: its sentences are encoded once
            states = learned = teaching.states(sd, sentences, live=False)
        for micro in range(config.accumulate):
            x0, index, position = batches.get(step, micro)
            x0, position = x0.to(run.device), position.to(run.device)
            noise = teaching.noise_of(config, step, position, x0.shape[1:])
            t = rng.time_steps(config.seed, step, position, sd.schedule.T)
            if first:
                row = (rng.uniform(config.seed, 8, step, position) * len(sentences)).long().cpu()
            else:
                row = teaching.said(config, step, torch.zeros_like(index), position)
            context = states(row)  # [B, 77, D]
            target = process.target(sd.schedule, sd.kind, x0, noise, t)
            if prior is not None and not first:  # behind the new pictures, in one call of the U-Net
                more = dreambooth.beside(prior, run, sd, step, micro)
                x0, t, noise, context, target = (torch.cat(pair) for pair in zip((x0, t, noise, context, target), more))

            x_t = process.q_sample(sd.schedule, x0, t, noise)
            with run.autocast():
                prediction = sd.unet(x_t, t, context)
            error = prediction.float() - target  # [B, C, h, w]
            weight = process.loss_weight(sd.schedule, sd.kind, t, config.gamma or None)
            losses = weight * error.square().flatten(1).mean(1)  # [B]
            loss = losses[:len(index)].mean()
            if prior is not None and not first:
                kept = losses[len(index):].mean()
                run.note(instance=loss.detach(), prior=kept.detach())
                loss = loss + config.prior_weight * kept
            run.backward(loss, index)
        if first:
            run.update(word, word_optimiser, lr=config.word_lr, stage=(0, config.word_steps))
        else:
            run.update(net, optimiser, stage=(config.word_steps, config.steps))
        run.log(step)

    if run.rank != 0 or not run.finished:
        return None
    teaching.preview(run, sd, lesson, old)
    write_lora(run.path("lora.safetensors"), lora.parts(sd.networks, "lora"))
    vectors = textual_inversion.keep_word(sd)
    write_embedding(run.path("learned_embeds.safetensors"), config.word, vectors)
    sizes = lora_extract.sizes(sd.networks, "lora")
    run.print(lora_extract.size_sentence(sizes))
    teaching.finish(run, sd, lesson, old, method="pivotal tuning", trained=own, change=sizes, file_bytes=sum(
        run.path(name).stat().st_size for name in ("lora.safetensors", "learned_embeds.safetensors")))
    return sd


def check_flags(config):
    """Raises UserError for every flag whose value alone is wrong, before anything is read or written."""
    teaching.check_flags(config)
    check(config.rank >= 1, f"--rank is {config.rank}; expected a whole number from 1, such as 8")
    check(config.vectors >= 1, f"--vectors is {config.vectors}; expected 1 or more")
    check(0 < config.word_steps < config.steps, f"--word_steps is {config.word_steps}; expected 1 to below --steps "
          f"{config.steps}")
    check(config.word_lr > 0, f"--word_lr is {config.word_lr}; expected a number above 0, such as 0.05")
    check(config.word in config.prompt, f'--prompt "{config.prompt}" does not hold the word "{config.word}"; expected it '
          f'somewhere, such as "a {config.word} texture"')
    check("text" not in config.places, "--places text would train the encoder that the word was learned for; expected "
          "places of the U-Net alone")
    check(not config.patience, "--patience is not for two stages; expected 0")
    dreambooth.check_flags(config, dreambooth.wanted(config))


if __name__ == "__main__":
    main()
