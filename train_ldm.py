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

import torch

from nanodiff import fast, plots, rng, worlds
from nanodiff.classifiers import worlds as classifier
from nanodiff.data import captions, images
from nanodiff.diffusion import Schedule, process
from nanodiff.diffusion.samplers import by_name
from nanodiff.errors import UserError, check, nearest
from nanodiff.flags import entry, parse, resumed
from nanodiff.formats import stable_diffusion_folder as folders
from nanodiff.formats.diffusers_folder import KINDS, name_of, schedule_from
from nanodiff.metrics import agreement
from nanodiff.models.clip_text import ClipText, ClipTextConfig, Tokenizer, clip_text_config_to
from nanodiff.models.cond_unet import CondUNet, CondUNetConfig
from nanodiff.models.kl_autoencoder import KLAutoencoder, Pixels
from nanodiff.pipelines.attention_maps import attention_maps, sheet, word_places
from nanodiff.pipelines.stable_diffusion import SHIPPED, StableDiffusion, load
from nanodiff.training import datasets, latents
from nanodiff.training.batches import Batches
from nanodiff.training.muon import Muon
from nanodiff.training.run import EMA, MAY_CHANGE, Run, RunConfig
from nanodiff.worlds import textures


@dataclass
class Config(RunConfig):
    data: str = "worlds"  # worlds (drawn), or a folder of pictures with captions
    size: int = 64  # side of the pictures in pixels
    pictures: int = 30_000  # drawn pictures to train on
    names: str = ""  # some classes of the drawn worlds alone, with commas between (default: all of the base's)
    variants: int = 2  # captions of each drawn picture, or random crops and flips of each file, that are kept
    autoencoder: str = ""  # folder of the frozen autoencoder (default: the one that ships); none: diffusion in pixels
    text: str = ""  # folder of text_encoder/ and tokenizer/ (default: those that ship); scratch: a new one, trained
    train_text: bool = False  # train the loaded text encoder along
    text_width: int = 96  # of the states of a new text encoder
    text_layers: int = 3  # layers of a new text encoder
    caption_dropout: float = 0.1  # share of captions that are left out, for guidance
    init: str = ""  # model folder whose U-Net, and its sizes, the training starts from (default: fresh weights)
    channels: str = "48,64,96"  # width of each level of the U-Net
    blocks: int = 1  # ResNet blocks a level on the way down (one more on the way up)
    attention: str = "1,2"  # levels with transformers, 0 is the full size
    head_width: int = 32  # channels of an attention head
    schedule: str = "cosine"  # noise schedule: cosine, scaled_linear (Stable Diffusion's) or linear
    shift: float = 4.0  # how many times as much noise as the schedule has, at every step (1: its own)
    zero_snr: bool = False  # rescale the schedule so that it ends in pure noise; sample from its last step
    kind: str = "v"  # what the U-Net predicts: noise or v
    gamma: float = 0.0  # of min-SNR weighting, such as 5 (0: every step counts the same)
    offset: float = 0.0  # strength of offset noise
    guidance: float = 3.0  # scale of classifier-free guidance in previews, and the saved model's default
    guidance_start: float = 0.0  # share of the T time steps, from noise on, in which it does not act; the same
    sampler: str = "dpm++2m"  # of the previews
    sample_steps: int = 20  # its steps
    attention_of: str = ""  # words whose attention maps are drawn at the end, with commas between (figure 43)
    steps: int = 20_000  # optimiser steps in all
    batch: int = 16  # latents a micro-batch and process
    optimiser: str = "muon"  # muon (with AdamW for what is no matrix) or adamw alone
    lr: float = 1e-3  # peak learning rate
    decay: float = 0.01  # weight decay
    warmup: int = 300  # optimiser steps of linear learning-rate warm-up
    preview_every: int = 1000  # steps between pictures from fixed noise
    checkpoint_every: int = 1000  # steps between checkpoints


