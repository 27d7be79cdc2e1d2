"""Latent diffusion: a small Stable Diffusion from scratch (Rombach et al. 2022; report section 4.1, figure 38).

    python train_ldm.py                                on the drawn worlds
    python train_ldm.py --data FOLDER                  pictures with captions of your own
    python train_ldm.py --autoencoder runs/kl-autoencoder-001/model --text runs/clip-001/model
    python train_ldm.py --text scratch                 the text encoder is trained along, from nothing
    python train_ldm.py --autoencoder none             in pixels (f = 1): model/ is then for nanodiff alone
    python train_ldm.py --init data/nano-sd            starts from a trained model's U-Net, with a schedule of its own
    python train_ldm.py --resume runs/ldm-001          goes on exactly where the run was stopped

Pictures are encoded once. Each step noises latents and asks the U-Net, which is shown the caption through
cross-attention, for the noise (or v). The run's model/ is a diffusers folder, which nanodiff.load opens too.
"""

import contextlib
from dataclasses import dataclass
from typing import Annotated, Literal

import torch
from torch import nn

from nanodiff import fast, plots, rng, worlds
from nanodiff.classifiers import worlds as world_classifier
from nanodiff.data import captions, images
from nanodiff.diffusion import Schedule, process
from nanodiff.diffusion.samplers import by_name
from nanodiff.errors import UserError, check
from nanodiff.flags import (AtLeast, BelowOne, Between, Count, CountOrZero, NotEmpty, NotNegative, OneOf, Positive,
                            entry, parse, resumed)
from nanodiff.formats import stable_diffusion_folder as folders
from nanodiff.formats.diffusers_folder import KINDS, schedule_settings
from nanodiff.metrics import agreement
from nanodiff.models.clip_text import ClipText, ClipTextConfig, Tokenizer, clip_text_config_to
from nanodiff.models.cond_unet import CondUNet, CondUNetConfig
from nanodiff.models.kl_autoencoder import KLAutoencoder, Pixels
from nanodiff.pipelines.attention_maps import attention_maps, sheet, word_places
from nanodiff.pipelines.stable_diffusion import SHIPPED, StableDiffusion, load
from nanodiff.training import datasets, latents, validation
from nanodiff.training.batches import Batches
from nanodiff.training.muon import Muon
from nanodiff.training.run import MAY_CHANGE, Run, RunConfig
from nanodiff.training.step import EMA, learning_rate
from nanodiff.worlds import textures


@dataclass
class Config(RunConfig):
    data: str = "worlds"  # worlds (drawn), or a folder of pictures with captions
    size: Annotated[int, AtLeast(16)] = 64  # side of the pictures in pixels
    pictures: Count = 30_000  # drawn pictures to train on
    names: str = ""  # some classes of the drawn worlds alone, with commas between (default: all of the base's)
    variants: Count = 2  # captions of each drawn picture, or random crops and flips of each file, that are kept
    autoencoder: str = ""  # folder of the frozen autoencoder (default: the one that ships); none: diffusion in pixels
    text: str = ""  # folder of text_encoder/ and tokenizer/ (default: those that ship); scratch: a new one, trained
    train_text: bool = False  # train the loaded text encoder along
    text_width: Annotated[int, AtLeast(8)] = 96  # of the states of a new text encoder
    text_layers: Count = 3  # layers of a new text encoder
    caption_dropout: BelowOne = 0.1  # share of captions that are left out, for guidance
    init: str = ""  # model folder whose U-Net, and its sizes, the training starts from (default: fresh weights)
    channels: Annotated[tuple[Count, ...], NotEmpty()] = (48, 64, 96)  # width of each level of the U-Net
    blocks: Count = 1  # ResNet blocks a level on the way down (one more on the way up)
    attention: tuple[CountOrZero, ...] = (1, 2)  # levels with transformers, 0 is the full size
    head_width: Count = 32  # channels of an attention head
    schedule: Literal["cosine", "scaled_linear", "linear"] = "cosine"  # of noise; scaled_linear: Stable Diffusion's
    shift: Annotated[float, Between(0.01, 100)] = 4.0  # times as much noise as the schedule has (1: its own)
    zero_snr: bool = False  # rescale the schedule so that it ends in pure noise; sample from its last step
    prediction: Literal["noise", "v"] = "v"  # what the U-Net predicts
    snr_gamma: NotNegative = 0.0  # of min-SNR weighting, such as 5 (0: every step counts the same)
    noise_offset: NotNegative = 0.0  # strength of offset noise
    guidance: NotNegative = 3.0  # scale of classifier-free guidance in previews, and the saved model's default
    guidance_start: BelowOne = 0.0  # share of the T time steps, from noise on, in which it does not act; the same
    sampler: Annotated[str, OneOf(by_name)] = "dpm++2m"  # of the previews
    sample_steps: Annotated[int, Between(1, 1000)] = 20  # its steps
    attention_of: tuple[str, ...] = ()  # words whose attention maps are drawn at the end (figure 43)
    steps: Count = 20_000  # optimiser steps in all
    batch: Count = 16  # latents of one micro-batch, over all processes
    optimiser: Literal["muon", "adamw"] = "muon"  # muon leaves what is no matrix to AdamW
    lr: Positive = 1e-3  # peak learning rate
    weight_decay: NotNegative = 0.01  # of both
    warmup: CountOrZero = 300  # optimiser steps of linear learning-rate warm-up
    ema: BelowOne = 0.999  # decay of the averaged weights, which are what is saved
    preview_every: Count = 1000  # steps between pictures from fixed noise
    checkpoint_every: Count = 1000  # steps between checkpoints


