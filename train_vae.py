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

import torch

from nanodiff import plots, rng
from nanodiff.data.images import spread
from nanodiff.diffusion import gaussian
from nanodiff.errors import check, nearest
from nanodiff.files import write_text
from nanodiff.flags import entry, parse, resumed, whole_numbers
from nanodiff.formats.model_folder import save_model
from nanodiff.metrics.tsne import neighbour_accuracy, tsne
from nanodiff.models.autoencoder import NETS, cross_entropy, drawn, entropy, levels
from nanodiff.models.vae import VAE, VAEConfig, generate, importance_weighted_bound, sampled_kl
from nanodiff.training import datasets
from nanodiff.training.batches import Batches
from nanodiff.training.distributed import processes
from nanodiff.training.run import EMA, MAY_CHANGE, Run, RunConfig


@dataclass
class Config(RunConfig):
    data: str = "mnist"  # mnist, cifar10, dtd, worlds or woven (drawn), or a folder of pictures, or TIFF volumes
    root: str = ""  # where the files of a named data set lie (default: the repository's data folder)
    download: bool = False  # fetch cifar10 or dtd when it is not there
    size: int = 0  # side of the pictures in pixels (0: the data's own)
    net: str = "mlp"  # mlp (fully connected layers) or conv
    widths: str = ""  # of the hidden layers, or of conv's levels (default: 400; conv 12,24,48, for mnist 12,24)
    latent: int = 0  # numbers that a picture becomes (0: 20, or 512 for other data's conv)
    samples: int = 1  # draws from each picture's posterior: L of equations (1) and (2)
    analytic: bool = True  # the KL in closed form, equation (2), or from the same draws, equation (1)
    kl_weight: float = 1.0  # of the KL (1: the bound; 0: an autoencoder)
    epochs: int = 10  # passes over the training pictures
    steps: int = 0  # optimiser steps in all (0: as many as --epochs are)
    batch: int = 0  # pictures a micro-batch and process (0: 128, or 32 for conv)
    lr: float = 1e-3  # learning rate
    warmup: int = 0  # optimiser steps of linear learning-rate warm-up
    lr_end: float = 1.0  # last learning rate as a share of the peak, reached along a cosine (1: constant)
    clip: float = 0.0  # largest gradient norm (0: no clipping)
    ema: float = 0.0  # decay of the averaged weights, which are then what is saved and drawn (0: no averaging)
    log_every: int = 100  # steps between progress lines
    preview_every: int = 0  # steps between measurements and pictures (0: a pass over the training pictures)
    checkpoint_every: int = 2000  # steps between checkpoints
    importance: int = 50  # draws of the tighter bound on log p(x), after training (0: none)
    tsne: int = 2000  # held-out pictures on the map of the latents (0: none)


@entry
def main(argv=None):
    config, given = parse(Config, argv, __doc__)
    if config.resume:
        config = resumed(config, given, "vae", MAY_CHANGE)
    else:
        small = config.net == "mlp" or config.data == "mnist"
        config.widths = config.widths or {"mlp": "400"}.get(config.net, "12,24" if small else "12,24,48")
        config.latent = config.latent or (20 if small else 512)
        config.batch = config.batch or (128 if config.net == "mlp" else 32)
    check_flags(config)
    train(config)


