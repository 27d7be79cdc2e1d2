"""The variational autoencoder: latents held near N(0, 1), so that N(0, 1) gives new pictures (report section 2.1.2).

    python train_vae.py                                the report's 784-400-20 on digits, 10 epochs
    python train_vae.py --epochs 30                    as far as it gets
    python train_vae.py --no-analytic --samples 5      equation (1), both of its terms from 5 samples, instead of (2)
    python train_vae.py --kl_weight 0                  without the KL term: no noise is left in the latents
    python train_vae.py --net conv --data cifar10 --download    the report's convolutional network, batch of 32
    python train_vae.py --resume runs/vae-001          goes on exactly where the run was stopped or killed

The loss is -ELBO in nats a picture: the cross-entropy of the levels, whose entropy is a floor, and the KL. The run's
vae.json holds both on training and held-out pictures, a tighter bound on log p(x) and what the map of the latents
shows (report figures 10 to 12).
"""

import json
from dataclasses import dataclass
from typing import Literal

import torch

from nanodiff import plots, rng
from nanodiff.files import write_text
from nanodiff.flags import BelowOne, Count, CountOrZero, NotNegative, Positive, entry, parse, resumed, set_defaults
from nanodiff.formats.model_folder import save_model
from nanodiff.metrics import vae_elbo
from nanodiff.models.autoencoder import cross_entropy, levels
from nanodiff.models.vae import VAE, VAEConfig, generate, sampled_kl
from nanodiff.report import figures_vae
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
    widths: tuple[Count, ...] = (400,)  # of the hidden layers, or of conv's levels (conv: 12,24,48, for mnist 12,24)
    latent: Count = 20  # numbers that a picture becomes (conv: 512, for mnist 20)
    samples: Count = 1  # draws from each picture's posterior: L of equations (1) and (2)
    analytic: bool = True  # the KL in closed form, equation (2), or from the same draws, equation (1)
    kl_weight: NotNegative = 1.0  # of the KL (1: the bound; 0: an autoencoder)
    epochs: Count = 10  # passes over the training pictures
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
    importance: CountOrZero = 50  # draws of the tighter bound on log p(x), after training (0: none)
    tsne: CountOrZero = 2000  # held-out pictures on the map of the latents (0: none)


# What --net conv starts from, for digits and for other pictures.
CONV_MNIST = dict(widths=(12, 24), batch=32)
CONV = dict(widths=(12, 24, 48), latent=512, batch=32)


@entry
def main(argv=None):
    config, given = parse(Config, argv, __doc__)
    if config.resume:
        config = resumed(config, given, "vae", MAY_CHANGE)
    elif config.net == "conv":
        set_defaults(config, given, **(CONV_MNIST if config.data == "mnist" else CONV))
    train(config)


def train(config):
    """Trains one VAE and draws its figures; returns the network, or None when it was stopped before."""
    training, held_out, held_out_name = datasets.load_splits(config.data, config.root, config.size, config.download,
                                                             config.seed)
    sizes = VAEConfig(config.net, training.shape, config.widths, config.latent)
    epoch = -(-len(training) // (config.batch * config.gradient_accumulation))  # steps until every picture was seen
    config.steps = config.steps or config.epochs * epoch
    config.preview_every = config.preview_every or epoch

    run = Run(config, "vae")
    batches = Batches(training, config.batch, config.seed, config.gradient_accumulation, run.rank, run.world,
                      config.workers)
    net = VAE(sizes, torch.Generator().manual_seed(config.seed)).to(run.device)
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
        # in one draw for all micro-batches and processes, so that it is the same noise however the step is divided
        noises = torch.randn(config.batch * config.gradient_accumulation, config.samples, config.latent,
                             generator=rng.generator(config.seed, 0, step))
        for micro in run.micro_batches():
            x, index, position = batches.get(step, micro)  # [B, C, H, W]
            x, noise = x.to(run.device), noises[position].to(run.device)  # [B, L, latent]
            with run.autocast():
                logits, z, posterior = ddp_net(x, noise.transpose(0, 1))  # z [L, B, latent]
            level = levels(x)  # the cross-entropy takes a level as the probability of a 1
            reconstruction = cross_entropy(logits.float(), level).mean(0)  # [B]
            kl = posterior.kl() if config.analytic else sampled_kl(z, posterior).mean(0)  # [B]
            loss = (reconstruction + config.kl_weight * kl).mean()
            run.backward(loss, index)
        run.update(net, optimiser, lr)
        if ema:
            ema.update(net)
        run.log(step, lr)

    if run.rank != 0 or not run.finished:
        return None
    finish(run, final, training, held_out)
    run.print(f"done: {run.folder}")
    return final


# --- what came of it ------------------------------------------------------------------------------------------------

def preview(run, net, training, held_out):
    """The two terms on training and held-out pictures, in the log; samples from the prior, the curves; saves the model.
    Returns what was measured."""
    if run.rank != 0:
        return
    config = run.config
    save_model(net, run.folder / "model")
    numbers = {"epoch": round(run.step * config.batch * config.gradient_accumulation / len(training), 2),
               "train": vae_elbo.measure(net, training, config.seed),
               "held_out": vae_elbo.measure(net, held_out, config.seed)}
    numbers["batch_of_32"] = 32 * numbers["train"]["minus_elbo"]  # the report's unit
    run.record(step=run.step, **numbers)
    run.print(f"step {run.step}  -ELBO in nats a picture: " + ", ".join(
        "{} {minus_elbo:.2f} (reconstruction {reconstruction:.2f}, floor {floor:.2f}, KL {kl:.2f})".format(name, **row)
        for name, row in (("training", numbers["train"]), ("held out", numbers["held_out"])))
        + f"; training {numbers['batch_of_32']:,.0f} a batch of 32")
    plots.save(plots.grid(generate(net, 64, config.seed)), run.path(f"previews/{run.step:08d}.png"))
    plots.save(figures_vae.loss_curves(run), run.path("figure10_losses.png"))
    return numbers


def finish(run, net, training, held_out):
    """The last measurements, with a tighter bound on log p(x), in vae.json, and the report's figures."""
    config = run.config
    numbers = preview(run, net, training, held_out)
    plots.save(plots.grid(generate(net, 100, config.seed)), run.path("prior_samples.png"))
    numbers |= figures_vae.draw_all(run, net, held_out)
    if config.importance:
        numbers["bound"] = bound = vae_elbo.measure_bound(net, held_out, config.importance, config.seed)
        run.print("{pictures:,} held-out pictures: -log p(x) is at most {minus_log_p:.2f} nats by {draws} weighted "
                  "draws each, by -ELBO {minus_elbo:.2f}".format(**bound))
    write_text(run.path("vae.json"), json.dumps(numbers, indent=1) + "\n")


if __name__ == "__main__":
    main()