HELD_OUT = 256  # pictures of the held-out loss at most


@entry
def main(argv=None):
    config, given = parse(Config, argv, __doc__)
    if config.resume:
        config = resumed(config, given, "ldm", MAY_CHANGE | {"attention_of"})
    check_flags(config)
    train(config)


class TextToNoise(nn.Module):
    """What is trained: the U-Net, and the text encoder unless it is frozen.

    x [B, C, h, w] noised latents, t [B], words: token ids int64 [B, 77], or with a frozen encoder its states [B, 77, D]
    """

    def __init__(self, unet, text=None):
        super().__init__()
        self.unet, self.text = unet, text

    def forward(self, x, t, words):
        return self.unet(x, t, words if self.text is None else self.text(words)[0])


def train(config):
    """Trains one model and draws what it learns; returns the StableDiffusion, or None when it was stopped before."""
    run = Run(config, "ldm")
    autoencoder, text, tokenizer, unet = make_networks(config)
    training, held_out, prompts, held_out_name = load_data(config, tokenizer)
    attention_words, attention_caption = attention_prompt(config, prompts, tokenizer)
    training, held_out = (encoded(run, autoencoder, part, config) for part in (training, held_out))
    batches = Batches(training, config.batch, config.seed, config.gradient_accumulation, run.rank, run.world,
                      config.workers)

    text_learns = config.text == "scratch" or config.train_text
    net = TextToNoise(unet, text.requires_grad_(True) if text_learns else None).to(run.device).train()
    ema = EMA(net, config.ema)
    fast.speed_up(net)
    optimiser = make_optimiser(net, config)
    run.track(net=net, ema=ema, optimiser=optimiser)
    ddp_net = run.ddp(net)
    ids = tokenizer([*training.captions, ""]).view(-1, 77)  # the last is the empty caption's
    words_of = ((lambda row: ids[row].to(run.device)) if text_learns
                else latents.cache_text_states(text.to(run.device), ids))
    model = make_model(config, ema.net, text, tokenizer, autoencoder, training.shape[1])
    schedule = model.schedule
    run.print(f"U-Net {sum(p.numel() for p in net.unet.parameters()):,} parameters, text encoder "
              f"{sum(p.numel() for p in text.parameters()):,} ({'trained' if text_learns else 'frozen'}), "
              f"{len(training):,} latents of {training.shape}, {held_out_name} for the held-out loss")

    for step in run.steps():
        lr = learning_rate(step, config)
        if run.due(config.preview_every):
            preview(run, model, held_out, prompts)
        for micro in run.micro_batches():
            x0, index, position = batches.get(step, micro)
            x0, position = x0.to(run.device), position.to(run.device)
            noise = rng.noise(config.seed, step, position, x0.shape[1:], config.noise_offset)
            t = rng.time_steps(config.seed, step, position, schedule.T)
            row = caption_rows(config, step, index, position, training.variants, len(ids) - 1)

            x_t = process.q_sample(schedule, x0, t, noise)
            with run.autocast():
                prediction = ddp_net(x_t, t, words_of(row))
            error = prediction.float() - process.target(schedule, config.prediction, x0, noise, t)  # [B, C, h, w]
            weight = process.loss_weight(schedule, config.prediction, t, config.snr_gamma or None)
            loss = (weight * error.square().flatten(1).mean(1)).mean()
            run.backward(loss, index)
        run.update(net, optimiser, lr)
        ema.update(net)
        run.log(step, lr)

    if run.rank != 0 or not run.finished:
        return None
    preview(run, model, held_out, prompts)
    if attention_words:
        draw_attention(run, model, attention_caption, attention_words)
    run.print(f"done: {run.folder}")
    return model


