"""Full fine-tuning: all of the U-Net learns pictures with captions, and may forget (report section 4.2.1, tables 5, 6).

    python train_finetune.py                               the nine woven classes, from drawn specimens
    python train_finetune.py --data dtd_folder --offset 0.1 --gamma 5
    python train_finetune.py --zero_snr                    the schedule ends in pure noise (models that predict v)
    python train_finetune.py --resume runs/finetune-001    goes on exactly where the run was stopped

Writes a whole model, model/, in the layout of diffusers.
"""

from dataclasses import dataclass

import torch

from nanodiff import rng
from nanodiff.diffusion import process
from nanodiff.errors import check
from nanodiff.finetune import teaching
from nanodiff.flags import entry, parse, resumed
from nanodiff.training.batches import Batches
from nanodiff.training.run import MAY_CHANGE, Run


@dataclass
class Config(teaching.TeachConfig):
    train_text: bool = False  # train the text encoder, too
    zero_snr: bool = False  # train and sample with a schedule that ends in pure noise; for models that predict v
    steps: int = 300  # optimiser steps in all
    batch: int = 16  # pictures a micro-batch and process
    lr: float = 5e-4  # peak learning rate
    decay: float = 0.01  # weight decay
    warmup: int = 20  # optimiser steps of linear learning-rate warm-up
    log_every: int = 25  # steps between progress lines


@entry
def main(argv=None):
    config, given = parse(Config, argv, __doc__)
    if config.resume:
        config = resumed(config, given, "finetune", MAY_CHANGE)
    teaching.check_flags(config)
    check(config.decay >= 0, f"--decay is {config.decay}; expected 0 or more")
    return train(config)


def train(config):
    """Trains one model; returns the StableDiffusion, or None when it was stopped before."""
    sd = teaching.load_model(config)
    if config.zero_snr:
        check(sd.kind == "v", f"--zero_snr leaves no signal at the last step, where a model that predicts {sd.kind} has "
              "nothing to say; expected one that predicts v, such as SD 2.1")
        check(not config.gamma, "--zero_snr leaves no signal at the last step, to which min-SNR gives the weight 0; "
              "expected --gamma 0")
        teaching.end_in_noise(sd)
    side = teaching.side_of(config, sd)
    training, held_out = teaching.load_pictures(config, side)
    old = teaching.retained(config)
    run = Run(config, "finetune")
    for net in (sd.text_model, sd.unet, sd.autoencoder):
        net.to(run.device)
    lesson = teaching.make_lesson(config, sd, training, held_out, run.print)

    net = torch.nn.ModuleDict({"unet": sd.unet, **({"text": sd.text_model} if config.train_text else {})})
    trained = list(net.requires_grad_(True).train().parameters())
    sd.unet.checkpointing = config.checkpointing
    before = [p.detach().clone() for p in trained]
    optimiser = torch.optim.AdamW(trained, config.lr, betas=(0.9, 0.99), weight_decay=config.decay, fused=True)
    batches = Batches(lesson.training, config.batch, config.seed, config.accumulate, run.rank, run.world)
    states = teaching.states(sd, lesson.training.captions, config.train_text)
    run.track(net=net, optimiser=optimiser)
    own = teaching.announce(run, sd, trained, lesson, config.batch)

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

            x_t = process.q_sample(sd.schedule, x0, t, noise)
            with run.autocast():
                prediction = sd.unet(x_t, t, context)
            error = prediction.float() - process.target(sd.schedule, sd.kind, x0, noise, t)  # [B, C, h, w]
            weight = process.loss_weight(sd.schedule, sd.kind, t, config.gamma or None)
            run.backward((weight * error.square().flatten(1).mean(1)).mean(), index)
        run.update(net, optimiser)
        run.log(step)

    if run.rank != 0 or not (run.finished or teaching.has_stalled(run)):
        return None
    teaching.preview(run, sd, lesson, old)
    change = teaching.changes(net, before)
    run.print(teaching.change_sentence(change))
    with run.aside():
        sd.save(run.folder / "model", dtype="float16" if run.device.type == "cuda" else None)
    teaching.finish(run, sd, lesson, old, method="full fine-tuning", trained=own, change=change,
                    file_bytes=teaching.folder_bytes(run.folder / "model"))
    return sd


if __name__ == "__main__":
    main()
