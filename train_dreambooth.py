"""DreamBooth: the whole U-Net learns a word for a few pictures and keeps a class noun (Ruiz et al. 2022; report 4.2.3).

    python train_dreambooth.py                              a sks texture: ten slices of drawn specimens
    python train_dreambooth.py --with_prior_preservation --class_prompt "a texture" --num_class_images 200
    python train_dreambooth.py --data FOLDER --instance_prompt "a photo of sks carbon"
    python train_dreambooth.py --identifiers                rare words to choose from, and how the tokenizer splits them
    python train_dreambooth.py --resume runs/dreambooth-001

Writes a whole model, model/, in the layout of diffusers.
"""

from dataclasses import dataclass
from typing import Annotated

import torch

from nanodiff.diffusion import process, samplers
from nanodiff.finetune import lesson as lessons, new_words, prior as priors
from nanodiff.finetune.cost import change_sentence, folder_bytes, report_memory, weight_changes
from nanodiff.finetune.lesson import Denoiser, caption_rows, encode_captions, noisy_batch
from nanodiff.finetune.previews import has_stalled, save_previews, write_results
from nanodiff.finetune.prior import prior_batch
from nanodiff.flags import (BelowOne, Between, Count, CountOrZero, NotNegative, OneOf, Positive, entry, parse, resumed,
                            set_defaults)
from nanodiff.training.run import MAY_CHANGE, Run, RunConfig
from nanodiff.training.step import learning_rate


@dataclass
class Config(RunConfig):
    model: str = ""  # SD 1.x or 2.x, a folder or a file (default: the small model that ships)
    train_text: bool = False  # train the text encoder, too
    identifiers: bool = False  # print rare words and how the tokenizer splits those of --instance_prompt; train nothing
    data: str = "woven"  # woven (drawn specimens), a drawn class such as zigzagged, a folder of pictures, TIFF volumes
    names: str = ""  # of woven: their classes, with commas; one that is named twice comes twice as often (default: all)
    instance_prompt: str = "a sks texture"  # the caption of every picture: a rare word and a class noun
    size: CountOrZero = 0  # side of the pictures in pixels (0: the model's own)
    pictures: CountOrZero = 10  # drawn pictures to learn from
    variants: Count = 4  # random crops and flips of each picture that are encoded
    caption_dropout: BelowOne = 0.0  # share of captions that are left out, for classifier-free guidance
    with_prior_preservation: bool = False  # train on class pictures, too, so that the class noun keeps its meaning
    class_prompt: str = ""  # the prompt without the new word, such as "a woven texture"; or several, with | between
    class_data: str = ""  # their folder, filled up (default: the run's); without class_prompt: with captions, or worlds
    num_class_images: Count = 100  # class pictures
    class_batch: CountOrZero = 0  # of them in a micro-batch (0: as many as --batch)
    teacher_predictions: CountOrZero = 0  # noisy copies of each whose target the base model predicts (0: none)
    prior_loss_weight: NotNegative = 1.0  # of the loss on class pictures
    snr_gamma: NotNegative = 0.0  # of min-SNR weighting, such as 5 (0: every step counts the same)
    noise_offset: NotNegative = 0.0  # strength of offset noise, such as 0.1
    gradient_checkpointing: bool = False  # compute activations again in the backward pass: less memory, more time
    steps: Count = 200  # optimiser steps in all
    batch: Count = 4  # pictures of one micro-batch, over all processes
    lr: Positive = 2e-4  # peak learning rate
    weight_decay: NotNegative = 0.01  # of AdamW
    warmup: CountOrZero = 10  # optimiser steps of linear learning-rate warm-up
    patience: CountOrZero = 0  # previews in a row without a better held-out loss after which training ends (0: never)
    retention: str = ""  # prompts of what the model could draw before, with | between (default: some of its world's)
    each: Count = 6  # pictures of every prompt in the sheets before and after
    guidance: NotNegative = 0.0  # scale of classifier-free guidance in pictures (0: the model's own)
    sampler: Annotated[str, OneOf(samplers.by_name)] = "dpm++2m"  # of the pictures
    sample_steps: Annotated[int, Between(1, 1000)] = 20  # its steps
    log_every: Count = 25  # steps between progress lines
    preview_every: Count = 50  # steps between pictures from fixed noise