HELD_OUT = 256  # pictures of the held-out loss at most


@entry
def main(argv=None):
    config, given = parse(Config, argv, __doc__)
    if config.resume:
        config = resumed(config, given, "ldm", MAY_CHANGE | {"attention_of"})
    check_flags(config)
    train(config)


def train(config):
    """Trains one model and draws what it learns; returns the StableDiffusion, or None when it was stopped before."""
    settings = {"scheduler": scheduler_settings(config)}
    schedule, kind = schedule_from(settings["scheduler"])
    run = Run(config, "ldm")
    autoencoder = load_autoencoder(config)
    generator = torch.Generator().manual_seed(config.seed)
    text, tokenizer = text_encoder(config, generator)
    learning_text = config.text == "scratch" or config.train_text
    unet = make_unet(config, autoencoder.config.latent_channels, text.config.width, generator)
    training, held_out, prompts, held_out_name = load_data(config, tokenizer)
    words, shown = attention_prompt(config, prompts, tokenizer)

    training, held_out = (encoded(run, autoencoder, one, config) for one in (training, held_out))
    batches = Batches(training, config.batch, config.seed, config.accumulate, run.rank, run.world, config.workers)
    ids = tokenizer([*training.captions, ""]).view(-1, 77)  # the last is the empty caption's
    net = torch.nn.ModuleDict({"unet": unet})
    if learning_text:
        net["text"] = text.requires_grad_(True)
    net.to(run.device).train()
    ema = EMA(net, config.ema)
    fast.speed_up(net)
    options = dict(lr=config.lr, betas=(0.9, 0.99), weight_decay=config.decay)
    muon = config.optimiser == "muon"
    optimiser = Muon(net, **options) if muon else torch.optim.AdamW(net.parameters(), fused=True, **options)
    run.track(net=net, ema=ema, optimiser=optimiser)
    states = None if learning_text else latents.text_states(text.to(run.device), ids)
    settings["unet"] = folders.unet_config_to(unet.config) | {"sample_size": training.shape[1]}
    settings["vae"] = folders.PIXELS if config.autoencoder == "none" else folders.vae_config_to(autoencoder.config)
    settings |= {"text_encoder": clip_text_config_to(text.config), "guidance": config.guidance,
                 "guidance_start": config.guidance_start}
    told = ema.net["text"] if learning_text else text
    model = StableDiffusion(tokenizer, told, ema.net["unet"], autoencoder, settings)
    run.print(f"U-Net {sum(p.numel() for p in net['unet'].parameters()):,} parameters, text encoder "
              f"{sum(p.numel() for p in text.parameters()):,} ({'trained' if learning_text else 'frozen'}), "
              f"{len(training):,} latents of {training.shape}, {held_out_name} for the held-out loss")

    for step in run.steps():
        if run.due(config.preview_every):
            preview(run, model, held_out, prompts)
        for micro in range(config.accumulate):
            x0, index, position = batches.get(step, micro)
            x0, position = x0.to(run.device), position.to(run.device)
            noise = rng.noise(config.seed, step, position, x0.shape[1:], config.offset)
            t = rng.time_steps(config.seed, step, position, schedule.T)
            dropped = rng.uniform(config.seed, 3, step, position) < config.caption_dropout
            said = (rng.uniform(config.seed, 8, step, position) * training.variants).long()
            row = torch.where(dropped.cpu(), len(ids) - 1, index * training.variants + said.cpu())

            x_t = process.q_sample(schedule, x0, t, noise)
            with run.autocast():
                context = net["text"](ids[row].to(run.device))[0] if learning_text else states(row)  # [B, 77, D]
                prediction = net["unet"](x_t, t, context)
            error = prediction.float() - process.target(schedule, kind, x0, noise, t)  # [B, C, h, w]
            weight = process.loss_weight(schedule, kind, t, config.gamma or None)
            loss = (weight * error.square().flatten(1).mean(1)).mean()
            run.backward(loss, index)
        run.update(net, optimiser, ema)
        run.log(step)

    if run.rank != 0 or not run.finished:
        return None
    preview(run, model, held_out, prompts)
    if config.attention_of:
        drawn = attention_maps(model, shown, words, config.seed, steps=config.sample_steps, guidance=config.guidance,
                               sampler=config.sampler, progress=False)
        plots.save(sheet([drawn]), run.path("attention.png"), {"prompt": shown})
    run.print(f"done: {run.folder}")
    return model


