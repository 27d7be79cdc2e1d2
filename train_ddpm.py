"""Denoising diffusion from scratch (Ho et al. 2020, arXiv 2006.11239; report sections 3.1 and 3.2).

    python train_ddpm.py                               digits on a laptop CPU, in about six minutes
    python train_ddpm.py --data cifar10                the paper's 35.7 M network; wants a GPU
    python train_ddpm.py --data FOLDER --size 64       any folder of pictures
    python train_ddpm.py --range all --steps 1000      three value ranges side by side: pale and saturated, explained
    python train_ddpm.py --resume runs/ddpm-001        goes on exactly where the run was stopped or killed

The defaults below are those of mnist; other data starts from its own (OTHER_DATA in this file).
"""

import dataclasses
import json
import math
from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from nanodiff import fast, plots, rng
from nanodiff.diffusion import Schedule, process, samplers
from nanodiff.errors import check
from nanodiff.files import write_text
from nanodiff.flags import (AtLeast, BelowOne, Count, CountOrZero, NotEmpty, NotNegative, OneOf, Positive, entry, parse,
                            resumed, set_defaults)
from nanodiff.models.blocks import ACTIVATIONS
from nanodiff.models.unet import UNet, UNetConfig
from nanodiff.pipelines import ddpm
from nanodiff.report import figures
from nanodiff.training import datasets
from nanodiff.training.batches import Batches
from nanodiff.training.distributed import processes
from nanodiff.training.run import MAY_CHANGE, Run, RunConfig, free_folder
from nanodiff.training.step import EMA, learning_rate
from nanodiff.training.validation import held_out_loss


@dataclass
class Config(RunConfig):
    data: str = "mnist"  # mnist, cifar10, dtd, worlds or woven (drawn), or a folder of pictures, or TIFF volumes
    root: str = ""  # where the files of a named data set lie (default: the repository's data folder)
    download: bool = False  # fetch cifar10 or dtd when it is not there
    value_range: tuple[float, ...] = ()  # LOW,HIGH: what becomes black and white in files of a folder (none: by type)
    size: CountOrZero = 0  # side of the training pictures in pixels (0: the data's own)
    range: Literal["11", "01", "standard", "all"] = "11"  # of the network's inputs; standard: mean 0, deviation 1
    steps: Count = 3500  # optimiser steps in all
    batch: Count = 32  # pictures of one micro-batch, over all processes
    lr: Positive = 2e-3  # peak learning rate
    ema: BelowOne = 0.995  # decay of the averaged weights, warmed up as (1 + n) / (10 + n) (0: no averaging)
    preview_every: Count = 250  # steps between pictures from fixed noise
    schedule: Literal["linear", "scaled_linear", "cosine"] = "cosine"  # noise schedule
    zero_snr: bool = False  # rescale the schedule so that it ends in pure noise
    T: Annotated[int, AtLeast(2)] = 1000  # noising steps
    prediction: Literal["noise", "x0", "v"] = "v"  # what the network predicts
    weight: Literal["simple", "min-snr", "elbo"] = "simple"  # of each sample's loss (simple: Ho et al., eq. 14)
    snr_gamma: Positive = 5.0  # of --weight min-snr
    noise_offset: NotNegative = 0.0  # strength of offset noise
    conditional: bool = True  # tell the network each picture's class
    class_dropout: BelowOne = 0.1  # share of pictures whose class is hidden, for guidance
    guidance: NotNegative = 1.5  # scale of classifier-free guidance when sampling (1: off)
    channels: Annotated[tuple[Count, ...], NotEmpty()] = (32, 64)  # width of each level
    blocks: Count = 1  # ResNet blocks a level
    attention: tuple[Count, ...] = (7,)  # resolutions with self-attention, such as 16,8
    heads: Count = 4  # attention heads
    patch: Count = 2  # side of the pixel squares folded into channels before the first convolution
    activation: Annotated[str, OneOf(ACTIVATIONS)] = "silu"  # of the ResNet blocks
    dropout: BelowOne = 0.0  # share of activations dropped in the ResNet blocks
    sampler: Annotated[str, OneOf(samplers.by_name)] = "dpm++2m"  # sampler of the pictures at the end
    sample_steps: Count = 25  # its steps
    samples: Count = 100  # pictures in samples.png
    figures: bool = True  # draw the report's figures and judge the samples after training


