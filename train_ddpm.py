"""Denoising diffusion from scratch (Ho et al. 2020, arXiv 2006.11239; report sections 3.1 and 3.2).

    python train_ddpm.py                               digits on a laptop CPU, in about eight minutes
    python train_ddpm.py --data cifar10                the paper's 35.7 M network; wants a GPU
    python train_ddpm.py --data FOLDER --size 64       any folder of pictures
    python train_ddpm.py --range all --steps 1000      three value ranges side by side: pale and saturated, explained
    python train_ddpm.py --resume runs/ddpm-001        goes on exactly where the run was stopped or killed
"""

import dataclasses
import json
from dataclasses import dataclass

import torch

from nanodiff import data, ddpm, figures, pictures, randomness
from nanodiff.checkpoint import write_text
from nanodiff.data.batches import Batches
from nanodiff.diffusion import Schedule, process
from nanodiff.errors import UserError
from nanodiff.flags import check, entry, nearest, parse, resumed
from nanodiff.models.unet import UNet, UNetConfig
from nanodiff.run import EMA, MAY_CHANGE, Run, RunConfig


@dataclass
class Config(RunConfig):
    data: str = "mnist"  # mnist, cifar10, dtd, or a folder of pictures
    root: str = ""  # where the files of a named data set lie (default: the repository's data folder)
    download: bool = False  # fetch cifar10 or dtd when it is not there
    size: int = 0  # side of the training pictures in pixels (0: the data's own; a folder: 64)
    range: str = "11"  # values the network sees: 11 is [-1, 1], 01 is [0, 1], standard is mean 0 and deviation 1; all
    schedule: str = "linear"  # noise schedule: linear, scaled_linear or cosine
    zero_snr: bool = False  # rescale the schedule so that it ends in pure noise
    T: int = 1000  # noising steps
    kind: str = "noise"  # what the network predicts: noise, x0 or v
    gamma: float = 0.0  # min-SNR loss weight (0: the plain loss of Ho et al., equation 14)
    offset: float = 0.0  # strength of offset noise
    conditional: bool = False  # tell the network each picture's class
    class_dropout: float = 0.1  # share of pictures whose class is hidden, for guidance
    guidance: float = 1.0  # scale of classifier-free guidance when sampling (1: off)
    channels: str = ""  # width of each level, such as 32,64 (default: by data)
    blocks: int = 0  # ResNet blocks a level (0: by data)
    attention: str = ""  # resolutions with self-attention, such as 16,8; none for none (default: by data)
    heads: int = 4  # attention heads
    patch: int = 0  # side of the pixel squares folded into channels before the first convolution (0: by data)
    dropout: float = 0.0  # share of activations dropped in the ResNet blocks
    sampler: str = "dpm++2m"  # sampler of the pictures at the end
    sample_steps: int = 25  # its steps
    samples: int = 100  # pictures in samples.png
    figures: bool = True  # draw the report's figures and judge the samples after training


# What fits each data set, unless a flag says otherwise. mnist is sized for a laptop CPU; cifar10 is the paper's network;
# dtd has the report's 256-pixel crops, 64 first and 512 last channels, attention at 16x16 and 8x8.
DEFAULTS = {
    "mnist": dict(channels="32,64", blocks=1, attention="7", patch=2, size=28, batch=32, steps=3500, lr=2e-3,
                  ema=0.995, kind="v", schedule="cosine", conditional=True, guidance=1.5,
                  preview_every=250),
    "cifar10": dict(channels="128,256,256,256", blocks=2, attention="16", patch=1, size=32, batch=128, steps=200_000,
                    lr=2e-4, warmup=5000, lr_end=1.0, ema=0.9999, dropout=0.1, preview_every=5000,
                    checkpoint_every=5000),
    "dtd": dict(channels="64,128,128,256,256,512", blocks=2, attention="16,8", patch=1, size=256, batch=16,
                steps=200_000, lr=1e-4, warmup=2000, lr_end=1.0, ema=0.9999, preview_every=5000,
                checkpoint_every=5000),
    "": dict(channels="64,128,256", blocks=2, attention="16", patch=1, size=64, batch=16, steps=20_000, lr=2e-4,
             ema=0.999),
}
RANGES = ("11", "01", "standard")


