"""Generative adversarial networks (Goodfellow et al. 2014; Arjovsky et al. 2017; Gulrajani et al. 2017; report section
2.2): a generator against a discriminator or a Wasserstein critic.

    python train_gan.py                                digits with the non-saturating loss
    python train_gan.py --loss wasserstein             the same with a clipped critic (or minimax, wasserstein-gp)
    python train_gan.py --data cifar10 --download      the report's networks (its GAN: --leak 0 --lr 1e-3 --beta1 0.9)
    python train_gan.py --data grid --loss minimax     25 Gaussians in the plane (or ring: 8): watch modes being lost
    python train_gan.py --study                        all four losses on the grid, three seeds: one table and picture
    python train_gan.py --resume runs/gan-001          goes on exactly where the run was stopped or killed

A step is one update of the generator; the critic takes --n_critic before it. Neither loss says how good the pictures
are, so they are judged on the way: by a Frechet distance, by how far they are apart (a collapsed generator makes one
picture), and once more as the report did it, from sixteen latents.
"""

import dataclasses
import json
from dataclasses import dataclass
from typing import Annotated, Literal

import torch

from nanodiff import plots, rng
from nanodiff.errors import check
from nanodiff.files import write_text
from nanodiff.flags import (AtLeast, BelowOne, Count, CountOrZero, NotNegative, Positive, entry, parse, resumed,
                            set_defaults)
from nanodiff.formats.model_folder import save_model
from nanodiff.metrics.gan_samples import POINTS, PictureJudge, PointJudge
from nanodiff.models import gan
from nanodiff.models.gan import Discriminator, GANConfig, Generator, generate
from nanodiff.report import figures_gan
from nanodiff.training import datasets
from nanodiff.training.batches import Batches
from nanodiff.training.distributed import processes
from nanodiff.training.run import MAY_CHANGE, Run, RunConfig, free_folder
from nanodiff.training.step import EMA, learning_rate
from nanodiff.worlds import mixtures


@dataclass
class Config(RunConfig):
    loss: Literal["minimax", "non-saturating", "wasserstein", "wasserstein-gp"] = "non-saturating"  # of both networks
    data: str = "mnist"  # mnist, cifar10, dtd, worlds or woven (drawn), a folder or volumes; ring or grid: Gaussians
    root: str = ""  # where the files of a named data set lie (default: the repository's data folder)
    download: bool = False  # fetch cifar10 or dtd when it is not there
    size: CountOrZero = 0  # side of the pictures in pixels (0: the data's own)
    latent: CountOrZero = 0  # numbers in a latent (0: 64 for mnist, 2 for ring and grid, else 256)
    channels: tuple[Count, ...] = ()  # widths from half the side down (none: doubling from 64, or 32)
    leak: NotNegative = 0.2  # slope below 0 of the discriminator's activation (0: the report's ReLU)
    n_critic: CountOrZero = 0  # updates of the critic before each of the generator's (0: 1, or 5 for Wasserstein)
    weight_clip: Positive = 0.01  # largest weight of the critic (--loss wasserstein)
    penalty: NotNegative = 10.0  # weight of the gradient penalty (--loss wasserstein-gp)
    beta1: BelowOne = 0.5  # decay of Adam's mean gradient (minimax and non-saturating; 0 for wasserstein-gp)
    judged: Annotated[int, AtLeast(6)] = 1000  # samples judged at each preview (2,500 of ring and grid)
    alike: NotNegative = 0.5  # samples less than this share as far apart as real pictures are called collapsed
    study: bool = False  # all four losses on the grid, --seeds times, in one folder
    seeds: Count = 3  # of --study
    steps: CountOrZero = 0  # updates of the generator (0: for all losses about as much work, see START)
    batch: CountOrZero = 0  # pictures a batch (0: 64 for mnist, 256 for ring and grid, else 32)
    lr: NotNegative = 0.0  # learning rate of both (0: 2e-4; 5e-5 for wasserstein, 1e-4 for wasserstein-gp)
    warmup: CountOrZero = 0  # updates of linear learning-rate warm-up
    lr_end: NotNegative = 1.0  # last learning rate as a share of the peak, reached along a cosine (1: constant)
    clip: NotNegative = 0.0  # largest gradient norm (0: no clipping)
    ema: BelowOne = 0.0  # decay of the generator's averaged weights, which are then what is judged (0: no averaging)
    preview_every: CountOrZero = 0  # steps between pictures and judgements (0: a tenth of --steps)
    checkpoint_every: Count = 1000  # steps between checkpoints