def train(config):
    """Trains one VAE and draws its figures; returns the network, or None when it was stopped before."""
    training, held_out, held_out_name = datasets.both(config.data, config.root, config.size, config.download,
                                                      config.seed)
    sizes = VAEConfig(config.net, training.shape, whole_numbers("--widths", config.widths), config.latent)
    at_once = config.batch * config.accumulate * processes()
    epoch = -(-len(training) // at_once)  # steps until every picture was seen
    config.steps = config.steps or config.epochs * epoch
    config.preview_every = config.preview_every or epoch

    run = Run(config, "vae")
    batches = Batches(training, config.batch, config.seed, config.accumulate, run.rank, run.world, config.workers)
    net = VAE(sizes, torch.Generator().manual_seed(config.seed)).to(run.device)
    average = EMA(net, config.ema) if config.ema else None
    shown = average.net if average else net  # the weights that are measured, drawn and saved
    optimiser = torch.optim.Adam(net.parameters(), lr=config.lr, fused=True)
    run.track(net=net, ema=average, optimiser=optimiser)
    run.print(f"{sum(p.numel() for p in net.parameters()):,} parameters, {len(training):,} training pictures of "
              f"{training.shape} as {config.latent} numbers each, {held_out_name} to measure, {epoch} steps an epoch")

    for step in run.steps():
        if step and run.due(config.preview_every):
            preview(run, shown, training, held_out)
        # in one draw for all micro-batches and processes, so that it is the same noise however the step is divided
        noises = torch.randn(batches.batch * config.accumulate * run.world, config.samples, config.latent,
                             generator=rng.generator(config.seed, 0, step))
        for micro in range(config.accumulate):
            x, index, position = batches.get(step, micro)  # [B, C, H, W]
            x, noise = x.to(run.device), noises[position].to(run.device)  # [B, L, latent]
            with run.autocast():
                posterior = net.encode(x)
                z = posterior.mean + torch.exp(0.5 * posterior.logvar) * noise.transpose(0, 1)  # [L, B, latent]
                logits = net.decode(z)
            level = levels(x)  # the cross-entropy takes a level as the probability of a 1
            reconstruction = cross_entropy(logits.float(), level).mean(0)  # [B]
            kl = posterior.kl() if config.analytic else sampled_kl(z, posterior).mean(0)  # [B]
            loss = (reconstruction + config.kl_weight * kl).mean()
            run.backward(loss, index)
        run.update(net, optimiser, average)
        run.log(step)

    if run.rank != 0 or not run.finished:
        return None
    finish(run, shown, training, held_out)
    run.print(f"done: {run.folder}")
    return shown


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
    found = [net.encode(part.to(next(net.parameters()).device)) for part in x.split(500)]
    return torch.cat([one.mean for one in found]).cpu(), torch.cat([torch.exp(0.5 * one.logvar) for one in found]).cpu()


# --- figures --------------------------------------------------------------------------------------------------------

def preview(run, net, training, held_out):
    """The two terms on training and held-out pictures, in the log; samples from the prior, the curves; saves the model.
    Returns what was measured."""
    if run.rank != 0:
        return
    config = run.config
    save_model(net, run.folder / "model")
    numbers = {"epoch": round(run.step * config.batch * config.accumulate * run.world / len(training), 2),
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
    some = spread(held_out, 96)
    x = held_out.read(some, some)
    mean, _ = posteriors(net, x)
    plots.save(plots.reconstructions(x, drawn(net, mean)), run.path("figure11_reconstructions.png"))
    plots.save(plots.grid(generate(net, 100, config.seed)), run.path("prior_samples.png"))
    some = spread(held_out, config.tsne or 2000)
    mean, deviation = posteriors(net, held_out.read(some, some))
    each = gaussian.kl_diagonal(mean, deviation**2, torch.zeros(()), torch.ones(())).mean(0)  # [latent]
    numbers |= {"kl_of_each": each.tolist(), "in_use": int((each > 0.01).sum()), "deviation": float(deviation.mean())}
    plots.save(traversals(net, mean[0], each), run.path("traversals.png"))
    if config.importance:
        numbers["bound"] = bound = measure_bound(net, held_out, config.importance, config.seed)
        run.print("{pictures:,} held-out pictures: -log p(x) is at most {minus_log_p:.2f} nats by {draws} weighted "
                  "draws each, by -ELBO {minus_elbo:.2f}".format(**bound))
    if config.tsne:
        label = None if held_out.labels is None else held_out.labels[some]
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


# --- flags ----------------------------------------------------------------------------------------------------------

def check_flags(config):
    """Raises UserError for every flag whose value alone is wrong, before anything is read or written."""
    check(config.net in NETS, f'--net "{config.net}" is unknown; expected {" or ".join(NETS)}'
          + nearest(config.net, NETS))
    for name, least in dict(epochs=1, steps=0, batch=1, accumulate=1, latent=1, size=0, preview_every=0, samples=1,
                            kl_weight=0, importance=0, tsne=0).items():
        check(getattr(config, name) >= least, f"--{name} is {getattr(config, name)}; expected {least} or more")
    whole_numbers("--widths", config.widths)


if __name__ == "__main__":
    main()