def caption_rows(config, step, index, position, variants, empty):
    """Rows [B] of the table of captions for pictures `index` [B]: one of each picture's variants, or the empty one."""
    dropped = rng.uniform(config.seed, rng.DROPOUT, step, position) < config.caption_dropout
    variant = (rng.uniform(config.seed, rng.WORDING, step, position) * variants).long()
    return torch.where(dropped.cpu(), empty, index * variants + variant.cpu())


def encoded(run, autoencoder, images, config):
    """The latents of a data set, encoded once, with a line on how long that takes; of Pixels the data set as it is."""
    texts, n = images.captions, len(images)
    if not isinstance(autoencoder, Pixels):
        crops = 1 if config.data == "worlds" else config.variants
        images = latents.encode(autoencoder.to(run.device), images, crops, seed=config.seed, say=run.print)
    images.captions, images.variants = texts, len(texts) // n
    return images


# --- what it has learned --------------------------------------------------------------------------------------------

def preview(run, model, held_out, prompts):
    """Saves the model; pictures of fixed prompts from fixed noise and their classes as predicted, the held-out loss."""
    if run.rank != 0:
        return
    config = run.config
    model.save(run.folder / "model")
    validation, quarters = held_out_loss(model, held_out)
    x = model.generate([caption for caption, _, _ in prompts], steps=config.sample_steps, guidance=config.guidance,
                       sampler=config.sampler, seed=config.seed, output="tensor", progress=False)
    plots.save(plots.grid(x, min(12, len(prompts))), run.path(f"previews/{run.step:08d}.png"),
               {"prompts": " | ".join(caption for caption, _, _ in prompts), "guidance": config.guidance})
    row = {"step": run.step, "validation": validation, "validation_quarters": quarters}
    line = f"step {run.step}  held-out loss {validation:.4f}, by quarter of t " + " ".join(f"{q:.4f}" for q in quarters)
    lines = {"training loss": "loss", "held-out loss": "validation"}
    if prompts[0][1] is not None:
        predictions = world_classifier.classify(world_classifier.load_classifier(), x)
        shares = agreement.agreement(predictions, [name for _, name, _ in prompts], [pair for _, _, pair in prompts])
        row |= {"agreement": shares["class"], "colours": shares["colours"]}
        line += f", the classifier agrees with {shares['class']:.1%} of classes, {shares['colours']:.1%} of colours"
        lines |= {"class read": "agreement", "colours read": "colours"}
    run.record(**row)
    run.print(line)
    page = plots.curves({label: run.history(key) for label, key in lines.items()}, "Latent diffusion", "step")
    plots.save(page, run.path("curves.png"))


def held_out_loss(model, held_out):
    """(mean, by quarter of t): the loss of held-out latents, with the same time steps and noise at every call."""
    index = torch.arange(min(HELD_OUT, len(held_out)))
    x0 = held_out.read(index, index).to(model.device)
    context = model.encode_text([held_out.captions[i * held_out.variants] for i in index.tolist()])
    with fast.packed(model.unet):
        return validation.held_out_loss(model.unet, x0, model.schedule, model.kind, context)