# What the data and the loss start from where no flag says otherwise. `passes` is updates of both networks together.
START = {"mnist": dict(latent=64, batch=64, passes=6000), "": dict(latent=256, batch=32, passes=15_600),
         "points": dict(latent=2, batch=256, passes=6000, channels=(128, 128, 128))}
LOSSES = {"minimax": dict(lr=2e-4, n_critic=1), "non-saturating": dict(lr=2e-4, n_critic=1),
          "wasserstein": dict(lr=5e-5, n_critic=5), "wasserstein-gp": dict(lr=1e-4, n_critic=5)}
# --study gives all four the same networks and as many updates of both: a critic that is trained nearly to its best is
# what the Wasserstein losses need and what leaves the minimax generator without a slope.
STUDY = dict(data="grid", latent=2, batch=128, n_critic=5, steps=2000, channels=(256, 256, 256), lr=1e-3,
             weight_clip=0.1, penalty=0.1, lr_end=0.1)


@entry
def main(argv=None):
    config, given = parse(Config, argv, __doc__)
    if config.resume:
        config = resumed(config, given, "gan", MAY_CHANGE)
    elif config.study:
        check("data" not in given, "--study is made on the grid; expected it without --data")
        set_defaults(config, given, **STUDY)
    check_flags(config)
    if config.study:
        return compare_losses(config)
    train(filled(config))


def train(config):
    """Trains one GAN and draws its figures; returns the numbers, or None when it was stopped before."""
    wasserstein = config.loss.startswith("wasserstein")
    run = Run(config, "gan")
    batches, shape, judge, description = load_data(config)
    sizes = GANConfig(shape, config.latent, widths(config, shape), config.leak, norm=not wasserstein)
    weights = torch.Generator().manual_seed(config.seed)
    net, disc = Generator(sizes, weights).to(run.device), Discriminator(sizes, weights).to(run.device)
    ema = EMA(net, config.ema)  # in eval mode; with --ema 0 it follows the weights without averaging
    optimiser, disc_optimiser = make_optimiser(net, config), make_optimiser(disc, config)
    run.track(net=net, disc=disc, ema=ema, optimiser=optimiser, disc_optimiser=disc_optimiser)
    run.print(f"{sum(p.numel() for p in net.parameters()):,} and {sum(p.numel() for p in disc.parameters()):,} "
              f"parameters, {description}")

    for step in run.steps():
        lr = learning_rate(step, config)
        if run.due(config.preview_every):
            preview(run, ema.net, judge)

        disc.requires_grad_(True)
        for update in range(step * config.n_critic, (step + 1) * config.n_critic):
            x, index, position = batches.get(update)
            x, position = x.to(run.device), position.to(run.device)
            with torch.no_grad():  # the critic's loss must not reach the generator
                fake = net(rng.normal(config.seed, update, position, (config.latent,)))
            if wasserstein:
                gap = gan.wasserstein(disc(x), disc(fake))
                loss = -gap
                run.note(gap=gap.detach())
                if config.loss == "wasserstein-gp":
                    share = rng.uniform(config.seed, rng.PENALTY, update, position)
                    loss = loss + config.penalty * gan.gradient_penalty(disc, x, fake, share)
            else:
                loss = -gan.value(disc(x), disc(fake))
            run.backward(loss, index)
            run.update(disc, disc_optimiser, lr)
            if config.loss == "wasserstein":
                gan.clip_weights(disc, config.weight_clip)

        disc.requires_grad_(False)
        fake = disc(net(rng.normal(config.seed, step, position, (config.latent,), rng.GENERATOR_LATENT)))
        if wasserstein:
            loss = -fake.mean()
        else:
            loss = gan.minimax(fake) if config.loss == "minimax" else gan.non_saturating(fake)
        loss.backward()
        run.update(net, optimiser, lr)
        ema.update(net)
        run.note(generator=loss.detach())
        run.log(step, lr)

    return finish(run, ema.net, judge) if run.finished else None