@entry
def main(argv=None):
    config, given = parse(Config, argv, __doc__)
    if config.resume:
        config = resumed(config, given, "dreambooth", MAY_CHANGE)
    elif not lessons.is_drawn(config.data):
        set_defaults(config, given, pictures=0)
    lessons.check_flags(config)
    priors.check_flags(config)
    if config.identifiers:
        tokenizer = lessons.load_model(config.model).tokenizer
        print("rare words:", " ".join(new_words.rare_identifiers(tokenizer, seed=config.seed)))
        for word in config.instance_prompt.split():
            print(new_words.split_as_text(tokenizer, word))
        return None
    return train(config)


def train(config):
    """Trains one model; returns the StableDiffusion, or None when it was stopped before."""
    sd = lessons.load_model(config.model)
    training, held_out = lessons.load_pictures(config, sd, config.instance_prompt)
    run = Run(config, "dreambooth")
    lesson = lessons.make_lesson(config, sd, run, training, held_out)
    prior = priors.make_prior(config, sd, run, learning=config.train_text)

    net = torch.nn.ModuleDict({"unet": sd.unet, **({"text": sd.text_model} if config.train_text else {})})
    trained = list(net.requires_grad_(True).train().parameters())
    before = [p.detach().clone() for p in trained]
    optimiser = torch.optim.AdamW(trained, config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True)
    captions = encode_captions(sd, lesson.training.captions, learning=config.train_text)
    run.track(net=net, optimiser=optimiser)
    denoise = run.ddp(Denoiser(sd))
    for word in config.instance_prompt.split():
        run.print(new_words.split_as_text(sd.tokenizer, word))
    count = report_memory(run, sd, trained, lesson, prior)

    for step in run.steps():
        lr = learning_rate(step, config)
        if run.due(config.preview_every):
            save_previews(run, sd, lesson)
            if has_stalled(run):
                break
        for micro in run.micro_batches():
            x0, t, noise, index, position = noisy_batch(lesson, run, sd, step, micro)
            target = process.target(sd.schedule, sd.kind, x0, noise, t)
            text = [captions(caption_rows(config, step, index, position))]  # [B, 77, D], or token ids [B, 77]
            if prior is not None:  # concatenated after the instance batch
                *class_batch, class_text = prior_batch(prior, run, sd, step, micro)
                x0, t, noise, target = (torch.cat(pair) for pair in zip((x0, t, noise, target), class_batch))
                text.append(class_text)

            x_t = process.q_sample(sd.schedule, x0, t, noise)
            with run.autocast():
                prediction = denoise(x_t, t, *text)
            weight = process.loss_weight(sd.schedule, sd.kind, t, config.snr_gamma or None)
            losses = weight * (prediction.float() - target).square().flatten(1).mean(1)  # [B]
            loss = losses[:len(index)].mean()
            if prior is not None:
                prior_loss = losses[len(index):].mean()
                run.note(instance=loss.detach(), prior=prior_loss.detach())
                loss = loss + config.prior_loss_weight * prior_loss
            run.backward(loss, index)
        run.update(net, optimiser, lr)
        run.log(step, lr)

    if run.rank != 0 or not (run.finished or has_stalled(run)):
        return None
    save_previews(run, sd, lesson)
    changes = weight_changes(net, before)
    run.print(change_sentence(changes))
    with run.aside():
        sd.save(run.folder / "model", dtype="float16" if run.device.type == "cuda" else None)
    write_results(run, sd, lesson, method="DreamBooth", trained=count, change=changes,
                  file_bytes=folder_bytes(run.folder / "model"))
    return sd


if __name__ == "__main__":
    main()