# What other data starts from. cifar10 is the paper's network and training; dtd has the report's 256-pixel crops, 64
# first and 512 last channels, attention at 16x16 and 8x8; "" is any folder.
PLAIN = dict(conditional=False, guidance=1.0, prediction="noise", schedule="linear", blocks=2, patch=1, ema=0.9999,
             lr_end=1.0, steps=200_000, preview_every=5000, checkpoint_every=5000)
OTHER_DATA = {
    "cifar10": dict(PLAIN, channels=(128, 256, 256, 256), attention=(16,), size=32, batch=128, lr=2e-4, warmup=5000,
                    dropout=0.1),
    "dtd": dict(PLAIN, channels=(64, 128, 128, 256, 256, 512), attention=(16, 8), size=256, batch=16,
                lr=1e-4, warmup=2000),
    "": dict(PLAIN, channels=(64, 128, 256), attention=(16,), size=64, batch=16, lr=2e-4, lr_end=0.0, ema=0.999,
             steps=20_000, preview_every=500, checkpoint_every=500),
}
RANGES = ("11", "01", "standard")


@entry
def main(argv=None):
    config, given = parse(Config, argv, __doc__)
    if config.resume:
        config = resumed(config, given, "ddpm", MAY_CHANGE | {"figures"})
    else:
        if config.data != "mnist":
            set_defaults(config, given, **OTHER_DATA.get(config.data, OTHER_DATA[""]))
        set_defaults(config, given, sample_steps=min(config.sample_steps, config.T),
                     guidance=config.guidance if config.conditional else 1.0)
    check_flags(config)
    if config.range == "all":
        return compare_ranges(config)
    train(config)


def train(config):
    """Trains one network and draws its figures; returns the finished DDPM, or None when it was stopped before."""
    training, held_out, held_out_name = load_data(config)
    schedule = make_schedule(config)
    classes = training.classes if config.conditional else ()
    check(not config.conditional or (training.labels is not None and len(classes) > 1),
          f"--conditional needs pictures of several classes; {config.data} has none")
    network = unet_config(config, training.shape, len(classes))
    scale, shift = range_map(config, training)

    run = Run(config, "ddpm")
    batches = Batches(training, config.batch, config.seed, config.gradient_accumulation, run.rank, run.world,
                      config.workers)
    net = UNet(network, torch.Generator().manual_seed(config.seed)).to(run.device).train()
    ema = EMA(net, config.ema)  # with --ema 0 it follows the weights without averaging
    fast.speed_up(net)
    model = ddpm.DDPM(ema.net, schedule, config.prediction, training.shape, scale, shift, classes,
                      config.guidance, config.data)
    optimiser = torch.optim.Adam(net.parameters(), lr=config.lr, fused=True)
    run.track(net=net, ema=ema, optimiser=optimiser)
    ddp_net = run.ddp(net)
    if hasattr(training, "records") and run.rank == 0:  # tomography: how to write samples in the volumes' own units
        write_text(run.path("volumes.json"), json.dumps(training.records(), indent=1) + "\n")
    run.print(f"{sum(p.numel() for p in net.parameters()):,} parameters, {len(training):,} training pictures of "
              f"{training.shape}, {held_out_name} for the validation loss")

    for step in run.steps():
        lr = learning_rate(step, config)
        if run.due(config.preview_every):
            preview(run, model, held_out)
        for micro in run.micro_batches():
            x0, index, position = batches.get(step, micro)
            x0, position = model.to_network(x0.to(run.device)), position.to(run.device)
            noise = rng.noise(config.seed, step, position, x0.shape[1:], config.noise_offset)
            t = rng.time_steps(config.seed, step, position, schedule.T)
            label = None
            if config.conditional:
                label = training.labels[index].to(run.device)
                hidden = rng.uniform(config.seed, rng.DROPOUT, step, position) < config.class_dropout
                label = torch.where(hidden, len(classes), label)

            x_t = process.q_sample(schedule, x0, t, noise)
            with run.autocast():
                prediction = ddp_net(x_t, t, label)
            error = prediction.float() - process.target(schedule, config.prediction, x0, noise, t)  # [B, C, H, W]
            loss = (loss_weight(config, schedule, t) * error.square().flatten(1).mean(1)).mean()
            run.backward(loss, index)
        run.update(net, optimiser, lr)
        ema.update(net)
        run.log(step, lr)

    if run.rank != 0 or not run.finished:
        return None
    preview(run, model, held_out)
    samples = write_samples(run, model, "samples", config.samples, config.sampler, config.sample_steps)
    if config.figures:
        figures.draw_all(run, model, training, held_out, samples)
    run.print(f"done: {run.folder}")
    return model


