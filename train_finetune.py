"""Full fine-tuning: all of the U-Net learns pictures with captions, and may forget (report section 4.2.1, tables 5, 6).

    python train_finetune.py                               the nine woven classes, from drawn specimens
    python train_finetune.py --data FOLDER --noise_offset 0.1 --snr_gamma 5
    python train_finetune.py --zero_snr                    the schedule ends in pure noise (models that predict v)
    python train_finetune.py --resume runs/finetune-001    goes on exactly where the run was stopped

Writes a whole model, model/, in the layout of diffusers.
"""

from dataclasses import dataclass
from typing import Annotated

import torch

from nanodiff.diffusion import process, samplers
from nanodiff.errors import check
from nanodiff.finetune import lesson as lessons
from nanodiff.finetune.cost import change_sentence, folder_bytes, report_memory, weight_changes
from nanodiff.finetune.lesson import Denoiser, caption_rows, encode_captions, noisy_batch
from nanodiff.finetune.previews import has_stalled, save_previews, write_results
from nanodiff.flags import BelowOne, Between, Count, CountOrZero, NotNegative, OneOf, Positive, entry, parse, resumed
from nanodiff.training.run import MAY_CHANGE, Run, RunConfig
from nanodiff.training.step import learning_rate


@dataclass
class Config(RunConfig):
    model: str = ""  # SD 1.x or 2.x, a folder or a file (default: the small model that ships)
    train_text: bool = False  # train the text encoder, too
    zero_snr: bool = False  # train and sample with a schedule that ends in pure noise; for models that predict v
    data: str = "woven"  # woven (drawn specimens), a drawn class such as zigzagged, a folder of pictures, TIFF volumes
    names: str = ""  # of woven: their classes, with commas; one that is named twice comes twice as often (default: all)
    instance_prompt: str = ""  # the caption of every picture (default: the pictures' own captions)
    size: CountOrZero = 0  # side of the pictures in pixels (0: the model's own)
    pictures: CountOrZero = 0  # drawn pictures to learn from (0: 450)
    variants: Count = 4  # random crops and flips of each picture that are encoded
    caption_dropout: BelowOne = 0.1  # share of captions that are left out, for classifier-free guidance
    snr_gamma: NotNegative = 0.0  # of min-SNR weighting, such as 5 (0: every step counts the same)
    noise_offset: NotNegative = 0.0  # strength of offset noise, such as 0.1
    gradient_checkpointing: bool = False  # compute activations again in the backward pass: less memory, more time
    steps: Count = 300  # optimiser steps in all
    batch: Count = 16  # pictures of one micro-batch, over all processes
    lr: Positive = 5e-4  # peak learning rate
    weight_decay: NotNegative = 0.01  # of AdamW
    warmup: CountOrZero = 20  # optimiser steps of linear learning-rate warm-up
    patience: CountOrZero = 0  # previews in a row without a better held-out loss after which training ends (0: never)
    retention: str = ""  # prompts of what the model could draw before, with | between (default: some of its world's)
    each: Count = 6  # pictures of every prompt in the sheets before and after
    guidance: NotNegative = 0.0  # scale of classifier-free guidance in pictures (0: the model's own)
    sampler: Annotated[str, OneOf(samplers.by_name)] = "dpm++2m"  # of the pictures
    sample_steps: Annotated[int, Between(1, 1000)] = 20  # its steps
    log_every: Count = 25  # steps between progress lines
    preview_every: Count = 100  # steps between pictures from fixed noise


@entry
def main(argv=None):
    config, given = parse(Config, argv, __doc__)
    if config.resume:
        config = resumed(config, given, "finetune", MAY_CHANGE)
    lessons.check_flags(config)
    return train(config)


def train(config):
    """Trains one model; returns the StableDiffusion, or None when it was stopped before."""
    sd = lessons.load_model(config.model)
    if config.zero_snr:
        check(sd.kind == "v", "--zero_snr leaves no signal at the last step, from which a model cannot predict "
              f"{sd.kind}; expected a model that predicts v, such as SD 2.1")
        check(not config.snr_gamma, "--zero_snr leaves no signal at the last step, and min-SNR gives it the weight 0; "
              "expected --snr_gamma 0")
        lessons.end_in_noise(sd)
    training, held_out = lessons.load_pictures(config, sd, config.instance_prompt)
    run = Run(config, "finetune")
    lesson = lessons.make_lesson(config, sd, run, training, held_out)

    net = torch.nn.ModuleDict({"unet": sd.unet, **({"text": sd.text_model} if config.train_text else {})})
    trained = list(net.requires_grad_(True).train().parameters())
    before = [p.detach().clone() for p in trained]
    optimiser = torch.optim.AdamW(trained, config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True)
    captions = encode_captions(sd, lesson.training.captions, learning=config.train_text)
    run.track(net=net, optimiser=optimiser)
    denoise = run.ddp(Denoiser(sd))
    count = report_memory(run, sd, trained, lesson)

    for step in run.steps():
        lr = learning_rate(step, config)
        if run.due(config.preview_every):
            save_previews(run, sd, lesson)
            if has_stalled(run):
                break
        for micro in run.micro_batches():
            x0, t, noise, index, position = noisy_batch(lesson, run, sd, step, micro)
            target = process.target(sd.schedule, sd.kind, x0, noise, t)
            text = captions(caption_rows(config, step, index, position))  # [B, 77, D], or token ids [B, 77]

            x_t = process.q_sample(sd.schedule, x0, t, noise)
            with run.autocast():
                prediction = denoise(x_t, t, text)
            weight = process.loss_weight(sd.schedule, sd.kind, t, config.snr_gamma or None)
            losses = weight * (prediction.float() - target).square().flatten(1).mean(1)  # [B]
            run.backward(losses.mean(), index)
        run.update(net, optimiser, lr)
        run.log(step, lr)

    if run.rank != 0 or not (run.finished or has_stalled(run)):
        return None
    save_previews(run, sd, lesson)
    changes = weight_changes(net, before)
    run.print(change_sentence(changes))
    with run.aside():
        sd.save(run.folder / "model", dtype="float16" if run.device.type == "cuda" else None)
    write_results(run, sd, lesson, method="full fine-tuning", trained=count, change=changes,
                  file_bytes=folder_bytes(run.folder / "model"))
    return sd


if __name__ == "__main__":
    main()