def draw_attention(run, model, caption, words):
    """attention.png: where in a picture of the caption the U-Net attends to the words."""
    config = run.config
    maps = attention_maps(model, caption, words, config.seed, steps=config.sample_steps, guidance=config.guidance,
                          sampler=config.sampler, progress=False)
    plots.save(sheet([maps]), run.path("attention.png"), {"prompt": caption})


# --- data and networks ----------------------------------------------------------------------------------------------

def load_data(config, tokenizer):
    """(training pictures, held-out pictures, prompts of previews, what the held-out pictures are called).

    A prompt is (caption, class or None, colours or None).
    """
    if config.data == "worlds":
        names = worlds.chosen(config.names)
        scenes = [textures.scene(worlds.first_seed("val", 0) + 10_000 + i, names[i % len(names)], "val")
                  for i in range(max(2 * len(names), 48))]
        prompts = [(captions.caption(scene), scene.name, captions.named_colours(scene)) for scene in scenes]
        attention_prompt(config, prompts, tokenizer)  # a wrong word is found before a minute of drawing
        print("drawing the pictures: about a minute", flush=True)
        training, held_out = (
            worlds.load(split, config.size, n, names, seed=config.seed, workers=max(1, config.workers))
            for split, n in (("train", config.pictures), ("val", min(HELD_OUT, config.pictures))))
        for part, n in ((training, config.variants), (held_out, 1)):
            part.captions = [captions.caption(scene, v) for scene in part.scenes for v in range(n)]
        return training, held_out, prompts, "pictures of other seeds"
    check(not config.names, "--names is for the drawn worlds")
    training = datasets.load(config.data, "train", size=config.size, channels=3, seed=config.seed)
    held_out, name = datasets.load_held_out(config.data, training, seed=config.seed)
    for part, name_of_part in ((training, "training"), (held_out, "held-out")):
        check(part.captions is not None, f"the {name_of_part} pictures of --data {config.data} have no captions; "
              "expected a folder with captions, see nanodiff/data/caption_files.py")
    check(config.batch <= len(training), f"--batch {config.batch} is more than the {len(training)} pictures of --data "
          f"{config.data}; expected at most that")
    held_out = images.some_of(held_out, images.spread(held_out, HELD_OUT))
    prompts = [(held_out.captions[i], None, None) for i in images.spread(held_out, 24).tolist()]
    return training, held_out, prompts, name


def make_networks(config):
    """(autoencoder, text encoder, tokenizer, U-Net) that the flags ask for."""
    autoencoder, generator = load_autoencoder(config), torch.Generator().manual_seed(config.seed)
    text, tokenizer = text_encoder(config, generator)
    unet = make_unet(config, autoencoder.config.latent_channels, text.config.width, generator)
    return autoencoder, text, tokenizer, unet


def make_model(config, net, text, tokenizer, autoencoder, side):
    """The StableDiffusion of a TextToNoise, or of its U-Net and a frozen text encoder; side: of its latents."""
    settings = {"scheduler": scheduler_settings(config), "text_encoder": clip_text_config_to(text.config),
                "unet": folders.unet_config_to(net.unet.config) | {"sample_size": side},
                "vae": folders.PIXELS if config.autoencoder == "none" else folders.vae_config_to(autoencoder.config),
                "guidance": config.guidance, "guidance_start": config.guidance_start}
    return StableDiffusion(tokenizer, text if net.text is None else net.text, net.unet, autoencoder, settings)


def make_optimiser(net, config):
    """Muon with AdamW for what is no matrix, or AdamW alone."""
    options = dict(lr=config.lr, betas=(0.9, 0.99), weight_decay=config.weight_decay)
    if config.optimiser == "muon":
        return Muon(net, **options)
    return torch.optim.AdamW(net.parameters(), fused=True, **options)


def load_autoencoder(config):
    """The frozen autoencoder that the flags ask for; Pixels for none."""
    if config.autoencoder == "none":
        return Pixels()
    net = folders.load_autoencoder(config.autoencoder or SHIPPED / "vae")
    check(isinstance(net, KLAutoencoder), f"--autoencoder {config.autoencoder} has a codebook; expected one that was "
          "trained with --regulariser kl, as Stable Diffusion's folders hold")
    f = net.config.factor
    check(config.size % f == 0, f"--size {config.size} does not fit latents {f} times smaller; expected a multiple of "
          f"{f}, such as {max(1, round(config.size / f)) * f}")
    return net