def load_data(config):
    """(training pictures, held-out pictures, what these are called)."""
    options = dict(root=config.root or None, size=config.size or None)
    if config.data not in datasets.NAMED:  # a folder, whose captions a DDPM has no use for
        options |= {"captions": None, "value_range": config.value_range or None}
    if config.data in ("worlds", "woven"):
        print(f"drawing the {config.data} to train and to test on: about a minute", flush=True)
    training = datasets.load(config.data, "train", download=config.download, seed=config.seed, **options)
    held_out, held_out_name = datasets.load_held_out(config.data, training, **options)
    return training, held_out, held_out_name


def loss_weight(config, schedule, t):
    """Weight [B] of each sample's mean squared error; with "elbo" the loss is the bound's steps in nats a dimension."""
    if config.weight == "elbo":
        return schedule.T * process.elbo_weight(schedule, config.prediction, t).float()
    return process.loss_weight(schedule, config.prediction, t, config.snr_gamma if config.weight == "min-snr" else None)


def preview(run, model, held_out):
    """16 pictures from the same noise every time, the validation loss by quarter of t, the curves; saves the model."""
    if run.rank != 0:
        return
    model.save(run.folder / "model")
    x = write_samples(run, model, f"previews/{run.step:08d}", 16, "dpm++2m", min(25, model.schedule.T))
    torch.save(x[:8].clone(), run.path(f"previews/{run.step:08d}.pt"))  # for the report's table 4
    position = torch.arange(min(256, len(held_out)))
    x0 = model.to_network(held_out.read(position, position).to(run.device))
    label = held_out.labels[position].to(run.device) if model.classes else None
    with fast.packed(model.net):
        mean, quarters = held_out_loss(model.net, x0, model.schedule, model.kind, label, model.batch)
    run.record(step=run.step, validation=mean, validation_quarters=quarters)
    run.print(f"step {run.step}  validation loss {mean:.4f}  by quarter of t "
              + " ".join(f"{value:.4f}" for value in quarters))
    loss_curves(run)


def write_samples(run, model, name, n, sampler, steps):
    """n pictures [n, C, H, W] from the run's fixed noise, which are drawn in NAME.png."""
    x = model.generate(n, sampler, steps, seed=run.config.seed)
    settings = {"sampler": sampler, "steps": steps, "seed": run.config.seed, "guidance": model.guidance}
    plots.save(plots.grid(x, scale=max(1, math.ceil(56 / x.shape[2]))), run.path(f"{name}.png"), settings)
    return x


def loss_curves(run):
    """curves.png: training and validation loss over steps, and the validation loss by quarter of t (report fig. 35)."""
    steps, quarters = run.history("validation_quarters")
    lines = {"training": run.history("loss"), "validation": run.history("validation")}
    T = run.config.T
    parts = {f"t {T * q // 4}-{T * (q + 1) // 4 - 1}": (steps, [row[q] for row in quarters]) for q in range(4)}
    page = plots.stack([plots.curves(lines, "loss", "step", log_y=True),
                        plots.curves(parts, "validation loss by time step", "step", log_y=True)])
    plots.save(page, run.path("curves.png"))