@entry
def main(argv=None):
    config, given = parse(Config, argv, __doc__)
    if config.resume:
        config = resumed(config, given, "ddpm", MAY_CHANGE | {"figures"})
    else:
        for name, value in DEFAULTS.get(config.data, DEFAULTS[""]).items():
            if name not in given:
                setattr(config, name, value)
        config.sample_steps = min(config.sample_steps, config.T)
        if not config.conditional and "guidance" not in given:
            config.guidance = 1.0
    check(config.range in (*RANGES, "all"), f'--range "{config.range}" is unknown; expected 11, 01, standard or all'
          + nearest(config.range, RANGES))
    if config.range == "all":
        return compare_ranges(config)
    train(config)


def train(config):
    """Trains one network and draws its figures; returns the finished DDPM, or None when it was stopped before."""
    options = dict(root=config.root or None, size=config.size or None)
    training = data.load(config.data, "train", download=config.download, seed=config.seed, **options)
    held_out, held_out_name = load_held_out(config, options, training)
    schedule = make_schedule(config)
    classes = training.classes if config.conditional else ()
    check(not config.conditional or (training.labels is not None and len(classes) > 1),
          f"--conditional needs pictures of several classes; {config.data} has none")
    check(config.conditional or config.guidance == 1, "--guidance needs a network that knows classes; expected "
          "--conditional, or --guidance 1 with --no-conditional")
    network = unet_config(config, training.shape, len(classes))
    scale, shift = value_range(config, training)

    run = Run(config, "ddpm")
    batches = Batches(training, config.batch, config.seed, config.accumulate, run.rank, run.world, config.workers)
    net = UNet(network, torch.Generator().manual_seed(config.seed)).to(run.device).train()
    ema = EMA(net, config.ema)  # with --ema 0 it follows the weights without averaging
    model = ddpm.DDPM(ema.net, schedule, config.kind, training.shape, scale, shift, classes,
                      config.guidance, config.data)
    optimiser = torch.optim.Adam(net.parameters(), lr=config.lr, fused=True)
    run.track(net=net, ema=ema, optimiser=optimiser)
    run.print(f"{sum(p.numel() for p in net.parameters()):,} parameters, {len(training):,} training pictures of "
              f"{training.shape}, {held_out_name} for the validation loss")

    for step in run.steps():
        if run.due(config.preview_every):
            preview(run, model, held_out)
        for micro in range(config.accumulate):
            x0, index, position = batches.get(step, micro)
            x0, position = model.to_network(x0.to(run.device)), position.to(run.device)
            noise = randomness.normal(config.seed, step, position, x0.shape[1:])
            if config.offset:
                noise = noise + config.offset * randomness.normal(config.seed, step, position, (x0.shape[1], 1, 1), 1)
            t = (randomness.uniform(config.seed, 2, step, position) * schedule.T).long()  # every step alike
            label = None
            if config.conditional:
                label = training.labels[index].to(run.device)
                hidden = randomness.uniform(config.seed, 3, step, position) < config.class_dropout
                label = torch.where(hidden, len(classes), label)

            x_t = process.q_sample(schedule, x0, t, noise)
            with run.autocast():
                prediction = net(x_t, t, label)
            error = prediction.float() - process.target(schedule, config.kind, x0, noise, t)  # [B, C, H, W]
            weight = process.loss_weight(schedule, config.kind, t, config.gamma or None)  # [B]
            loss = (weight * error.square().flatten(1).mean(1)).mean()
            run.backward(loss, index)
        run.update(net, optimiser, ema)
        run.log(step)

    if run.rank != 0 or not run.finished:
        return None
    preview(run, model, held_out)
    if config.figures:
        figures.draw_all(run, model, config, training, held_out)
    run.print(f"done: {run.folder}")
    return model


def preview(run, model, held_out):
    """16 pictures from the same noise every time, the validation loss by quarter of t, the curves; saves the model."""
    if run.rank != 0:
        return
    model.save(run.folder / "model")
    figures.write_samples(run, model, f"previews/{run.step:08d}", n=16, steps=min(25, model.schedule.T))
    position = torch.arange(min(256, len(held_out)))
    x0 = model.to_network(held_out.read(position, position).to(run.device))
    label = held_out.labels[position].to(run.device) if model.classes else None
    position = position.to(run.device)
    t = (position + 0.5) / len(x0) * model.schedule.T  # evenly over all steps, the same at every call
    noise = randomness.normal(0, -1, position, x0.shape[1:])
    mean, quarters = process.loss_by_time(model.denoiser(label), x0, model.schedule, model.kind, t.long(), noise)
    run.record(step=run.step, validation=mean, validation_quarters=quarters)
    run.print(f"step {run.step}  validation loss {mean:.4f}  by quarter of t "
              + " ".join(f"{value:.4f}" for value in quarters))
    figures.loss_curves(run)


