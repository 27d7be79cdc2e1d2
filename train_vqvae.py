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
from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from nanodiff import plots, rng
from nanodiff.errors import check
from nanodiff.files import write_text
from nanodiff.flags import (BelowOne, Between, Count, CountOrZero, MultipleOf, NotEmpty, NotNegative, Positive, entry,
                            parse, resumed, set_defaults)
from nanodiff.formats.model_folder import save_model
from nanodiff.metrics import codebook as measures
from nanodiff.models.vqvae import VQVAE, VQVAEConfig, perplexity, used
from nanodiff.training import datasets
from nanodiff.training.batches import Batches
from nanodiff.training.distributed import processes
from nanodiff.training.run import MAY_CHANGE, Run, RunConfig, free_folder
from nanodiff.training.step import EMA, learning_rate


@dataclass
class Config(RunConfig):
    data: str = "mnist"  # mnist, cifar10, dtd, worlds or woven (drawn), or a folder of pictures, or TIFF volumes
    root: str = ""  # where the files of a named data set lie (default: the repository's data folder)
    download: bool = False  # fetch cifar10 or dtd when it is not there
    size: Annotated[CountOrZero, MultipleOf(4)] = 0  # side of the pictures in pixels (0: the data's own)
    codes: Count = 512  # entries of the codebook
    code_channels: Count = 64  # width of an entry
    codebook: Literal["gradient", "ema"] = "gradient"  # how it learns; ema: running means, unused codes start anew
    beta: Annotated[tuple[NotNegative, ...], NotEmpty()] = (0.25,)  # weight of commitment; several: a run for each
    codebook_lr_scale: Positive = 10.0  # learning rate of the codebook in units of --lr (--codebook gradient)
    decay: Annotated[float, Between(0, 1, open="both")] = 0.99  # of the running means (--codebook ema)
    patience: Count = 10  # steps without use after which a code starts anew (--codebook ema)
    channels: Count = 128  # width of the network at a quarter of the side
    residual_layers: CountOrZero = 2  # residual layers of the encoder, and of the decoder
    residual_channels: Count = 32  # width inside them
    steps: Count = 400  # optimiser steps in all
    batch: Count = 128  # pictures of one micro-batch, over all processes
    lr: Positive = 1e-3  # learning rate
    warmup: CountOrZero = 0  # optimiser steps of linear learning-rate warm-up
    lr_end: NotNegative = 1.0  # last learning rate as a share of the peak, reached along a cosine (1: constant)
    clip: NotNegative = 0.0  # largest gradient norm (0: no clipping)
    ema: BelowOne = 0.0  # decay of the averaged weights, which are then what is saved and drawn (0: no averaging)
    log_every: Count = 20  # steps between progress lines
    preview_every: Count = 100  # steps between measurements on all held-out pictures
    checkpoint_every: Count = 100  # steps between checkpoints


CIFAR = dict(steps=900, batch=256, preview_every=300)  # the authors' run
RECENT = 100  # updates that a mean of training numbers is taken over, as the authors took it


@entry
def main(argv=None):
    config, given = parse(Config, argv, __doc__)
    if config.resume:
        config = resumed(config, given, "vqvae", MAY_CHANGE)
    elif config.data == "cifar10":
        set_defaults(config, given, **CIFAR)
    check_flags(config)
    if len(config.beta) > 1:
        return compare_betas(config)
    train(config)


