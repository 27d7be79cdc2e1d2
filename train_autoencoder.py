"""The autoencoder: pictures squeezed into a few numbers and drawn again from them (report section 2.1.1).

    python train_autoencoder.py                        digits through 784-500-120-32-120-500-784
    python train_autoencoder.py --latent 2             two numbers a digit: the map of the digits is drawn, too
    python train_autoencoder.py --latent 2 --latent_relu    the report's first such map: all in one quadrant
    python train_autoencoder.py --net conv --data cifar10 --download    the report's convolutional network, batch of 32
    python train_autoencoder.py --data FOLDER --size 64     any folder of pictures
    python train_autoencoder.py --resume runs/autoencoder-001     goes on exactly where the run was stopped or killed

The loss is the cross-entropy of the levels, in nats a picture. It cannot reach 0: levels between black and white have
an entropy, which is measured and drawn beside the loss.
"""

import json
from dataclasses import dataclass
from typing import Literal

import torch

from nanodiff import plots
from nanodiff.data.images import spread
from nanodiff.files import write_text
from nanodiff.flags import BelowOne, Count, CountOrZero, NotNegative, Positive, entry, parse, resumed, set_defaults
from nanodiff.formats.model_folder import save_model
from nanodiff.models.autoencoder import Autoencoder, AutoencoderConfig, cross_entropy, drawn, entropy, levels
from nanodiff.training import datasets
from nanodiff.training.batches import Batches
from nanodiff.training.run import MAY_CHANGE, Run, RunConfig
from nanodiff.training.step import EMA, learning_rate


@dataclass
class Config(RunConfig):
    data: str = "mnist"  # mnist, cifar10, dtd, worlds or woven (drawn), or a folder of pictures, or TIFF volumes
    root: str = ""  # where the files of a named data set lie (default: the repository's data folder)
    download: bool = False  # fetch cifar10 or dtd when it is not there
    size: CountOrZero = 0  # side of the pictures in pixels (0: the data's own)
    net: Literal["mlp", "conv"] = "mlp"  # fully connected layers or convolutions
    widths: tuple[Count, ...] = (500, 120)  # of the hidden layers, or of conv's levels (12,24,48; mnist: 12,24)
    latent: Count = 32  # numbers that a picture becomes (conv: 512, for mnist 32)
    latent_relu: bool = False  # no negative numbers in the latent
    epochs: Count = 20  # passes over the training pictures
    steps: CountOrZero = 0  # optimiser steps in all (0: as many as --epochs are)
    batch: Count = 128  # pictures of one micro-batch, over all processes (conv: 32)
    lr: Positive = 1e-3  # learning rate
    warmup: CountOrZero = 0  # optimiser steps of linear learning-rate warm-up
    lr_end: NotNegative = 1.0  # last learning rate as a share of the peak, reached along a cosine (1: constant)
    clip: NotNegative = 0.0  # largest gradient norm (0: no clipping)
    ema: BelowOne = 0.0  # decay of the averaged weights, which are then what is saved and drawn (0: no averaging)
    log_every: Count = 100  # steps between progress lines
    preview_every: CountOrZero = 0  # steps between measurements and pictures (0: a pass over the training pictures)
    checkpoint_every: Count = 2000  # steps between checkpoints


# What --net conv starts from, for digits and for other pictures.
CONV_MNIST = dict(widths=(12, 24), batch=32)
CONV = dict(widths=(12, 24, 48), latent=512, batch=32)


@entry
def main(argv=None):
    config, given = parse(Config, argv, __doc__)
    if config.resume:
        config = resumed(config, given, "autoencoder", MAY_CHANGE)
    elif config.net == "conv":
        set_defaults(config, given, **(CONV_MNIST if config.data == "mnist" else CONV))
    train(config)


