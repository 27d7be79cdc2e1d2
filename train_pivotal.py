"""Pivotal tuning: first a new word is learned, then a LoRA around it, with prior preservation (report section 4.2.5).

    python train_pivotal.py                                 a new word for ten slices of drawn specimens
    python train_pivotal.py --data FOLDER --placeholder_token "<dry-warp>"
    python train_pivotal.py --with_prior_preservation --class_prompt "a woven texture"
    python train_pivotal.py --resume runs/pivotal-001

The LoRA starts from the learned word, which stays as it is in the second stage. Writes learned_embeds.safetensors and
lora.safetensors: a model needs both. Sources: Roich et al. 2021 (arXiv 2106.05744) for the two stages; Gal et al. 2022;
Hu et al. 2021; Ruiz et al. 2022.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from nanodiff import fast
from nanodiff.diffusion import process, samplers
from nanodiff.errors import check
from nanodiff.finetune import lesson as lessons, new_words, prior as priors
from nanodiff.finetune.cost import report_memory
from nanodiff.finetune.lesson import Denoiser, caption_rows, encode_captions, noisy_batch, random_rows
from nanodiff.finetune.previews import save_previews, write_results
from nanodiff.finetune.prior import prior_batch
from nanodiff.flags import (BelowOne, Between, Count, CountOrZero, NotNegative, OneOf, Positive, entry, parse, resumed,
                            set_defaults)
from nanodiff.formats.embedding_file import write_embedding
from nanodiff.formats.lora_file import write_lora
from nanodiff.models import lora, lora_extract
from nanodiff.training.run import MAY_CHANGE, Run, RunConfig
from nanodiff.training.step import learning_rate

Layers = Literal["attention", "feedforward", "projection", "resnet"]


@dataclass
class Config(RunConfig):
    model: str = ""  # SD 1.x or 2.x, a folder or a file (default: the small model that ships)
    base_dtype: Literal["fp32", "bf16"] = "fp32"  # of the frozen U-Net (bf16: half the memory; what learns stays fp32)
    placeholder_token: str = "<new>"  # the new word; no word of the vocabulary
    num_vectors: Count = 1  # tokens that the word stands for
    initializer_token: str = ""  # what the vectors start from: a word of one token, or one for each (default: drawn)
    word_steps: Count = 200  # optimiser steps of the first stage, in which the word alone is trained
    word_lr: Positive = 5e-2  # peak learning rate of the word
    rank: Count = 8  # of every change
    targets: tuple[Layers, ...] = ("attention", "feedforward", "resnet")  # layers of the U-Net that get a LoRA
    data: str = "woven"  # woven (drawn specimens), a drawn class such as zigzagged, a folder of pictures, TIFF volumes
    names: str = ""  # of woven: their classes, with commas; one that is named twice comes twice as often (default: all)
    instance_prompt: str = ""  # the caption of every picture in the second stage (default: "a WORD texture")
    size: CountOrZero = 0  # side of the pictures in pixels (0: the model's own)
    pictures: CountOrZero = 10  # drawn pictures to learn from
    variants: Count = 4  # random crops and flips of each picture that are encoded
    caption_dropout: BelowOne = 0.1  # share of captions that are left out in the second stage, for guidance
    with_prior_preservation: bool = False  # train on class pictures, too, in the second stage
    class_prompt: str = ""  # the prompt without the new word, such as "a woven texture"; or several, with | between
    class_data: str = ""  # their folder, filled up (default: the run's); without class_prompt: with captions, or worlds
    num_class_images: Count = 100  # class pictures
    class_batch: CountOrZero = 0  # of them in a micro-batch (0: as many as --batch)
    teacher_predictions: CountOrZero = 0  # noisy copies of each whose target the base model predicts (0: none)
    prior_loss_weight: NotNegative = 1.0  # of the loss on class pictures
    snr_gamma: NotNegative = 0.0  # of min-SNR weighting, such as 5 (0: every step counts the same)
    noise_offset: NotNegative = 0.0  # strength of offset noise, such as 0.1
    gradient_checkpointing: bool = False  # compute activations again in the backward pass: less memory, more time
    steps: Count = 500  # optimiser steps in all
    batch: Count = 8  # pictures of one micro-batch, over all processes
    lr: Positive = 1e-3  # peak learning rate of the LoRA
    warmup: CountOrZero = 0  # optimiser steps of linear learning-rate warm-up, in each stage
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
        config = resumed(config, given, "pivotal", MAY_CHANGE)
    elif not lessons.is_drawn(config.data):
        set_defaults(config, given, pictures=0)
    config.instance_prompt = config.instance_prompt or f"a {config.placeholder_token} texture"
    check_flags(config)
    return train(config)


def train(config):
    """Trains a word, then a LoRA; returns the StableDiffusion with both, or None when it was stopped before."""
    sd = lessons.load_model(config.model, config.base_dtype)
    paths, generator = lora.find_targets(sd.networks, config.targets), torch.Generator().manual_seed(config.seed)
    rows = new_words.add_words(sd, [config.placeholder_token], config.num_vectors, config.initializer_token, generator)
    training, held_out = lessons.load_pictures(config, sd, config.instance_prompt)
    run = Run(config, "pivotal")
    lesson = lessons.make_lesson(config, sd, run, training, held_out)
    prior = priors.make_prior(config, sd, run)

    word = torch.nn.ParameterList([rows.vectors])
    net = torch.nn.ParameterList(lora.add(sd.networks, paths, config.rank, config.rank, generator, "lora"))
    word_optimiser = torch.optim.AdamW(word.parameters(), config.word_lr, betas=(0.9, 0.99), weight_decay=0.0)
    lora_optimiser = torch.optim.AdamW(net.parameters(), config.lr, betas=(0.9, 0.99), weight_decay=0.0, fused=True)
    sentences = [config.instance_prompt, *new_words.sentences(config.placeholder_token)]
    network, denoise = fast.speed_up(Denoiser(sd)), None
    run.track(word=word, net=net, word_optimiser=word_optimiser, optimiser=lora_optimiser)
    count = report_memory(run, sd, [*word, *net], lesson, prior)
    stages = ((word, word_optimiser, (0, config.word_steps), config.word_lr),
              (net, lora_optimiser, (config.word_steps, config.steps), config.lr))

    for step in run.steps():
        first = step < config.word_steps  # the word alone is trained; then the LoRA alone, under the instance prompt
        trained, optimiser, span, peak = stages[0 if first else 1]
        lr = learning_rate(step, config, span) * (peak / config.lr)
        if denoise is None or step == config.word_steps:  # a stage begins
            word.requires_grad_(first), net.requires_grad_(not first)
            captions, denoise = encode_captions(sd, sentences, learning=first), run.ddp(network)
        if run.due(config.preview_every):
            save_previews(run, sd, lesson)
        for micro in run.micro_batches():
            x0, t, noise, index, position = noisy_batch(lesson, run, sd, step, micro)
            target = process.target(sd.schedule, sd.kind, x0, noise, t)
            rows = (random_rows(config, step, position, len(sentences)) if first else
                    caption_rows(config, step, torch.zeros_like(index), position))
            text = [captions(rows)]  # token ids [B, 77]; in the second stage [B, 77, D]
            if prior is not None and not first:  # concatenated after the instance batch
                *class_batch, class_text = prior_batch(prior, run, sd, step, micro)
                x0, t, noise, target = (torch.cat(pair) for pair in zip((x0, t, noise, target), class_batch))
                text.append(class_text)

            x_t = process.q_sample(sd.schedule, x0, t, noise)
            with run.autocast():
                prediction = denoise(x_t, t, *text)
            weight = process.loss_weight(sd.schedule, sd.kind, t, config.snr_gamma or None)
            losses = weight * (prediction.float() - target).square().flatten(1).mean(1)  # [B]
            loss = losses[:len(index)].mean()
            if prior is not None and not first:
                prior_loss = losses[len(index):].mean()
                run.note(instance=loss.detach(), prior=prior_loss.detach())
                loss = loss + config.prior_loss_weight * prior_loss
            run.backward(loss, index)
        run.update(trained, optimiser, lr)
        run.log(step, lr)

    if run.rank != 0 or not run.finished:
        return None
    save_previews(run, sd, lesson)
    write_files(run, sd, lesson, count)
    return sd


def write_files(run, sd, lesson, count):
    """Writes the LoRA, the word, the sheets and results.json; count: trained parameters."""
    files = [run.path("lora.safetensors"), run.path("learned_embeds.safetensors")]
    write_lora(files[0], lora.parts(sd.networks, "lora"))
    write_embedding(files[1], run.config.placeholder_token, new_words.make_permanent(sd))
    sizes = lora_extract.sizes(sd.networks, "lora")
    run.print(lora_extract.size_sentence(sizes))
    write_results(run, sd, lesson, method="pivotal tuning", trained=count, change=sizes,
                  file_bytes=sum(file.stat().st_size for file in files))


def check_flags(config):
    """Raises UserError where flags contradict each other, before anything is read or written."""
    lessons.check_flags(config)
    prompt, word = config.instance_prompt, config.placeholder_token
    check(config.word_steps < config.steps, f"--word_steps is {config.word_steps}; expected 1 to below --steps "
          f"{config.steps}")
    check(word in prompt, f'--instance_prompt "{prompt}" does not hold the word "{word}"; expected it somewhere, '
          f'such as "a {word} texture"')
    priors.check_flags(config)


if __name__ == "__main__":
    main()