def encoded(run, autoencoder, found, config):
    """The latents of a data set, encoded once, with a line on how long that takes; of Pixels the data set as it is."""
    captions, n = found.captions, len(found)
    if not isinstance(autoencoder, Pixels):
        crops = 1 if config.data == "worlds" else config.variants
        found = latents.encode(autoencoder.to(run.device), found, crops, seed=config.seed, say=run.print)
    found.captions, found.variants = captions, len(captions) // n
    return found


# --- what it has learned --------------------------------------------------------------------------------------------

def preview(run, model, held_out, prompts):
    """Saves the model; pictures of fixed prompts from fixed noise, what the reader says of them, the held-out loss."""
    if run.rank != 0:
        return
    config = run.config
    model.save(run.folder / "model")
    some = torch.arange(min(HELD_OUT, len(held_out)))
    x0 = held_out.read(some, some).to(run.device)
    context = model.encode_text([held_out.captions[i * held_out.variants] for i in some.tolist()])
    t = ((some + 0.5) / len(some) * model.schedule.T).long().to(run.device)  # evenly over all steps, always the same
    noise = rng.normal(0, -1, some.to(run.device), x0.shape[1:])
    with fast.packed(model.unet):
        mean, quarters = process.loss_by_time(model.unet, x0, model.schedule, model.kind, t, noise, context, batch=64)
    x = model.generate([caption for caption, _, _ in prompts], steps=config.sample_steps, guidance=config.guidance,
                       sampler=config.sampler, seed=config.seed, output="tensor", progress=False)
    columns = 12 if len(prompts) > 12 else len(prompts)
    plots.save(plots.grid(x, columns), run.path(f"previews/{run.step:08d}.png"),
               {"prompts": " | ".join(caption for caption, _, _ in prompts), "guidance": config.guidance})
    row, said = {"step": run.step, "validation": mean, "validation_quarters": quarters}, ""
    if prompts[0][1] is not None:
        found = agreement.agreement(classifier.read_all(classifier.load_reader(), x), [name for _, name, _ in prompts],
                                    [colours for _, _, colours in prompts])
        row |= {"agreement": found["class"], "colours": found["colours"]}
        said = f", the reader agrees with {found['class']:.1%} of the classes, {found['colours']:.1%} of the colours"
    run.record(**row)
    run.print(f"step {run.step}  held-out loss {mean:.4f}, by quarter of t "
              + " ".join(f"{value:.4f}" for value in quarters) + said)
    lines = {"training loss": run.history("loss"), "held-out loss": run.history("validation")}
    if prompts[0][1] is not None:
        lines |= {"class read": run.history("agreement"), "colours read": run.history("colours")}
    plots.save(plots.curves(lines, "Latent diffusion", "step"), run.path("curves.png"))


# --- flags ----------------------------------------------------------------------------------------------------------