# --- flags ----------------------------------------------------------------------------------------------------------

def check_flags(config):
    """Raises UserError where flags do not go together, before anything is read or written."""
    several = config.range == "all"
    check(config.sample_steps <= config.T, f"--sample_steps is {config.sample_steps}; expected 1 to --T {config.T}")
    check(config.conditional or config.guidance == 1, "--guidance needs a network that knows classes; expected "
          "--conditional, or --guidance 1 with --no-conditional")
    check(config.prediction != "noise" or not config.zero_snr, "--zero_snr leaves no signal at the last step, where "
          "--prediction noise says nothing about the picture; expected --prediction v or x0")
    check(not config.value_range or config.data not in datasets.NAMED, "--value_range is for folders of pictures")
    check(len(config.value_range) in (0, 2), f"--value_range is {','.join(map(str, config.value_range))}; expected two "
          "numbers such as 0,4095")
    check(not several or not config.resume, "--range all makes three runs; resume one of them by its own folder")
    check(not several or processes() == 1, "--range all runs in one process; expected python, not torchrun")


def make_schedule(config):
    """The noise schedule that the flags ask for."""
    makers = {"linear": Schedule.linear, "scaled_linear": Schedule.scaled_linear, "cosine": Schedule.cosine}
    schedule = makers[config.schedule](config.T)
    return schedule.zero_terminal_snr() if config.zero_snr else schedule


def unet_config(config, shape, classes):
    """The network's sizes from the flags; attention is given by resolution, UNetConfig wants levels."""
    channels = list(config.channels)
    sides = [shape[1] // config.patch // 2**level for level in range(len(channels))]
    for side in config.attention:
        check(side in sides, f"--attention {side} is no resolution of this network; expected some of "
              f"{', '.join(map(str, sides))}")
    groups = next((g for g in (32, 16, 8, 4, 2) if all(width % g == 0 and width > g for width in channels)), 1)
    network = UNetConfig(shape[0], shape[0], channels, config.blocks, [sides.index(side) for side in config.attention],
                         heads=config.heads, groups=groups, patch=config.patch, dropout=config.dropout,
                         activation=config.activation, num_classes=classes)
    divisor = config.patch * 2 ** (len(channels) - 1)
    check(shape[1] % divisor == 0 and shape[2] % divisor == 0, f"pictures of {shape[1]}x{shape[2]} do not fit "
          f"{len(channels)} levels and --patch {config.patch}; expected sides that {divisor} divides, "
          f"such as --size {max(1, round(shape[1] / divisor)) * divisor}")
    return network


def range_map(config, training):
    """scale, shift [C] that bring a picture in [-1, 1] into the --range that the network sees."""
    channels = training.shape[0]
    if config.range == "11":
        return [1.0] * channels, [0.0] * channels
    if config.range == "01":
        return [0.5] * channels, [0.5] * channels
    first = torch.arange(min(512, len(training)))
    x = training.read(first, first)  # [N, C, H, W]
    mean, deviation = x.mean((0, 2, 3)), x.std((0, 2, 3))
    return (1 / deviation).tolist(), (-mean / deviation).tolist()


def compare_ranges(config):
    """The same training in three value ranges, each shown as the report's authors showed it and as it should be."""
    models, folder = {}, free_folder(config.out, "ddpm-ranges")
    for name in RANGES:
        models[name] = train(dataclasses.replace(config, range=name, out=str(folder / name), figures=False))
        if models[name] is None:
            return
    page, numbers = figures.ranges_sheet(models, config)
    plots.save(page, folder / "ranges.png")
    write_text(folder / "ranges.json", json.dumps(numbers, indent=1) + "\n")
    print(f"done: {folder}/ranges.png")


if __name__ == "__main__":
    main()
