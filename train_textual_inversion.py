"""Textual inversion: a few pictures become a new word; nothing else changes (Gal et al. 2022; report section 4.2.2).

    python train_textual_inversion.py                                    a word for nine slices of drawn specimens
    python train_textual_inversion.py --placeholder_token "<dry-warp>" --data FOLDER --initializer_token texture
    python train_textual_inversion.py --num_vectors 4                    a word of four tokens
    python train_textual_inversion.py --resume runs/textual-inversion-001

Writes the word as learned_embeds.safetensors, which diffusers and nanodiff load, and as learned_embeds.pt for others.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from nanodiff.diffusion import process, samplers
from nanodiff.errors import check
from nanodiff.finetune import lesson as lessons, new_words
from nanodiff.finetune.cost import report_memory
from nanodiff.finetune.lesson import Denoiser, encode_captions, noisy_batch, random_rows
from nanodiff.finetune.previews import has_stalled, save_previews, write_results
from nanodiff.flags import (Between, Count, CountOrZero, NotNegative, OneOf, Positive, entry, parse, resumed,
                            set_defaults)
from nanodiff.formats.embedding_file import write_embedding
from nanodiff.training.run import MAY_CHANGE, Run, RunConfig
from nanodiff.training.step import learning_rate


@dataclass
class Config(RunConfig):
    model: str = ""  # SD 1.x or 2.x, a folder or a file (default: the small model that ships)
    base_dtype: Literal["fp32", "bf16"] = "fp32"  # of the frozen U-Net (bf16: half the memory; what learns stays fp32)
    placeholder_token: str = "<new>"  # the new word; no word of the vocabulary
    num_vectors: Count = 1  # tokens that the word stands for
    initializer_token: str = ""  # what the vectors start from: a word of one token, or one for each (default: drawn)
    learnable_property: Literal["object", "style"] = "style"  # the sentences that the word is learned in
    data: str = "woven"  # woven (drawn specimens), a drawn class such as zigzagged, a folder of pictures, TIFF volumes
    names: str = ""  # of woven: their classes, with commas; one that is named twice comes twice as often (default: all)
    size: CountOrZero = 0  # side of the pictures in pixels (0: the model's own)
    pictures: CountOrZero = 9  # drawn pictures to learn from
    variants: Count = 4  # random crops and flips of each picture that are encoded
    snr_gamma: NotNegative = 0.0  # of min-SNR weighting, such as 5 (0: every step counts the same)
    noise_offset: NotNegative = 0.0  # strength of offset noise, such as 0.1
    gradient_checkpointing: bool = False  # compute activations again in the backward pass: less memory, more time
    steps: Count = 500  # optimiser steps in all
    batch: Count = 8  # pictures of one micro-batch, over all processes
    lr: Positive = 5e-2  # peak learning rate
    warmup: CountOrZero = 0  # optimiser steps of linear learning-rate warm-up
    patience: CountOrZero = 0  # previews in a row without a better held-out loss after which training ends (0: never)
    validation_prompt: str = ""  # the prompt of the pictures on the way (default: the first of the sentences)
    retention: str = ""  # prompts of what the model could draw before, with | between (default: some of its world's)
    each: Count = 6  # pictures of every prompt in the sheets before and after
    guidance: NotNegative = 0.0  # scale of classifier-free guidance in pictures (0: the model's own)
    sampler: Annotated[str, OneOf(samplers.by_name)] = "dpm++2m"  # of the pictures
    sample_steps: Annotated[int, Between(1, 1000)] = 20  # its steps
    log_every: Count = 25  # steps between progress lines
    preview_every: Count = 250  # steps between pictures from fixed noise


@entry
def main(argv=None):
    config, given = parse(Config, argv, __doc__)
    if config.resume:
        config = resumed(config, given, "textual-inversion", MAY_CHANGE)
    elif not lessons.is_drawn(config.data):
        set_defaults(config, given, pictures=0)
    check_flags(config)
    return train(config)


def train(config):
    """Trains one word; returns the StableDiffusion that knows it, or None when it was stopped before."""
    sd, word = lessons.load_model(config.model, config.base_dtype), config.placeholder_token
    generator = torch.Generator().manual_seed(config.seed)
    rows = new_words.add_words(sd, [word], config.num_vectors, config.initializer_token, generator)
    sentences = new_words.sentences(word, config.learnable_property)
    training, held_out = lessons.load_pictures(config, sd, config.validation_prompt or sentences[0])
    held_out.captions = [sentences[i % len(sentences)] for i in range(len(held_out))]
    run = Run(config, "textual-inversion")
    lesson = lessons.make_lesson(config, sd, run, training, held_out)

    net = torch.nn.ParameterList([rows.vectors])
    start = rows.vectors.detach().clone()
    optimiser = torch.optim.AdamW(net.parameters(), config.lr, betas=(0.9, 0.99), weight_decay=0.0)
    captions = encode_captions(sd, sentences, learning=True)
    run.track(net=net, optimiser=optimiser)
    denoise = run.ddp(Denoiser(sd))
    run.print(f'the word "{word}" stands for {config.num_vectors} tokens; it is learned in sentences such as '
              f'"{sentences[0]}"')
    count = report_memory(run, sd, net, lesson)

    for step in run.steps():
        lr = learning_rate(step, config)
        if run.due(config.preview_every):
            save_previews(run, sd, lesson)
            if has_stalled(run):
                break
        for micro in run.micro_batches():
            x0, t, noise, index, position = noisy_batch(lesson, run, sd, step, micro)
            target = process.target(sd.schedule, sd.kind, x0, noise, t)
            text = captions(random_rows(config, step, position, len(sentences)))  # token ids [B, 77]

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
    change = float((rows.vectors.detach() - start).norm() / rows.vectors.detach().norm())
    vectors = new_words.make_permanent(sd)
    write_embedding(run.path("learned_embeds.safetensors"), word, vectors)
    write_embedding(run.path("learned_embeds.pt"), word, vectors, "a1111")
    run.print(f"the word's vectors moved by {change:.1%} of their length")
    write_results(run, sd, lesson, method="textual inversion", trained=count, change={word: change},
                  file_bytes=run.path("learned_embeds.safetensors").stat().st_size)
    return sd


def check_flags(config):
    """Raises UserError where flags contradict each other, before anything is read or written."""
    lessons.check_flags(config)
    prompt, word = config.validation_prompt, config.placeholder_token
    check(not prompt or word in prompt, f'--validation_prompt "{prompt}" does not hold the word "{word}"; expected it '
          f'somewhere, such as "a photo of {word}"')


if __name__ == "__main__":
    main()