def load_data(config, tokenizer):
    """(training pictures, held-out pictures, prompts of previews, what the held-out pictures are called); each prompt is
    (caption, class or None, colours or None)."""
    if config.data == "worlds":
        names = worlds.chosen(config.names)
        scenes = [textures.scene(worlds.first_seed("val", 0) + 10_000 + i, names[i % len(names)], "val")
                  for i in range(max(2 * len(names), 48))]
        prompts = [(captions.caption(scene), scene.name, captions.named_colours(scene)) for scene in scenes]
        attention_prompt(config, prompts, tokenizer)  # a wrong word is found before a minute of drawing
        print("drawing the pictures: about a minute", flush=True)
        found = [worlds.load(split, config.size, n, names, seed=config.seed, workers=max(1, config.workers))
                 for split, n in (("train", config.pictures), ("val", min(HELD_OUT, config.pictures)))]
        for one, n in zip(found, (config.variants, 1)):
            one.captions = [captions.caption(scene, v) for scene in one.scenes for v in range(n)]
        return *found, prompts, "pictures of other seeds"
    check(not config.names, "--names is for the drawn worlds")
    training = datasets.load(config.data, "train", size=config.size, channels=3, seed=config.seed)
    held_out, name = datasets.held_out(config.data, training, seed=config.seed)
    for one, kind in ((training, "training"), (held_out, "held-out")):
        check(one.captions is not None, f"the {kind} pictures of --data {config.data} have no captions; expected a folder "
              "with captions, see nanodiff/data/caption_files.py")
    check(config.batch <= len(training), f"--batch {config.batch} is more than the {len(training)} pictures of --data "
          f"{config.data}; expected at most that")
    held_out = images.some_of(held_out, images.spread(held_out, HELD_OUT))
    prompts = [(held_out.captions[i], None, None) for i in images.spread(held_out, 24).tolist()]
    return training, held_out, prompts, name


def load_autoencoder(config):
    """The frozen autoencoder that the flags ask for; Pixels for none."""
    if config.autoencoder == "none":
        return Pixels()
    found = folders.load_autoencoder(config.autoencoder or SHIPPED / "vae")
    check(isinstance(found, KLAutoencoder), f"--autoencoder {config.autoencoder} has a codebook; expected one that was "
          "trained with --regulariser kl, as Stable Diffusion's folders hold")
    f = found.config.factor
    check(config.size % f == 0, f"--size {config.size} does not fit latents {f} times smaller; expected a multiple of "
          f"{f}, such as {max(1, round(config.size / f)) * f}")
    return found


