"""LoRA: a few low-rank changes teach a frozen model something new (Hu et al. 2021; report section 4.2.4, tables 13, 14).

    python train_lora.py                                  nine woven classes from drawn specimens, in minutes on a CPU
    python train_lora.py --words "" --no-dreambooth       the same with nothing but a LoRA
    python train_lora.py --data VOLUMES                   TIFF volumes of your own (named by state, see the README)
    python train_lora.py --data FOLDER --prompt "a photo of sks carbon"    pictures of your own
    python train_lora.py --model stable-diffusion-v1-5 --places attention --rank 4 --lr 1e-4 --batch 1
    python train_lora.py --dreambooth --prompt "a sks woven texture" --class_prompt "a woven texture"
    python train_lora.py --resume runs/lora-001           goes on exactly where the run was stopped

The base weights are frozen; what is trained is written as a LoRA file that diffusers, peft and nanodiff read, and kohya's
tools as lora.kohya.safetensors. With --words some words of the captions get new vectors, learned along (as in pivotal
tuning, train_pivotal.py, but at once); they are in learned_embeds.safetensors, and the LoRA needs them.
"""

from dataclasses import dataclass

import torch

from nanodiff import fast, rng
from nanodiff.diffusion import process
from nanodiff.errors import check
from nanodiff.finetune import dreambooth, teaching, textual_inversion
from nanodiff.flags import entry, parse, resumed
from nanodiff.formats.embedding_file import write_embeddings
from nanodiff.formats.lora_file import write_lora
from nanodiff.models import lora, lora_extract
from nanodiff.training.batches import Batches
from nanodiff.training.run import MAY_CHANGE, Run


@dataclass
class Config(teaching.TeachConfig, dreambooth.PriorConfig):
    rank: int = 5  # of every change
    alpha: float = 0.0  # a change counts alpha / rank times (0: the rank, so once)
    base: str = "fp32"  # numbers of the frozen U-Net: fp32 or bf16 (half the memory; adapters and words stay fp32)
    places: str = "attention,feedforward,resnet"  # attention, feedforward, projection, resnet, text, with commas between
    words: str = ""  # words of the captions that are learned as new ones along with it, with commas between
    vectors: int = 1  # tokens that each of these words stands for
    word_lr: float = 6e-2  # peak learning rate of their vectors
    dreambooth: bool = False  # train on --class_pictures, too, so that what they show keeps its meaning
    steps: int = 2800  # optimiser steps in all
    batch: int = 4  # pictures a micro-batch and process
    lr: float = 5e-3  # peak learning rate
    decay: float = 0.0  # weight decay
    warmup: int = 20  # optimiser steps of linear learning-rate warm-up
    log_every: int = 50  # steps between progress lines
    preview_every: int = 1400  # steps between pictures from fixed noise


# What the first command adds. The small model's text encoder has learned that these words mean nothing, and its U-Net
# forgets in a minute: so the words are learned anew, and pictures of its own world are shown beside the specimens.
FIRST = {"words": "sf_dry,sf_compacted,sf_injected,sf_thickness,sf_warp,sf_weft", "dreambooth": True,
         "class_pictures": "worlds", "class_count": 1500, "class_batch": 2, "class_answers": 2}


@entry
def main(argv=None):
    config, given = parse(Config, argv, __doc__)
    if config.resume:
        config = resumed(config, given, "lora", MAY_CHANGE)
    elif config.data == "woven" and not (config.model or config.prompt):
        own_class = "class_prompt" in given or "dreambooth" in given and not config.dreambooth  # another prior, or none
        for name in FIRST.keys() - given:
            if not (own_class and name.startswith("class_")):
                setattr(config, name, FIRST[name])
    check_flags(config)
    return train(config)


def train(config):
    """Trains one LoRA and draws what it changed; returns the StableDiffusion with it, or None when it was stopped."""
    sd = teaching.load_model(config, config.base)
    places = [place.strip() for place in config.places.split(",")]
    paths = lora.find_targets(sd.networks, places)
    live = "text_model" in paths  # the text encoder learns
    words, generator = textual_inversion.named(config.words), torch.Generator().manual_seed(config.seed)
    rows = textual_inversion.add_words(sd, words, config.vectors, generator=generator) if words else None
    side = teaching.side_of(config, sd)
    training, held_out = teaching.load_pictures(config, side)
    for word in words:
        check(any(word in caption for caption in training.captions), f'--words: no caption has "{word}" in it, such as '
              f'"{training.captions[0]}"; expected a word of the captions')
    old = teaching.retained(config)
    run = Run(config, "lora")
    for net in (sd.text_model, sd.unet, sd.autoencoder):
        net.to(run.device)
    prior = dreambooth.prior(config, sd, side, run, live) if config.dreambooth else None
    lesson = teaching.make_lesson(config, sd, training, held_out, run.print)

    trained = lora.add(sd.networks, paths, config.rank, config.alpha or config.rank, generator, "lora")
    for net in sd.networks.values():
        fast.speed_up(net)  # the layers with adapters, too
    groups = [{"params": trained}]
    if words:
        trained = [*trained, rows.vectors]
        groups.append({"params": [rows.vectors], "times": config.word_lr / config.lr, "weight_decay": 0.0})
    net = torch.nn.ParameterList(trained)
    sd.unet.checkpointing = config.checkpointing
    optimiser = torch.optim.AdamW(groups, config.lr, betas=(0.9, 0.99), weight_decay=config.decay, fused=True)
    batches = Batches(lesson.training, config.batch, config.seed, config.accumulate, run.rank, run.world)
    states = teaching.states(sd, lesson.training.captions, live or bool(words))
    run.track(net=net, optimiser=optimiser)
    run.print(", ".join(f"{len(some)} layers of the {network}" for network, some in paths.items()) + f", rank {config.rank}")
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
    parts = lora.parts(sd.networks, "lora")
    for name, naming in (("lora.safetensors", "diffusers"), ("lora.kohya.safetensors", "kohya")):
        write_lora(run.path(name), parts, naming)
    files = [run.path("lora.safetensors")]
    if words:
        files.append(run.path("learned_embeds.safetensors"))
        write_embeddings(files[-1], dict(zip(words, textual_inversion.keep_word(sd).split(config.vectors))))
    sizes = lora_extract.sizes(sd.networks, "lora")
    run.print(lora_extract.size_sentence(sizes))
    teaching.finish(run, sd, lesson, old, method="LoRA", trained=own, change=sizes,
                    file_bytes=sum(file.stat().st_size for file in files))
    return sd


def check_flags(config):
    """Raises UserError for every flag whose value alone is wrong, before anything is read or written."""
    teaching.check_flags(config)
    check(config.rank >= 1, f"--rank is {config.rank}; expected a whole number from 1, such as 8")
    check(config.alpha >= 0, f"--alpha is {config.alpha}; expected a number above 0, or 0 for the rank")
    check(config.decay >= 0, f"--decay is {config.decay}; expected 0 or more")
    check(config.vectors >= 1, f"--vectors is {config.vectors}; expected 1 or more")
    check(config.vectors == 1 or config.words, "--vectors is for the words of --words; expected these, too")
    check(config.word_lr > 0, f"--word_lr is {config.word_lr}; expected a number above 0, such as 0.02")
    dreambooth.check_flags(config, config.dreambooth)


if __name__ == "__main__":
    main()