def train(config):
    """Trains one VQ-VAE and draws its figures; returns what was measured, or None when it was stopped before."""
    training, held_out, held_out_name = datasets.load_splits(config.data, config.root, config.size, config.download,
                                                             config.seed)
    run = Run(config, "vqvae")
    batches = Batches(training, config.batch, config.seed, config.gradient_accumulation, run.rank, run.world,
                      config.workers)
    net = VQVAE(sizes(config, training.shape[0]), torch.Generator().manual_seed(config.seed))
    net.check_size(training.shape)
    net = net.to(run.device)
    ema = EMA(net, config.ema) if config.ema else None
    final = ema.net if ema else net  # the weights that are measured, drawn and saved
    # At the network's own rate the codes fall behind the encoder's vectors, and few are ever chosen.
    codebook = list(net.codebook.parameters())
    others = [p for name, p in net.named_parameters() if not name.startswith("codebook.")]
    groups = [{"params": others}, {"params": codebook, "lr_scale": config.codebook_lr_scale}]
    optimiser = torch.optim.Adam(groups, lr=config.lr, fused=True)
    variance = measures.pixel_variance(training)
    run.track(net=net, ema=ema, optimiser=optimiser)
    ddp_net = run.ddp(net)
    run.print(f"{sum(p.numel() for p in net.parameters()):,} parameters, {len(training):,} training pictures of "
              f"{training.shape} with a variance of {variance:.4f}, {held_out_name} to measure")

    for step in run.steps():
        lr = learning_rate(step, config)
        if run.due(config.preview_every):
            preview(run, final, held_out, variance)
        vectors, errors = [], []  # the encoder's vectors and their codes; NMSE
        for micro in run.micro_batches():
            x, index, _ = batches.get(step, micro)  # [B, C, H, W]
            x = x.to(run.device)
            with run.autocast():
                y, codebook_loss, codes, h = ddp_net(x)
            nmse = (y.float() - x).square().mean() / variance
            loss = nmse + codebook_loss  # equation 3
            run.backward(loss, index)
            vectors.append((h.detach(), codes))
            errors.append(float(nmse.detach()))
        h, codes = (torch.cat(part) for part in zip(*vectors))  # of all micro-batches
        if config.codebook == "ema":
            net.codebook.ema_update(h, codes, rng.generator(config.seed, rng.REVIVAL, step))
        run.update(net, optimiser, lr)
        if ema:
            ema.update(net)
        run.record(step=step, nmse=sum(errors) / len(errors), perplexity=perplexity(codes, config.codes),
                   used=used(codes, config.codes))
        run.log(step, lr)

    if run.rank != 0 or not run.finished:
        return None
    numbers = finish(run, final, held_out, preview(run, final, held_out, variance))
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
    folder, numbers = free_folder(config.out, "vqvae-betas"), {}
    for beta in config.beta:
        numbers[beta] = train(dataclasses.replace(config, beta=(beta,), out=str(folder / f"beta-{beta:g}")))
        if numbers[beta] is None:
            return
    write_text(folder / "betas.json", json.dumps(list(numbers.values()), indent=1) + "\n")
    print("| beta | held-out NMSE | perplexity | codes used |\n|---|---|---|---|")
    for beta, row in ((beta, run["held_out"]) for beta, run in numbers.items()):
        print(f"| {beta:g} | {row['nmse']:.4f} | {row['perplexity']:.1f} | {row['used']:.1%} |")
    pages = [plots.curves({name: (list(numbers), [run["held_out"][name] for run in numbers.values()])},
                          f"held-out {name} after {config.steps} updates", "beta", log_x=True)
             for name in ("nmse", "perplexity")]
    plots.save(plots.stack(pages), folder / "betas.png")
    print(f"done: {folder}")


# --- flags ----------------------------------------------------------------------------------------------------------

def sizes(config, channels):
    """The network's sizes from the flags, for pictures of so many channels."""
    return VQVAEConfig(channels, config.channels, config.residual_layers, config.residual_channels, config.codes,
                       config.code_channels, config.beta[0], config.decay if config.codebook == "ema" else 0.0,
                       config.patience)


def check_flags(config):
    """Raises UserError where flags do not go together, before anything is read or written."""
    several = len(config.beta) > 1
    check(len(set(config.beta)) == len(config.beta), f"--beta is {','.join(map(str, config.beta))}; expected one "
          "number, such as 0.25, or several different ones with commas between")
    check(not several or not config.resume, "--beta with several numbers makes several runs; resume one of them by its "
          "own folder")
    check(processes() == 1 or not several, "--beta with several numbers trains one after the other in one process; "
          "expected python, not torchrun")
    check(processes() == 1 or config.codebook == "gradient", "--codebook ema needs all pictures of a step in one "
          "process; expected python, not torchrun, or --codebook gradient")
    sizes(config, 1)


if __name__ == "__main__":
    main()