def load_data(config):
    """(batches, shape of a sample, judge, description) of the pictures or Gaussians that --data names."""
    if config.data in mixtures.NAMED:
        mixture = mixtures.load(config.data)
        batches = mixtures.Points(mixture, config.batch, config.seed)
        return batches, mixture.shape, PointJudge(mixture), f"{len(mixture.means)} Gaussians in the plane"
    training, held_out, held_out_name = datasets.load_splits(config.data, config.root, config.size, config.download,
                                                             config.seed)
    batches = Batches(training, config.batch, config.seed, workers=config.workers)
    return batches, training.shape, PictureJudge(config, training, held_out), (
        f"{len(training):,} training pictures of {training.shape}, {held_out_name} to judge by")


def make_optimiser(net, config):
    """RMSProp for clipped critics (Arjovsky et al. 2017, algorithm 1), else Adam (Gulrajani et al. 2017: without
    momentum)."""
    if config.loss == "wasserstein":
        return torch.optim.RMSprop(net.parameters(), lr=config.lr)
    betas = (0.0, 0.9) if config.loss == "wasserstein-gp" else (config.beta1, 0.999)
    return torch.optim.Adam(net.parameters(), lr=config.lr, betas=betas, fused=True)


# --- what came of it ------------------------------------------------------------------------------------------------

def preview(run, net, judge):
    """Pictures from the run's fixed noise and what is measured of them; warns when all are alike; saves the model."""
    save_model(net, run.folder / "model")
    x, numbers, line = judge.measure(net, run.step)
    run.record(step=run.step, **numbers)
    run.print(f"step {run.step}  {line}")
    if run.step and numbers["diversity"] < run.config.alike:
        run.print(f"warning: mode collapse: samples are {numbers['diversity']:.2f} times as far apart as real ones "
                  f"(warned of below --alike {run.config.alike})")
    if isinstance(judge, PointJudge):
        plots.save(mixtures.scatter(x, judge.mixture), run.path(f"previews/{run.step:08d}.png"))
        torch.save(x[:POINTS].clone(), run.path(f"previews/{run.step:08d}.pt"))
    else:
        plots.save(plots.grid(x[:64], scale=figures_gan.zoom(x)), run.path(f"previews/{run.step:08d}.png"))
        torch.save(x[:8].clone(), run.path(f"previews/{run.step:08d}.pt"))
    figures_gan.draw_curves(run)


def finish(run, net, judge):
    """The last preview, samples by step from the same noise (tables 2 and 3), and the verdict; returns it."""
    preview(run, net, judge)
    figures_gan.draw_steps(run, judge)
    if not isinstance(judge, PointJudge):
        x = generate(net, 100, run.config.seed + 1)
        plots.save(plots.grid(x, scale=figures_gan.zoom(x)), run.path("samples.png"))
    numbers = {"loss": run.config.loss, "steps": run.step, **judge.verdict(net, run.step)}
    write_text(run.path("judged.json"), json.dumps(numbers, indent=1) + "\n")
    if "the report's way" in numbers:
        fresh, theirs = numbers["fresh noise, eval mode"], numbers["the report's way"]
        run.print(f"{judge.n} samples of fresh noise: Frechet {fresh['frechet']:.2f} (floor "
                  f"{fresh['frechet_floor']:.2f}), recall {fresh['recall']:.3f} (floor {fresh['recall_floor']:.3f}), "
                  f"nearest training picture at {fresh['nearest_train']:.2f} (held-out pictures' "
                  f"{fresh['nearest_train_test']:.2f}) on {judge.extractor}; the same weights judged the "
                  f"report's way: {theirs['frechet']:.1f}")
    run.print(f"done: {run.folder}")
    return numbers


