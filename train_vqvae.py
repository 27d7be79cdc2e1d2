"""The VQ-VAE: pictures as small maps of codes from a learned codebook (van den Oord et al. 2017, arXiv 1711.00937;
report section 2.1).

    python train_vqvae.py                                          digits as 7x7 codes
    python train_vqvae.py --data cifar10 --root FOLDER             the authors' run: 900 updates of 256 pictures
    python train_vqvae.py --data cifar10 --root FOLDER --codebook ema     the same with running means and revived codes
    python train_vqvae.py --beta 0.1,0.25,0.5,1,2 --steps 200      one run for each beta, the same otherwise
    python train_vqvae.py --data FOLDER --size 64                  any folder of pictures
    python train_vqvae.py --resume runs/vqvae-001                  goes on exactly where the run was stopped or killed

The error is told as NMSE: the mean squared error divided by the variance of the training pixels, in whatever unit these
are. 1 is a picture of one grey level, 0 a perfect copy.
"""

import dataclasses
import json
import math
from dataclasses import dataclass

import torch

from nanodiff import plots, rng
from nanodiff.errors import check, nearest
from nanodiff.files import write_text
from nanodiff.flags import entry, parse, resumed
from nanodiff.formats.model_folder import save_model
from nanodiff.metrics import codebook as measures
from nanodiff.models.vqvae import VQVAE, VQVAEConfig, perplexity, used
from nanodiff.training import datasets
from nanodiff.training.batches import Batches
from nanodiff.training.distributed import processes
from nanodiff.training.run import EMA, MAY_CHANGE, Run, RunConfig, free_folder


@dataclass
class Config(RunConfig):
    data: str = "mnist"  # mnist, cifar10, dtd, worlds or woven (drawn), or a folder of pictures, or TIFF volumes
    root: str = ""  # where the files of a named data set lie (default: the repository's data folder)
    download: bool = False  # fetch cifar10 or dtd when it is not there
    size: int = 0  # side of the pictures in pixels (0: the data's own); 4 must divide it
    codes: int = 512  # entries of the codebook
    code_channels: int = 64  # width of an entry
    codebook: str = "gradient"  # how it learns: gradient, or ema (running means; unused codes start anew)
    beta: str = "0.25"  # weight of the commitment term; several, as in 0.1,0.25,0.5,1,2: a run for each
    codebook_times: float = 10.0  # learning rate of the codebook in units of --lr (--codebook gradient)
    decay: float = 0.99  # of the running means (--codebook ema)
    patience: int = 10  # steps without use after which a code starts anew (--codebook ema)
    channels: int = 128  # width of the network at a quarter of the side
    residual_layers: int = 2  # residual layers of the encoder, and of the decoder
    residual_channels: int = 32  # width inside them
    steps: int = 400  # optimiser steps in all
    batch: int = 128  # pictures a micro-batch and process
    lr: float = 1e-3  # learning rate
    warmup: int = 0  # optimiser steps of linear learning-rate warm-up
    lr_end: float = 1.0  # last learning rate as a share of the peak, reached along a cosine (1: constant)
    clip: float = 0.0  # largest gradient norm (0: no clipping)
    ema: float = 0.0  # decay of the averaged weights, which are then what is saved and drawn (0: no averaging)
    log_every: int = 20  # steps between progress lines
    preview_every: int = 100  # steps between measurements on all held-out pictures
    checkpoint_every: int = 100  # steps between checkpoints


CIFAR = dict(steps=900, batch=256, preview_every=300)  # the authors' run
RECENT = 100  # updates that a mean of training numbers is taken over, as the authors took it


@entry
def main(argv=None):
    config, given = parse(Config, argv, __doc__)
    if config.resume:
        config = resumed(config, given, "vqvae", MAY_CHANGE)
    elif config.data == "cifar10":
        for name, value in CIFAR.items():
            if name not in given:
                setattr(config, name, value)
    check_flags(config)
    if len(betas(config)) > 1:
        return compare_betas(config)
    train(config)