def text_encoder(config, generator):
    """(ClipText, Tokenizer) that the flags ask for."""
    if config.text != "scratch":
        return folders.load_text_encoder(config.text or SHIPPED)
    width = config.text_width
    sizes = ClipTextConfig(width=width, layers=config.text_layers, heads=max(1, width // 32), mlp=4 * width)
    return ClipText(sizes, generator), Tokenizer.shipped()


def attention_prompt(config, prompts, tokenizer):
    """The words of --attention_of, and the first of the previews' prompts that holds them all; UserError for none."""
    words = config.attention_of
    for caption, _, _ in prompts if words else ():
        with contextlib.suppress(UserError):
            word_places(tokenizer, caption, words)
            return words, caption
    check(not words, f'no prompt of the previews holds all words of --attention_of "{",".join(words)}"; expected words '
          f'of one, such as "{prompts[0][0]}"')
    return words, None


def make_unet(config, latent_channels, context_channels, generator):
    """The U-Net that the flags ask for, float32: fresh, or that of --init; UserError where it does not fit the rest."""
    if not config.init:
        return CondUNet(unet_config(config, latent_channels, context_channels), generator)
    model = load(config.init)
    if model.kind != config.prediction:
        print(f"the U-Net of --init {config.init} has learned to predict {model.kind}, and learns to predict "
              f"{config.prediction} from now on")
    sizes = model.unet.config
    channels = sizes.in_channels, sizes.out_channels, sizes.context_channels
    expected = latent_channels, latent_channels, context_channels
    check(channels == expected, f"the U-Net of --init {config.init} takes and gives {channels[0]} and {channels[1]} "
          f"channels and reads text of width {channels[2]}; expected {expected[0]}, {expected[1]} and {expected[2]}, "
          "as those of --autoencoder and --text")
    return model.unet.requires_grad_(True)


def unet_config(config, latent_channels, context_channels):
    """The U-Net's sizes from the flags."""
    channels = config.channels
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if all(width % g == 0 for width in channels))
    heads = tuple(max(1, width // config.head_width) for width in channels)
    return CondUNetConfig(latent_channels, latent_channels, channels, config.blocks, config.attention,
                          heads=heads, context_channels=context_channels, linear_projection=True, groups=groups)


def scheduler_settings(config):
    """The noise schedule in the words of diffusers' scheduler_config.json; pictures are drawn by DDIM unless asked."""
    makers = {"cosine": Schedule.cosine, "scaled_linear": Schedule.scaled_linear, "linear": Schedule.linear}
    names = {ours: theirs for theirs, ours in KINDS.items()}
    schedule = makers[config.schedule]()
    schedule = schedule.shifted(config.shift) if config.shift != 1 else schedule  # unshifted it keeps its name
    schedule = schedule.zero_terminal_snr() if config.zero_snr else schedule
    return {"_class_name": "DDIMScheduler", "_diffusers_version": "0.6.0", "num_train_timesteps": schedule.T,
            **schedule_settings(schedule), "clip_sample": False, "prediction_type": names[config.prediction],
            "set_alpha_to_one": True, "steps_offset": 0, "timestep_spacing": "trailing"}


def check_flags(config):
    """Raises UserError where flags do not go together, before anything is read or written."""
    check(config.pictures >= config.batch, f"--pictures is {config.pictures}; expected --batch {config.batch} or more")
    check(config.text != "scratch" or not config.train_text, "--text scratch is trained in any case; expected no "
          "--train_text")
    check(config.prediction == "v" or not config.zero_snr, "--zero_snr leaves no signal at the last step, where "
          "--prediction noise says nothing about the picture; expected --prediction v")
    check(not (config.zero_snr and config.snr_gamma), "--zero_snr leaves no signal at the last step, to which min-SNR "
          "gives the weight 0, so that it would never be trained; expected --snr_gamma 0")
    worlds.chosen(config.names)
    unet_config(config, 4, 8)


if __name__ == "__main__":
    main()