# --- four losses side by side ---------------------------------------------------------------------------------------

def compare_losses(config):
    """All four losses on the grid of 25 Gaussians, with --seeds seeds each: study.json, study.md and study.png."""
    folder, rows, numbers = free_folder(config.out, "gan-study"), [], {}
    for loss in LOSSES:
        numbers[loss], row = [], []
        for seed in range(config.seed, config.seed + config.seeds):
            one = dataclasses.replace(config, loss=loss, seed=seed, study=False, out=str(folder / f"{loss}-{seed}"))
            one = filled(one)
            found = train(one)
            if found is None:
                return
            numbers[loss].append({"seed": seed, "steps": one.steps, "n_critic": one.n_critic, **found["fresh noise"]})
            last = sorted((folder / f"{loss}-{seed}").glob("previews/*.pt"))[-1]
            row.append(mixtures.scatter(torch.load(last, weights_only=True), mixtures.load(config.data)))
        rows.append(row)
    seeds = [f"seed {one['seed']}" for one in numbers[loss]]
    plots.save(plots.sheet(rows, list(LOSSES), seeds, f"{POINTS:,} samples, 25 modes"), folder / "study.png")
    table = ["| loss | steps | modes covered of 25, by seed | fewest | samples within 3 deviations, by seed |",
             "|---|---|---|---|---|"]
    for loss, found in numbers.items():
        covered, quality = [one["covered"] for one in found], [f"{one['quality']:.1%}" for one in found]
        table.append(f"| {loss} | {found[0]['steps']} | {', '.join(map(str, covered))} | {min(covered)} | "
                     f"{', '.join(quality)} |")
    write_text(folder / "study.json", json.dumps(numbers, indent=1) + "\n")
    write_text(folder / "study.md", "\n".join(table) + "\n")
    print("\n".join(table) + f"\ndone: {folder}")


# --- flags ----------------------------------------------------------------------------------------------------------

def filled(config):
    """The config with every flag that was left at 0 or empty set to what its data and loss start from."""
    kind = "points" if config.data in mixtures.NAMED else config.data if config.data in START else ""
    start = {**START[kind], **LOSSES[config.loss]}
    named = {name: getattr(config, name) or start[name] for name in ("latent", "batch", "lr", "n_critic")}
    config = dataclasses.replace(config, **named, channels=config.channels or start.get("channels", ()))
    config.steps = config.steps or start["passes"] // (1 + config.n_critic)
    config.preview_every = config.preview_every or max(1, config.steps // 10)
    return config


def widths(config, shape):
    """--channels, or as many as bring the side down to 4, doubling up to 512."""
    if config.channels:
        return config.channels
    found, side = [], max(shape[1:])
    while side > 4 or not found:
        found.append(min(512, (32 if config.data == "mnist" else 64) * 2 ** len(found)))
        side = -(-side // 2)
    return tuple(found)


def check_flags(config):
    """Raises UserError for what a GAN does not do here, before anything is read or written."""
    count, precision = config.gradient_accumulation, config.mixed_precision
    check(processes() == 1, "a GAN trains in one process here; expected python, not torchrun")
    check(not (config.study and config.resume), "--study makes many runs; resume one of them by its own folder")
    check(count == 1, f"--gradient_accumulation is {count}; a GAN takes whole batches here, so expected 1")
    check(precision == "no", f"--mixed_precision is {precision}; a GAN trains in float32 here, so expected no")
    check(config.data not in mixtures.NAMED or not config.size, f"--size is for pictures, and --data {config.data} "
          "draws points; expected one of them")


if __name__ == "__main__":
    main()