def train(config):
    """Trains one VQ-VAE and draws its figures; returns what was measured, or None when it was stopped before."""
    training, held_out, held_out_name = datasets.both(config.data, config.root, config.size, config.download, config.seed)
    run = Run(config, "vqvae")
    check(run.world == 1 or config.codebook == "gradient", "--codebook ema follows the pictures of one process; "
          "expected python, not torchrun, or --codebook gradient")
    batches = Batches(training, config.batch, config.seed, config.accumulate, run.rank, run.world, config.workers)
    net = VQVAE(sizes(config, training.shape[0]), torch.Generator().manual_seed(config.seed))
    net.check_size(training.shape)
    net = net.to(run.device)
    average = EMA(net, config.ema) if config.ema else None
    shown = average.net if average else net
    # at the network's own rate the codes do not keep up with what the encoder says, and few are ever chosen
    codes_of = list(net.codebook.parameters())
    others = [p for p in net.parameters() if all(p is not code for code in codes_of)]
    optimiser = torch.optim.Adam([{"params": others}, {"params": codes_of, "times": config.codebook_times}], lr=config.lr,
                                 fused=True)
    variance = measures.pixel_variance(training)
    run.track(net=net, ema=average, optimiser=optimiser)
    run.print(f"{sum(p.numel() for p in net.parameters()):,} parameters, {len(training):,} training pictures of "
              f"{training.shape} with a variance of {variance:.4f}, {held_out_name} to measure")

    for step in run.steps():
        if run.due(config.preview_every):
            preview(run, shown, held_out, variance)
        seen, errors = [], []
        for micro in range(config.accumulate):
            x, index, _ = batches.get(step, micro)  # [B, C, H, W]
            x = x.to(run.device)
            with run.autocast():
                h = net.maps(x)  # [B, D, H/4, W/4]
                chosen, codebook_loss, codes = net.codebook(h)
                y = net.decode(chosen)
            nmse = (y.float() - x).square().mean() / variance
            loss = nmse + codebook_loss  # equation 3
            run.backward(loss, index)
            seen.append((h.detach(), codes))
            errors.append(float(nmse.detach()))
        h, codes = (torch.cat(part) for part in zip(*seen))  # of all micro-batches
        if config.codebook == "ema":
            net.codebook.follow(h, codes, rng.generator(config.seed, 8, step))
        run.update(net, optimiser, average)
        run.record(step=step, nmse=sum(errors) / len(errors), perplexity=perplexity(codes, config.codes),
                   used=used(codes, config.codes))
        run.log(step)

    if run.rank != 0 or not run.finished:
        return None
    numbers = finish(run, shown, held_out, preview(run, shown, held_out, variance))
    run.print(f"done: {run.folder}")
    return numbers


# --- what came of it ------------------------------------------------------------------------------------------------

def preview(run, net, held_out, variance):
    """Measures the codes of all held-out pictures and saves the model; reconstructions and curves so far. Returns
    (numbers, codes)."""
    if run.rank != 0:
        return None
    save_model(net, run.folder / "model")
    numbers, codes = measures.measure(net, held_out, variance)
    run.record(step=run.step, **{f"held_out_{name}": value for name, value in numbers.items()})
    run.print(f"step {run.step}  " + measures.sentence(numbers, net.config.codes) + recent_sentence(run))
    plots.save(measures.reconstructions(net, held_out, 48), run.path(f"previews/{run.step:08d}.png"))
    plots.save(curves(run), run.path("curves.png"))
    return numbers, codes


def finish(run, net, held_out, measured):
    """The last figures, and all numbers in numbers.json; returns these."""
    numbers, codes = measured
    training = {name: recent(run, name) for name in ("nmse", "perplexity", "used")}
    numbers = {"held_out": numbers, "last_updates": training, "beta": net.config.beta, "steps": run.step}
    write_text(run.path("numbers.json"), json.dumps(numbers, indent=1) + "\n")
    plots.save(measures.reconstructions(net, held_out), run.path("reconstructions.png"))
    plots.save(measures.codebook_picture(net, codes), run.path("codebook.png"))
    return numbers


