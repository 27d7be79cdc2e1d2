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
import time
from dataclasses import dataclass
from typing import Literal

import torch

from nanodiff import plots, rng
from nanodiff.data.images import spread
from nanodiff.diffusion import gaussian
from nanodiff.files import write_text
from nanodiff.flags import BelowOne, Count, CountOrZero, NotNegative, Positive, entry, parse, resumed, set_defaults
from nanodiff.formats.model_folder import save_model
from nanodiff.metrics.tsne import neighbour_accuracy, tsne
from nanodiff.models.autoencoder import cross_entropy, drawn, entropy, levels
from nanodiff.models.vae import VAE, VAEConfig, generate, importance_weighted_bound, sampled_kl
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
    training, held_out, held_out_name = datasets.both(config.data, config.root, config.size, config.download,
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


# --- measuring ------------------------------------------------------------------------------------------------------

@torch.no_grad()
def measure(net, images, seed, most=10_000):
    """Means in nats a picture over at most that many pictures, evenly spread, one draw each: reconstruction, kl, their
    sum minus_elbo, and floor, the entropy of the levels."""
    places, device = spread(images, most), next(net.parameters()).device
    total = torch.zeros(3, dtype=torch.float64)
    for index in places.split(500):
        x = images.read(index, index).to(device)
        level, posterior = levels(x), net.encode(x)
        noise = rng.normal(seed, -1, index.to(device), (net.config.latent,))
        logits = net.decode(posterior.mean + torch.exp(0.5 * posterior.logvar) * noise)
        for i, nats in enumerate((cross_entropy(logits, level), posterior.kl(), entropy(level))):
            total[i] += nats.double().sum().cpu()
    reconstruction, kl, floor = (total / len(places)).tolist()
    return {"reconstruction": reconstruction, "kl": kl, "minus_elbo": reconstruction + kl, "floor": floor}


@torch.no_grad()
def measure_bound(net, images, k, seed, most=2000):
    """The importance-weighted bound on -log p(x) with k draws beside the same draws' -ELBO (k = 1), means in nats."""
    places, device = spread(images, most), next(net.parameters()).device
    tight = loose = 0.0
    for index in places.split(max(1, 2000 // k)):
        x = images.read(index, index).to(device)
        posterior = net.encode(x)
        noise = rng.normal(seed, -2, index.to(device), (k, net.config.latent)).transpose(0, 1)
        z = posterior.mean + torch.exp(0.5 * posterior.logvar) * noise  # [k, B, latent]
        log_likelihood = -cross_entropy(net.decode(z), levels(x))  # [k, B]
        tight -= float(importance_weighted_bound(log_likelihood, z, posterior).double().sum())
        loose -= float((log_likelihood.mean(0) - posterior.kl()).double().sum())
    return {"pictures": len(places), "draws": k, "minus_log_p": tight / len(places), "minus_elbo": loose / len(places)}


@torch.no_grad()
def posteriors(net, x):
    """Means and standard deviations [N, latent] of q(z|x) for pictures x, on the CPU."""
    device = next(net.parameters()).device
    gaussians = [net.encode(part.to(device)) for part in x.split(500)]
    return (torch.cat([q.mean for q in gaussians]).cpu(),
            torch.cat([torch.exp(0.5 * q.logvar) for q in gaussians]).cpu())


# --- figures --------------------------------------------------------------------------------------------------------

def preview(run, net, training, held_out):
    """The two terms on training and held-out pictures, in the log; samples from the prior, the curves; saves the model.
    Returns what was measured."""
    if run.rank != 0:
        return
    config = run.config
    save_model(net, run.folder / "model")
    numbers = {"epoch": round(run.step * config.batch * config.gradient_accumulation / len(training), 2),
               "train": measure(net, training, config.seed), "held_out": measure(net, held_out, config.seed)}
    numbers["batch_of_32"] = 32 * numbers["train"]["minus_elbo"]  # the report's unit
    run.record(step=run.step, **numbers)
    run.print(f"step {run.step}  -ELBO in nats a picture: " + ", ".join(
        "{} {minus_elbo:.2f} (reconstruction {reconstruction:.2f}, floor {floor:.2f}, KL {kl:.2f})".format(name, **row)
        for name, row in (("training", numbers["train"]), ("held out", numbers["held_out"])))
        + f"; training {numbers['batch_of_32']:,.0f} a batch of 32")
    plots.save(plots.grid(generate(net, 64, config.seed)), run.path(f"previews/{run.step:08d}.png"))
    plots.save(loss_curves(run), run.path("figure10_losses.png"))
    return numbers


def loss_curves(run):
    """-ELBO and its two terms on training and held-out pictures, each with an axis of its own (report figure 10)."""
    pages = []
    for term in ("minus_elbo", "reconstruction", "kl"):
        lines = {}
        for name, label in (("train", "training"), ("held_out", "held out")):
            steps, rows = run.history(name)
            lines[label] = (steps, [row[term] for row in rows])
        title = {"minus_elbo": "-ELBO", "kl": "KL"}.get(term, "Reconstruction")
        pages.append(plots.curves(lines, f"{title} in nats a picture", "step", size=(720, 300)))
    return plots.stack(pages)


def finish(run, net, training, held_out):
    """Every figure and its numbers."""
    config = run.config
    numbers = preview(run, net, training, held_out)
    places = spread(held_out, 96)
    x = held_out.read(places, places)
    mean, _ = posteriors(net, x)
    plots.save(plots.reconstructions(x, drawn(net, mean)), run.path("figure11_reconstructions.png"))
    plots.save(plots.grid(generate(net, 100, config.seed)), run.path("prior_samples.png"))
    places = spread(held_out, config.tsne or 2000)
    mean, deviation = posteriors(net, held_out.read(places, places))
    each = gaussian.kl_diagonal(mean, deviation**2, torch.zeros(()), torch.ones(())).mean(0)  # [latent]
    numbers |= {"kl_of_each": each.tolist(), "in_use": int((each > 0.01).sum()), "deviation": float(deviation.mean())}
    plots.save(traversals(net, mean[0], each), run.path("traversals.png"))
    if config.importance:
        numbers["bound"] = bound = measure_bound(net, held_out, config.importance, config.seed)
        run.print("{pictures:,} held-out pictures: -log p(x) is at most {minus_log_p:.2f} nats by {draws} weighted "
                  "draws each, by -ELBO {minus_elbo:.2f}".format(**bound))
    if config.tsne:
        label = None if held_out.labels is None else held_out.labels[places]
        numbers["map"] = draw_map(run, mean, label, held_out.classes)
    write_text(run.path("vae.json"), json.dumps(numbers, indent=1) + "\n")


def traversals(net, start, each, rows=10, columns=11):
    """A latent start [latent] changed in one number at a time, from -3 to 3: the numbers with the largest KL first."""
    values = torch.linspace(-3, 3, columns)
    chosen = each.argsort(descending=True)[:rows]
    table = []
    for number in chosen.tolist():
        z = start.repeat(columns, 1)
        z[:, number] = values
        table.append(list(drawn(net, z)))
    labels = [f"z{number}, KL {each[number]:.2f}" for number in chosen.tolist()]
    return plots.sheet(table, labels, [f"{round(value, 1) + 0:.1f}" for value in values.tolist()])  # + 0: no "-0.0"


def draw_map(run, mean, label, classes):
    """Figure 12: t-SNE of the means [n, latent]; returns its numbers, or None where there are too few pictures."""
    perplexity = min(30, (len(mean) - 1) // 3)
    if perplexity < 2:
        run.print(f"{len(mean)} held-out pictures are too few for a map of the latents; 7 are enough")
        return None
    started = time.time()
    y = tsne(mean, perplexity, seed=run.config.seed)
    numbers = {"pictures": len(y), "perplexity": perplexity, "seconds": round(time.time() - started, 1)}
    if label is not None and len(y) > 10:
        numbers |= {"neighbour_accuracy": neighbour_accuracy(y, label),
                    "neighbour_accuracy_in_latents": neighbour_accuracy(mean, label)}
        run.print("t-SNE of {pictures:,} means in {seconds} s: the 10 nearest tell the label of "
                  "{neighbour_accuracy:.1%} on the map, of {neighbour_accuracy_in_latents:.1%} in the latents".format(
                      **numbers))
    plots.save(plots.label_map(y, label, classes, "t-SNE of held-out means"), run.path("figure12_tsne.png"))
    label = label if label is None else label.tolist()
    write_text(run.path("figure12_tsne.json"), json.dumps({**numbers, "y": y.tolist(), "label": label}) + "\n")
    return numbers


if __name__ == "__main__":
    main()