def load_held_out(config, options, training):
    """Pictures that are not trained on, and their name; the training pictures when the data has no other."""
    for split in ("test", "val"):
        try:
            return data.load(config.data, split, flip=False, **options), f"{split} pictures"
        except UserError:
            continue
    return training, "training pictures (the folder has no test split)"


def make_schedule(config):
    """The noise schedule that the flags ask for."""
    known = {"linear": Schedule.linear, "scaled_linear": Schedule.scaled_linear, "cosine": Schedule.cosine}
    check(config.schedule in known, f'--schedule "{config.schedule}" is unknown; expected {", ".join(known)}'
          + nearest(config.schedule, known))
    check(config.T >= 2, f"--T is {config.T}; expected 2 or more noising steps, such as 1000")
    schedule = known[config.schedule](config.T)
    schedule = schedule.zero_terminal_snr() if config.zero_snr else schedule
    check(config.kind in process.KINDS, f'--kind "{config.kind}" is unknown; expected {", ".join(process.KINDS)}'
          + nearest(config.kind, process.KINDS))
    check(config.kind != "noise" or not config.zero_snr, "--zero_snr leaves no signal at the last step, where --kind "
          "noise says nothing about the picture; expected --kind v or x0")
    return schedule


def unet_config(config, shape, classes):
    """The network's sizes from the flags; attention is given by resolution, UNetConfig wants levels."""
    try:
        channels = [int(width) for width in config.channels.split(",")]
        wanted = [] if config.attention == "none" else [int(side) for side in config.attention.split(",")]
    except ValueError:
        check(False, f'--channels "{config.channels}" and --attention "{config.attention}" must be whole numbers with '
              "commas between, such as --channels 64,128 --attention 16")
    sides = [shape[1] // config.patch // 2**level for level in range(len(channels))]
    for side in wanted:
        check(side in sides, f"--attention {side} is no resolution of this network; expected some of "
              f"{', '.join(map(str, sides))}")
    groups = next(g for g in (32, 16, 8, 4, 2, 1) if all(width % g == 0 and width > g for width in channels))
    network = UNetConfig(shape[0], shape[0], channels, config.blocks, [sides.index(side) for side in wanted],
                         heads=config.heads, groups=groups, patch=config.patch, dropout=config.dropout,
                         num_classes=classes)
    divisor = config.patch * 2 ** (len(channels) - 1)
    check(shape[1] % divisor == 0 and shape[2] % divisor == 0, f"pictures of {shape[1]}x{shape[2]} do not fit "
          f"{len(channels)} levels and --patch {config.patch}; expected sides that {divisor} divides, "
          f"such as --size {max(1, round(shape[1] / divisor)) * divisor}")
    return network


def value_range(config, training):
    """scale, shift [C] that bring a picture in [-1, 1] into the --range that the network sees."""
    channels = training.shape[0]
    if config.range == "11":
        return [1.0] * channels, [0.0] * channels
    if config.range == "01":
        return [0.5] * channels, [0.5] * channels
    first = torch.arange(min(5000, len(training)))
    some = training.read(first, first)  # [N, C, H, W]
    mean, deviation = some.mean((0, 2, 3)), some.std((0, 2, 3))
    return (1 / deviation).tolist(), (-mean / deviation).tolist()


def compare_ranges(config):
    """The same training in three value ranges, each shown as the report's authors showed it and as it should be."""
    check(not config.resume, "--range all makes three runs; resume one of them by its own folder")
    models, folder = {}, None
    for name in RANGES:
        first = folder or Run(dataclasses.replace(config, range="11"), "ddpm-ranges").folder
        folder = first
        one = dataclasses.replace(config, range=name, out=str(folder / name), figures=False)
        models[name] = train(one)
        if models[name] is None:
            return
    page, numbers = figures.compare_ranges(models, config)
    pictures.save(page, folder / "ranges.png")
    write_text(folder / "ranges.json", json.dumps(numbers, indent=1) + "\n")
    print(f"done: {folder}/ranges.png")


if __name__ == "__main__":
    main()