def text_encoder(config, generator):
    """(ClipText, Tokenizer) that the flags ask for."""
    if config.text != "scratch":
        return folders.load_text_encoder(config.text or SHIPPED)
    width = config.text_width
    sizes = ClipTextConfig(width=width, layers=config.text_layers, heads=max(1, width // 32), mlp=4 * width)
    return ClipText(sizes, generator), Tokenizer.shipped()


def attention_prompt(config, prompts, tokenizer):
    """The words of --attention_of, and the first of the previews' prompts that holds them all; UserError for none."""
    words = [word.strip() for word in config.attention_of.split(",") if word.strip()]
    for caption, _, _ in prompts if words else ():
        with contextlib.suppress(UserError):
            word_places(tokenizer, caption, words)
            return words, caption
    check(not words, f'no prompt of the previews holds all words of --attention_of "{config.attention_of}"; expected '
          f'words of one, such as "{prompts[0][0]}"')
    return words, None


def make_unet(config, latent_channels, context_channels, generator):
    """The U-Net that the flags ask for, float32: fresh, or that of --init; UserError where it does not fit the rest."""
    if not config.init:
        return CondUNet(unet_config(config, latent_channels, context_channels), generator)
    found = load(config.init)
    if found.kind != config.kind:
        print(f"the U-Net of --init {config.init} has learned to predict {found.kind}, and learns to predict {config.kind} "
              "from now on")
    unet = found.unet.requires_grad_(True)
    found = unet.config.in_channels, unet.config.out_channels, unet.config.context_channels
    expected = latent_channels, latent_channels, context_channels
    check(found == expected, f"the U-Net of --init {config.init} takes and gives {found[0]} and {found[1]} channels "
          f"and reads text of width {found[2]}; expected {expected[0]}, {expected[1]} and {expected[2]}, as those of "
          "--autoencoder and --text")
    return unet


def unet_config(config, latent_channels, context_channels):
    """The U-Net's sizes from the flags."""
    try:
        channels = tuple(int(width) for width in config.channels.split(","))
        attention = () if config.attention == "none" else tuple(int(level) for level in config.attention.split(","))
    except ValueError:
        check(False, f'--channels "{config.channels}" and --attention "{config.attention}" must be whole numbers with '
              "commas between, such as --channels 48,96,160 --attention 1,2")
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if all(width % g == 0 for width in channels))
    heads = tuple(max(1, width // config.head_width) for width in channels)
    return CondUNetConfig(latent_channels, latent_channels, channels, config.blocks, attention, heads=heads,
                          context_channels=context_channels, linear_projection=True, groups=groups)


def scheduler_settings(config):
    """The noise schedule in the words of diffusers' scheduler_config.json; pictures are drawn by DDIM unless asked."""
    makes = {"cosine": Schedule.cosine, "scaled_linear": Schedule.scaled_linear, "linear": Schedule.linear}
    check(config.schedule in makes, f'--schedule "{config.schedule}" is unknown; expected {", ".join(makes)}'
          + nearest(config.schedule, makes))
    kinds = {ours: theirs for theirs, ours in KINDS.items() if ours != "x0"}
    check(config.kind in kinds, f'--kind "{config.kind}" is unknown; expected {", ".join(kinds)}'
          + nearest(config.kind, kinds))
    check(config.kind == "v" or not config.zero_snr, "--zero_snr leaves no signal at the last step, where --kind noise "
          "says nothing about the picture; expected --kind v")
    schedule = makes[config.schedule]()
    schedule = schedule.shifted(config.shift) if config.shift != 1 else schedule  # unshifted it keeps its name
    schedule = schedule.zero_terminal_snr() if config.zero_snr else schedule
    return {"_class_name": "DDIMScheduler", "_diffusers_version": "0.6.0", "num_train_timesteps": schedule.T,
            **name_of(schedule), "clip_sample": False, "prediction_type": kinds[config.kind], "set_alpha_to_one": True,
            "steps_offset": 0, "timestep_spacing": "trailing"}


def check_flags(config):
    """Raises UserError for every flag whose value alone is wrong, before anything is read or written."""
    check(config.sampler in by_name, f'--sampler "{config.sampler}" is unknown; expected {", ".join(by_name)}'
          + nearest(config.sampler, by_name))
    for name, least in dict(size=16, pictures=config.batch, variants=1, text_width=8, text_layers=1, blocks=1,
                            head_width=1, gamma=0, offset=0, guidance=0, sample_steps=1, decay=0).items():
        check(getattr(config, name) >= least, f"--{name} is {getattr(config, name)}; expected {least} or more")
    check(config.optimiser in ("muon", "adamw"), f'--optimiser "{config.optimiser}" is unknown; expected muon or adamw'
          + nearest(config.optimiser, ("muon", "adamw")))
    check(config.sample_steps <= 1000, f"--sample_steps is {config.sample_steps}; expected 1 to 1000")
    check(0 <= config.guidance_start < 1, f"--guidance_start is {config.guidance_start}; expected a share from 0 to below 1")
    check(0.01 <= config.shift <= 100, f"--shift is {config.shift}; expected a number from 0.01 to 100, such as 4")
    check(0 <= config.caption_dropout < 1, f"--caption_dropout is {config.caption_dropout}; expected a share from 0 to "
          "below 1")
    check(not (config.text == "scratch" and config.train_text), "--text scratch is trained in any case; expected no "
          "--train_text")
    worlds.chosen(config.names)
    check(not (config.zero_snr and config.gamma), "--zero_snr leaves no signal at the last step, to which min-SNR "
          "gives the weight 0, so that it would never be trained; expected --gamma 0")
    scheduler_settings(config)
    unet_config(config, 4, 8)


if __name__ == "__main__":
    main()