def recent(run, name):
    """The mean of a training number over the last RECENT updates."""
    values = run.history(name)[1][-RECENT:]
    return sum(values) / len(values)


def recent_sentence(run):
    if not run.step:
        return ""
    return (f"; the last {min(RECENT, run.step)} training batches: NMSE {recent(run, 'nmse'):.4f}, perplexity "
            f"{recent(run, 'perplexity'):.1f}")


def curves(run):
    """NMSE, perplexity and the share of used codes over the updates, of training batches and of held-out pictures."""
    pages = [plots.curves({"training batch": run.history(name), "held out": run.history(f"held_out_{name}")},
                          title, "update", log_y=name == "nmse")
             for name, title in (("nmse", "Squared error / variance of the pixels (NMSE)"),
                                 ("perplexity", "Perplexity of the codes"),
                                 ("used", "Share of the codebook that is used"))]
    return plots.stack(pages)


def compare_betas(config):
    """One run for each --beta, the same otherwise: a table, its numbers and curves (report: it hardly matters)."""
    check(processes() == 1, "--beta with several numbers trains one after the other in one "
          "process; expected python, not torchrun")
    check(not config.resume, "--beta with several numbers makes several runs; resume one of them by its own folder")
    folder, found = free_folder(config.out, "vqvae-betas"), {}
    for beta in betas(config):
        found[beta] = train(dataclasses.replace(config, beta=str(beta), out=str(folder / f"beta-{beta:g}")))
        if found[beta] is None:
            return
    write_text(folder / "betas.json", json.dumps(list(found.values()), indent=1) + "\n")
    print("| beta | held-out NMSE | perplexity | codes used |\n|---|---|---|---|")
    for beta, numbers in found.items():
        row = numbers["held_out"]
        print(f"| {beta:g} | {row['nmse']:.4f} | {row['perplexity']:.1f} | {row['used']:.1%} |")
    lines = {name: (list(found), [one["held_out"][name] for one in found.values()]) for name in ("nmse", "perplexity")}
    pages = [plots.curves({name: line}, f"held-out {name} after {config.steps} updates", "beta", log_x=True)
             for name, line in lines.items()]
    plots.save(plots.stack(pages), folder / "betas.png")
    print(f"done: {folder}")


# --- flags ----------------------------------------------------------------------------------------------------------

def sizes(config, channels):
    """The network's sizes from the flags, for pictures of so many channels."""
    return VQVAEConfig(channels, config.channels, config.residual_layers, config.residual_channels, config.codes,
                       config.code_channels, betas(config)[0], config.decay if config.codebook == "ema" else 0.0,
                       config.patience)


def betas(config):
    """--beta as numbers."""
    try:
        found = [float(one) for one in config.beta.split(",")]
    except ValueError:
        found = []
    check(found and all(0 <= beta < math.inf for beta in found) and len(set(found)) == len(found),
          f'--beta is "{config.beta}"; expected one number from 0 up, such as 0.25, or several different ones with '
          "commas between")
    return found


def check_flags(config):
    """Raises UserError for every flag whose value alone is wrong, before anything is read or written."""
    check(config.codebook in ("gradient", "ema"), f'--codebook "{config.codebook}" is unknown; expected gradient or ema'
          + nearest(config.codebook, ("gradient", "ema")))
    check(config.codebook_times > 0, f"--codebook_times is {config.codebook_times}; expected a number above 0, such as 10")
    check(0 < config.decay < 1, f"--decay is {config.decay}; expected a number between 0 and 1, such as 0.99")
    check(config.size >= 0 and config.size % 4 == 0, f"--size is {config.size}; expected a multiple of 4, such as "
          f"{max(4, round(config.size / 4) * 4)}, or 0 (the pictures' own)")
    sizes(config, 1)


if __name__ == "__main__":
    main()
