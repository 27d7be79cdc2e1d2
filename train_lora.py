"""LoRA: low-rank changes teach a frozen model something new (Hu et al. 2021; report section 4.2.4, tables 13, 14).

    python train_lora.py                                  recipe "woven": nine woven classes, in minutes on a CPU
    python train_lora.py --data VOLUMES                   recipe "plain": TIFF volumes of your own (named by state)
    python train_lora.py --data FOLDER --instance_prompt "a photo of sks carbon"    pictures of your own
    python train_lora.py --recipe sd15 --model stable-diffusion-v1-5 --data FOLDER
    python train_lora.py --recipe woven --data VOLUMES    a recipe's flags with data of your own
    python train_lora.py --with_prior_preservation --instance_prompt "a sks texture" --class_prompt "a texture"
    python train_lora.py --resume runs/lora-001           goes on exactly where the run was stopped

The base weights are frozen. Writes the LoRA as lora.safetensors, which diffusers, peft and nanodiff read, and as
lora.kohya.safetensors. The words of --placeholder_token get new vectors, learned in the same steps (pivotal tuning,
train_pivotal.py, learns them first); they are written to learned_embeds.safetensors, and the LoRA needs them.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from nanodiff import fast
from nanodiff.diffusion import process, samplers
from nanodiff.errors import check
from nanodiff.finetune import lesson as lessons, new_words, prior as priors
from nanodiff.finetune.cost import report_memory
from nanodiff.finetune.lesson import Denoiser, caption_rows, encode_captions, noisy_batch
from nanodiff.finetune.previews import has_stalled, save_previews, write_results
from nanodiff.finetune.prior import prior_batch
from nanodiff.flags import (BelowOne, Between, Count, CountOrZero, NotNegative, OneOf, Positive, entry, parse, resumed,
                            set_defaults)
from nanodiff.formats.embedding_file import write_embeddings
from nanodiff.formats.lora_file import write_lora
from nanodiff.models import lora, lora_extract
from nanodiff.training.run import MAY_CHANGE, Run, RunConfig
from nanodiff.training.step import learning_rate

# What --recipe sets; a flag given by hand beats it. With data, a model or a caption of one's own the default is plain.
RECIPES = {
    "plain": {},  # a LoRA and nothing else
    # The small model's text encoder has learned that these words mean nothing, and its U-Net forgets in a minute. So
    # the words are learned anew, and pictures of its own world are trained beside the specimens.
    "woven": dict(placeholder_token=("sf_dry", "sf_compacted", "sf_injected", "sf_thickness", "sf_warp", "sf_weft"),
                  with_prior_preservation=True, class_data="worlds", num_class_images=1500, class_batch=2,
                  teacher_predictions=2),
    "sd15": dict(targets=("attention",), rank=4, lr=1e-4, batch=1),  # Stable Diffusion 1.5 or 2.1
}

Layers = Literal["attention", "feedforward", "projection", "resnet", "text"]


@dataclass
class Config(RunConfig):
    recipe: Literal["woven", "plain", "sd15"] = "woven"  # a row of RECIPES (with data or a model of your own: plain)
    model: str = ""  # SD 1.x or 2.x, a folder or a file (default: the small model that ships)
    base_dtype: Literal["fp32", "bf16"] = "fp32"  # of the frozen U-Net (bf16: half the memory; what learns stays fp32)
    rank: Count = 5  # of every change
    alpha: NotNegative = 0.0  # a change counts alpha / rank times (0: the rank, so once)
    targets: tuple[Layers, ...] = ("attention", "feedforward", "resnet")  # layers that get a LoRA (text: the encoder's)
    placeholder_token: tuple[str, ...] = ()  # words of the captions that are learned as new ones along with the LoRA
    num_vectors: Count = 1  # tokens that each of these words stands for
    word_lr: Positive = 6e-2  # peak learning rate of their vectors
    data: str = "woven"  # woven (drawn specimens), a drawn class such as zigzagged, a folder of pictures, TIFF volumes
    names: str = ""  # of woven: their classes, with commas; one that is named twice comes twice as often (default: all)
    instance_prompt: str = ""  # the caption of every picture (default: the pictures' own captions)
    size: CountOrZero = 0  # side of the pictures in pixels (0: the model's own)
    pictures: CountOrZero = 0  # drawn pictures to learn from (0: 450)
    variants: Count = 4  # random crops and flips of each picture that are encoded
    caption_dropout: BelowOne = 0.1  # share of captions that are left out, for classifier-free guidance
    with_prior_preservation: bool = False  # train on class pictures, too, so that what they show keeps its meaning
    class_prompt: str = ""  # the prompt without the new word, such as "a woven texture"; or several, with | between
    class_data: str = ""  # their folder, filled up (default: the run's); without class_prompt: with captions, or worlds
    num_class_images: Count = 100  # class pictures
    class_batch: CountOrZero = 0  # of them in a micro-batch (0: as many as --batch)
    teacher_predictions: CountOrZero = 0  # noisy copies of each whose target the base model predicts (0: none)
    prior_loss_weight: NotNegative = 1.0  # of the loss on class pictures
    snr_gamma: NotNegative = 0.0  # of min-SNR weighting, such as 5 (0: every step counts the same)
    noise_offset: NotNegative = 0.0  # strength of offset noise, such as 0.1
    gradient_checkpointing: bool = False  # compute activations again in the backward pass: less memory, more time
    steps: Count = 2800  # optimiser steps in all
    batch: Count = 4  # pictures of one micro-batch, over all processes
    lr: Positive = 5e-3  # peak learning rate
    weight_decay: NotNegative = 0.0  # of AdamW
    warmup: CountOrZero = 20  # optimiser steps of linear learning-rate warm-up
    patience: CountOrZero = 0  # previews in a row without a better held-out loss after which training ends (0: never)
    retention: str = ""  # prompts of what the model could draw before, with | between (default: some of its world's)
    each: Count = 6  # pictures of every prompt in the sheets before and after
    guidance: NotNegative = 0.0  # scale of classifier-free guidance in pictures (0: the model's own)
    sampler: Annotated[str, OneOf(samplers.by_name)] = "dpm++2m"  # of the pictures
    sample_steps: Annotated[int, Between(1, 1000)] = 20  # its steps
    log_every: Count = 50  # steps between progress lines
    preview_every: Count = 1400  # steps between pictures from fixed noise


@entry
def main(argv=None):
    config, given = parse(Config, argv, __doc__)
    if config.resume:
        config = resumed(config, given, "lora", MAY_CHANGE)
    else:
        if "recipe" not in given and (config.data != "woven" or config.model or config.instance_prompt):
            config.recipe = "plain"
        set_defaults(config, given, **RECIPES[config.recipe])
    check_flags(config)
    return train(config)


def train(config):
    """Trains one LoRA and draws what it changed; returns the StableDiffusion with it, or None when it was stopped."""
    sd = lessons.load_model(config.model, config.base_dtype)
    paths, words = lora.find_targets(sd.networks, config.targets), config.placeholder_token
    generator = torch.Generator().manual_seed(config.seed)
    rows = new_words.add_words(sd, words, config.num_vectors, generator=generator) if words else None
    training, held_out = lessons.load_pictures(config, sd, config.instance_prompt)
    check_words(words, training.captions)
    run = Run(config, "lora")
    lesson = lessons.make_lesson(config, sd, run, training, held_out)
    prior = priors.make_prior(config, sd, run, "text_model" in paths)

    factors = lora.add(sd.networks, paths, config.rank, config.alpha or config.rank, generator, "lora")
    groups = [{"params": factors}]
    if words:
        groups.append({"params": [rows.vectors], "lr_scale": config.word_lr / config.lr, "weight_decay": 0.0})
    trained = torch.nn.ParameterList(p for group in groups for p in group["params"])
    optimiser = torch.optim.AdamW(groups, config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay, fused=True)
    captions = encode_captions(sd, lesson.training.captions, learning="text_model" in paths or bool(words))
    run.track(net=trained, optimiser=optimiser)
    denoise = run.ddp(fast.speed_up(Denoiser(sd)))
    layers = ", ".join(f"{len(own)} layers of the {network}" for network, own in paths.items())
    run.print(f"recipe {config.recipe}: {layers}, rank {config.rank}")
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
        run.update(trained, optimiser, lr)
        run.log(step, lr)

    if run.rank != 0 or not (run.finished or has_stalled(run)):
        return None
    save_previews(run, sd, lesson)
    write_files(run, sd, lesson, count)
    return sd


def write_files(run, sd, lesson, count):
    """Writes the LoRA in two namings, its words, the sheets and results.json; count: trained parameters."""
    parts, words = lora.parts(sd.networks, "lora"), run.config.placeholder_token
    write_lora(run.path("lora.safetensors"), parts, "diffusers")
    write_lora(run.path("lora.kohya.safetensors"), parts, "kohya")
    files = [run.path("lora.safetensors")]
    if words:
        files.append(run.path("learned_embeds.safetensors"))
        write_embeddings(files[-1], dict(zip(words, new_words.make_permanent(sd).split(run.config.num_vectors))))
    sizes = lora_extract.sizes(sd.networks, "lora")
    run.print(lora_extract.size_sentence(sizes))
    write_results(run, sd, lesson, method="LoRA", trained=count, change=sizes,
                  file_bytes=sum(file.stat().st_size for file in files))


def check_flags(config):
    """Raises UserError where flags contradict each other, before anything is read or written."""
    lessons.check_flags(config)
    check(config.num_vectors == 1 or config.placeholder_token, "--num_vectors is for the words of --placeholder_token; "
          "expected these, too")
    captioned = config.with_prior_preservation and not (config.class_prompt and config.class_data == "worlds")
    check(config.recipe != "woven" or captioned, "--recipe woven preserves the prior by captioned pictures of the "
          "drawn worlds; expected --recipe plain with another prior or none, and with the flags of woven that you want")
    priors.check_flags(config)


def check_words(words, captions):
    """UserError for a word of --placeholder_token that is in no caption."""
    for word in words:
        check(any(word in caption for caption in captions), f'--placeholder_token: no caption has "{word}" in it, such '
              f'as "{captions[0]}"; expected a word of the captions')


if __name__ == "__main__":
    main()