def train(config):
    """Trains one autoencoder and draws its figures; returns the network, or None when it was stopped before."""
    training, held_out, held_out_name = datasets.load_splits(config.data, config.root, config.size, config.download,
                                                             config.seed)
    sizes = AutoencoderConfig(config.net, training.shape, config.widths, config.latent, config.latent_relu)
    epoch = -(-len(training) // (config.batch * config.gradient_accumulation))  # steps until every picture was seen
    config.steps = config.steps or config.epochs * epoch
    config.preview_every = config.preview_every or epoch

    run = Run(config, "autoencoder")
    batches = Batches(training, config.batch, config.seed, config.gradient_accumulation, run.rank, run.world,
                      config.workers)
    net = Autoencoder(sizes, torch.Generator().manual_seed(config.seed)).to(run.device)
    ema = EMA(net, config.ema) if config.ema else None
    final = ema.net if ema else net  # the weights that are measured, drawn and saved
    optimiser = torch.optim.Adam(net.parameters(), lr=config.lr, fused=True)
    run.track(net=net, ema=ema, optimiser=optimiser)
    ddp_net = run.ddp(net)
    run.print(f"{sum(p.numel() for p in net.parameters()):,} parameters, {len(training):,} training pictures of "
              f"{training.shape} as {config.latent} numbers each, {held_out_name} to measure, {epoch} steps an epoch")

    for step in run.steps():
        lr = learning_rate(step, config)
        if step and run.due(config.preview_every):
            preview(run, final, training, held_out)
        for micro in run.micro_batches():
            x, index, _ = batches.get(step, micro)  # [B, C, H, W]
            x = x.to(run.device)
            with run.autocast():
                logits = ddp_net(x)
            level = levels(x)  # the cross-entropy takes a level as the probability of a 1
            loss = cross_entropy(logits.float(), level).mean()
            run.backward(loss, index)
        run.update(net, optimiser, lr)
        if ema:
            ema.update(net)
        run.log(step, lr)

    if run.rank != 0 or not run.finished:
        return None
    finish(run, final, held_out, preview(run, final, training, held_out))
    run.print(f"done: {run.folder}")
    return final


# --- what came of it ------------------------------------------------------------------------------------------------

def preview(run, net, training, held_out):
    """The loss on training and held-out pictures beside its floor, in the log; some reconstructions, the curves; saves
    the model. Returns what was measured."""
    if run.rank != 0:
        return
    save_model(net, run.folder / "model")
    numbers = {"epoch": round(run.step * run.config.batch * run.config.gradient_accumulation / len(training), 2)}
    for name, images in (("train", training), ("held_out", held_out)):
        numbers[name], numbers[f"{name}_floor"] = measure(net, images)
    numbers |= {"batch_of_32": 32 * numbers["train"]}  # the report's unit
    run.record(step=run.step, **numbers)
    run.print(f"step {run.step}  nats a picture: " + "training {train:.2f} (floor {train_floor:.2f}), held out "
              "{held_out:.2f} (floor {held_out_floor:.2f}); training {batch_of_32:,.0f} for 32".format(**numbers))
    some = spread(held_out, 24)
    x = held_out.read(some, some)
    plots.save(plots.reconstructions(x, reconstructed(net, x)), run.path(f"previews/{run.step:08d}.png"))
    lines = {"training": run.history("train"), "held out": run.history("held_out"),
             "floor (entropy)": run.history("held_out_floor")}
    plots.save(plots.curves(lines, "Cross-entropy in nats a picture", "step"), run.path("curves.png"))
    return numbers


def finish(run, net, held_out, numbers):
    """Reconstructions, the way from one picture to another through the latents, and the map of a latent of two."""
    write_text(run.path("reconstructions.json"), json.dumps(numbers, indent=1) + "\n")
    some = spread(held_out, 96)
    x = held_out.read(some, some)
    plots.save(plots.reconstructions(x, reconstructed(net, x)), run.path("reconstructions.png"))
    plots.save(interpolations(net, x[:16] if len(x) > 1 else torch.cat([x, x])), run.path("interpolations.png"))
    if net.config.latent == 2:
        some = spread(held_out, 5000)
        z = encoded(net, held_out.read(some, some))
        label = None if held_out.labels is None else held_out.labels[some]
        page = plots.label_map(z, label, held_out.classes, "The two numbers of held-out pictures")
        plots.save(page, run.path("latents.png"))
        label = label if label is None else label.tolist()
        write_text(run.path("latents.json"), json.dumps({"z": z.tolist(), "label": label}) + "\n")


@torch.no_grad()
def measure(net, images, most=10_000):
    """(loss, floor) in nats a picture: means over at most that many of the pictures, evenly spread."""
    places, device = spread(images, most), next(net.parameters()).device
    loss = floor = 0.0
    for index in places.split(500):
        x = images.read(index, index).to(device)
        level = levels(x)
        loss += float(cross_entropy(net(x), level).double().sum())
        floor += float(entropy(level).double().sum())
    return loss / len(places), floor / len(places)


@torch.no_grad()
def encoded(net, x):
    """Latents [N, latent] of pictures x, on the CPU."""
    device = next(net.parameters()).device
    return torch.cat([net.encode(part.to(device)).cpu() for part in x.split(500)])


def reconstructed(net, x):
    """What the network makes of pictures x."""
    return drawn(net, encoded(net, x))


def interpolations(net, x, columns=10):
    """Rows from one picture of x [2n, C, H, W] to the next: the two stand outside, what lies between their latents
    inside (share 0 and 1 are their reconstructions)."""
    share = torch.linspace(0, 1, columns)
    rows = []
    for one, other in zip(x[0::2], x[1::2]):
        a, b = encoded(net, torch.stack([one, other]))
        rows.append([one, *drawn(net, a + share[:, None] * (b - a)), other])
    return plots.sheet(rows, column_labels=["from", *(f"{value:.1f}" for value in share.tolist()), "to"])


if __name__ == "__main__":
    main()
