"""DreamBooth: the whole U-Net learns a word for a few pictures and keeps the class noun (Ruiz et al. 2022; report 4.2.3).

    python train_dreambooth.py                                              a sks texture: ten slices of drawn specimens
    python train_dreambooth.py --class_prompt "a texture" --class_count 200 with prior preservation
    python train_dreambooth.py --data FOLDER --prompt "a photo of sks carbon" --class_prompt "a photo of carbon"
    python train_dreambooth.py --identifiers                                rare words to choose from, and how they split
    python train_dreambooth.py --resume runs/dreambooth-001

Writes a whole model, model/, in the layout of diffusers.
"""

from dataclasses import dataclass

import torch

from nanodiff import rng
from nanodiff.diffusion import process
from nanodiff.errors import check
from nanodiff.finetune import dreambooth, teaching
from nanodiff.flags import entry, parse, resumed
from nanodiff.training.batches import Batches
from nanodiff.training.run import MAY_CHANGE, Run


@dataclass
class Config(teaching.TeachConfig, dreambooth.PriorConfig):
    data: str = "woven"  # woven (slices of drawn specimens), a drawn class, a folder of pictures, TIFF volumes
    prompt: str = "a sks texture"  # what is said of every picture: a rare word and a class noun
    pictures: int = 10  # drawn pictures to learn from
    train_text: bool = False  # train the text encoder, too
    identifiers: bool = False  # print rare words, and how the tokenizer splits those of --prompt; train nothing
    caption_dropout: float = 0.0  # share of captions that are left out
    steps: int = 200  # optimiser steps in all
    batch: int = 4  # pictures a micro-batch and process, and as many class pictures
    lr: float = 2e-4  # peak learning rate
    decay: float = 0.01  # weight decay
    warmup: int = 10  # optimiser steps of linear learning-rate warm-up
    log_every: int = 25  # steps between progress lines
    preview_every: int = 50  # steps between pictures from fixed noise


@entry
def main(argv=None):
    config, given = parse(Config, argv, __doc__)
    if config.resume:
        config = resumed(config, given, "dreambooth", MAY_CHANGE)
    elif not teaching.is_drawn(config.data) and "pictures" not in given:
        config.pictures = 0
    check_flags(config)
    if config.identifiers:
        tokenizer = teaching.load_model(config).tokenizer
        print("rare words:", " ".join(dreambooth.rare_identifiers(tokenizer, seed=config.seed)))
        for word in config.prompt.split():
            print(dreambooth.how_split(tokenizer, word))
        return None
    return train(config)


def train(config):
    """Trains one model; returns the StableDiffusion, or None when it was stopped before."""
    sd = teaching.load_model(config)
    side = teaching.side_of(config, sd)
    training, held_out = teaching.load_pictures(config, side)
    old = teaching.retained(config)
    run = Run(config, "dreambooth")
    for net in (sd.text_model, sd.unet, sd.autoencoder):
        net.to(run.device)
    prior = dreambooth.prior(config, sd, side, run, config.train_text) if dreambooth.wanted(config) else None
    lesson = teaching.make_lesson(config, sd, training, held_out, run.print)

    net = torch.nn.ModuleDict({"unet": sd.unet, **({"text": sd.text_model} if config.train_text else {})})
    trained = list(net.requires_grad_(True).train().parameters())
    sd.unet.checkpointing = config.checkpointing
    before = [p.detach().clone() for p in trained]
    optimiser = torch.optim.AdamW(trained, config.lr, betas=(0.9, 0.99), weight_decay=config.decay, fused=True)
    batches = Batches(lesson.training, config.batch, config.seed, config.accumulate, run.rank, run.world)
    states = teaching.states(sd, lesson.training.captions, config.train_text)
    run.track(net=net, optimiser=optimiser)
    for word in config.prompt.split():
        run.print(dreambooth.how_split(sd.tokenizer, word))
    own = teaching.announce(run, sd, trained, lesson, config.batch + (prior.batches.batch if prior else 0))

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
            context = states(teaching.said(config, step, index, position))  # [B, 77, D]
            target = process.target(sd.schedule, sd.kind, x0, noise, t)
            if prior is not None:  # behind the new pictures, in one call of the U-Net
                more = dreambooth.beside(prior, run, sd, step, micro)
                x0, t, noise, context, target = (torch.cat(pair) for pair in zip((x0, t, noise, context, target), more))

            x_t = process.q_sample(sd.schedule, x0, t, noise)
            with run.autocast():
                prediction = sd.unet(x_t, t, context)
            error = prediction.float() - target  # [B, C, h, w]
            weight = process.loss_weight(sd.schedule, sd.kind, t, config.gamma or None)
            losses = weight * error.square().flatten(1).mean(1)  # [B]
            loss = losses[:len(index)].mean()
            if prior is not None:
                kept = losses[len(index):].mean()
                run.note(instance=loss.detach(), prior=kept.detach())
                loss = loss + config.prior_weight * kept
            run.backward(loss, index)
        run.update(net, optimiser)
        run.log(step)

    if run.rank != 0 or not (run.finished or teaching.has_stalled(run)):
        return None
    teaching.preview(run, sd, lesson, old)
    change = teaching.changes(net, before)
    run.print(teaching.change_sentence(change))
    with run.aside():
        sd.save(run.folder / "model", dtype="float16" if run.device.type == "cuda" else None)
    teaching.finish(run, sd, lesson, old, method="DreamBooth", trained=own, change=change,
                    file_bytes=teaching.folder_bytes(run.folder / "model"))
    return sd


def check_flags(config):
    """Raises UserError for every flag whose value alone is wrong, before anything is read or written."""
    teaching.check_flags(config)
    check(config.decay >= 0, f"--decay is {config.decay}; expected 0 or more")
    dreambooth.check_flags(config, dreambooth.wanted(config))


if __name__ == "__main__":
    main()
