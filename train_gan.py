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

import copy
import dataclasses
import json
from dataclasses import dataclass

import torch

from nanodiff import plots, rng
from nanodiff.classifiers import digits, worlds as classifier
from nanodiff.data import images
from nanodiff.errors import check, nearest
from nanodiff.files import write_text
from nanodiff.flags import entry, parse, resumed, whole_numbers
from nanodiff.formats.model_folder import save_model
from nanodiff.metrics import agreement
from nanodiff.metrics.frechet import frechet_distance
from nanodiff.metrics.modes import diversity, modes_covered
from nanodiff.models import gan
from nanodiff.models.gan import Discriminator, GANConfig, Generator, generate
from nanodiff.training import datasets
from nanodiff.training.batches import Batches
from nanodiff.training.run import EMA, MAY_CHANGE, Run, RunConfig, free_folder
from nanodiff.worlds import mixtures


@dataclass
class Config(RunConfig):
    loss: str = "non-saturating"  # minimax, non-saturating, wasserstein or wasserstein-gp (with a gradient penalty)
    data: str = "mnist"  # mnist, cifar10, dtd, worlds or woven (drawn), a folder or volumes; ring or grid: Gaussians
    root: str = ""  # where the files of a named data set lie (default: the repository's data folder)
    download: bool = False  # fetch cifar10 or dtd when it is not there
    size: int = 0  # side of the pictures in pixels (0: the data's own)
    latent: int = 0  # numbers in a latent (0: 64 for mnist, 2 for ring and grid, else 256)
    channels: str = ""  # widths from half the side down (default: doubling from 64, or 32 for mnist, to a side of 4)
    leak: float = 0.2  # slope below 0 of the judge's activation (0: the report's ReLU)
    n_critic: int = 0  # updates of the discriminator or critic before the generator's (0: 1, or 5 for Wasserstein)
    weight_clip: float = 0.01  # largest weight of the critic (--loss wasserstein)
    penalty: float = 10.0  # weight of the gradient penalty (--loss wasserstein-gp)
    beta1: float = 0.5  # decay of Adam's mean gradient (minimax and non-saturating; 0 for wasserstein-gp)
    judged: int = 1000  # samples judged at each preview (2,500 of ring and grid)
    alike: float = 0.5  # samples less than this share as far apart as real pictures are called collapsed
    study: bool = False  # all four losses on the grid, --seeds times, in one folder
    seeds: int = 3  # of --study
    steps: int = 0  # updates of the generator (0: for all losses about as much work, see START)
    batch: int = 0  # pictures a batch (0: 64 for mnist, 256 for ring and grid, else 32)
    lr: float = 0.0  # learning rate of both (0: 2e-4; 5e-5 for wasserstein, 1e-4 for wasserstein-gp)
    warmup: int = 0  # updates of linear learning-rate warm-up
    lr_end: float = 1.0  # last learning rate as a share of the peak, reached along a cosine (1: constant)
    clip: float = 0.0  # largest gradient norm (0: no clipping)
    ema: float = 0.0  # decay of the generator's averaged weights, which are then what is judged (0: no averaging)
    preview_every: int = 0  # steps between pictures and judgements (0: a tenth of --steps)
    checkpoint_every: int = 1000  # steps between checkpoints


# What the data and the loss start from where no flag says otherwise. `passes` is updates of both networks together.
START = {"mnist": dict(latent=64, batch=64, passes=6000), "": dict(latent=256, batch=32, passes=15_600),
         "points": dict(latent=2, batch=256, passes=6000, channels="128,128,128")}
LOSSES = {"minimax": dict(lr=2e-4, n_critic=1), "non-saturating": dict(lr=2e-4, n_critic=1),
          "wasserstein": dict(lr=5e-5, n_critic=5), "wasserstein-gp": dict(lr=1e-4, n_critic=5)}
# --study gives all four the same networks and as many updates of both: a critic that is trained nearly to its best is
# what the Wasserstein losses need and what leaves the minimax generator without a slope.
STUDY = dict(data="grid", latent=2, batch=128, n_critic=5, steps=2000, channels="256,256,256", lr=1e-3, weight_clip=0.1,
             penalty=0.1, lr_end=0.1)
POINTS = 2500  # samples of a mixture that are looked at (Srivastava et al. 2017)
DIGITS, READER = "the digit reader's 64 features", "the worlds' reader's 128 features"


@entry
def main(argv=None):
    config, given = parse(Config, argv, __doc__)
    if config.resume:
        config = resumed(config, given, "gan", MAY_CHANGE)
    else:
        check(not config.study or "data" not in given, "--study is made on the grid; expected it without --data")
        for name, start in STUDY.items() if config.study else ():
            if name not in given:
                setattr(config, name, start)
    check_flags(config)
    if config.study:
        return compare_losses(config)
    train(filled(config))


def train(config):
    """Trains one GAN and draws its figures; returns the numbers, or None when it was stopped before."""
    wasserstein = config.loss.startswith("wasserstein")
    run = Run(config, "gan")
    check(run.world == 1, "a GAN trains in one process here; expected python, not torchrun")
    if config.data in mixtures.NAMED:
        mixture = mixtures.load(config.data)
        shape, batches = mixture.shape, mixtures.Points(mixture, config.batch, config.seed)
        judge, told = PointJudge(mixture), f"{len(mixture.means)} Gaussians in the plane"
    else:
        training, held_out, held_out_name = datasets.both(config.data, config.root, config.size, config.download,
                                                          config.seed)
        shape = training.shape
        batches = Batches(training, config.batch, config.seed, workers=config.workers)
        judge = PictureJudge(config, training, held_out)
        told = f"{len(training):,} training pictures of {shape}, {held_out_name} to judge by"
    sizes = GANConfig(shape, config.latent, widths(config, shape), config.leak, norm=not wasserstein)
    weights = torch.Generator().manual_seed(config.seed)
    net, disc = Generator(sizes, weights).to(run.device), Discriminator(sizes, weights).to(run.device)
    ema = EMA(net, config.ema)  # in eval mode; with --ema 0 it follows the weights without averaging
    optimiser, disc_optimiser = make_optimiser(net, config), make_optimiser(disc, config)
    run.track(net=net, disc=disc, ema=ema, optimiser=optimiser, disc_optimiser=disc_optimiser)
    run.print(f"{sum(p.numel() for p in net.parameters()):,} and {sum(p.numel() for p in disc.parameters()):,} "
              f"parameters, {told}")

    for step in run.steps():
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
                    share = rng.uniform(config.seed, 7, update, position)
                    loss = loss + config.penalty * gan.gradient_penalty(disc, x, fake, share)
            else:
                loss = -gan.value(disc(x), disc(fake))
            run.backward(loss, index)
            run.update(disc, disc_optimiser)
            if config.loss == "wasserstein":
                gan.clip_weights(disc, config.weight_clip)

        disc.requires_grad_(False)
        fake = disc(net(rng.normal(config.seed, step, position, (config.latent,), stream=1)))
        if wasserstein:
            loss = -fake.mean()
        else:
            loss = gan.minimax(fake) if config.loss == "minimax" else gan.non_saturating(fake)
        loss.backward()
        run.update(net, optimiser, ema)
        run.note(generator=loss.detach())
        run.log(step)

    return finish(run, ema.net, judge) if run.finished else None


def make_optimiser(net, config):
    """RMSProp for clipped critics (Arjovsky et al. 2017, algorithm 1), else Adam (Gulrajani et al. 2017: without
    momentum)."""
    if config.loss == "wasserstein":
        return torch.optim.RMSprop(net.parameters(), lr=config.lr)
    betas = (0.0, 0.9) if config.loss == "wasserstein-gp" else (config.beta1, 0.999)
    return torch.optim.Adam(net.parameters(), lr=config.lr, betas=betas, fused=True)


# --- judging --------------------------------------------------------------------------------------------------------

class PictureJudge:
    """What is measured of samples, beside real pictures: read once, since they are asked for at every preview."""

    def __init__(self, config, training, held_out):
        self.config, self.training, self.held_out = config, training, held_out
        self.n = min(config.judged, len(held_out), len(training))
        check(self.n >= 6, f"the pictures of {config.data} and --judged {config.judged} leave {self.n} to judge by; "
              "expected 6 or more of each")
        self.digits = config.data == "mnist" and training.shape == (1, 28, 28)
        self.reader = digits.load_digit_reader() if self.digits else classifier.load_reader()
        self.extractor = DIGITS if self.digits else READER
        rows = torch.Generator().manual_seed(config.seed)
        real, train = (some(one, torch.randperm(len(one), generator=rows)[:self.n]) for one in (held_out, training))
        self.real, self.train, self.near = self.read(real), self.read(train), real[:256]

    def read(self, x):
        """Features [n, 64 or 128] of pictures."""
        return digits.read_all(self.reader, x)[0] if self.digits else classifier.read_all(self.reader, x).features

    def measure(self, net, step):
        """(samples, numbers, one line): Frechet distance, precision and recall with their floors, and diversity."""
        x = generate(net, self.n, self.config.seed)
        numbers = agreement.compare(self.read(x), self.real, self.train)
        numbers |= {"diversity": diversity(x[:256], self.near), "frechet_sixteen": self.report_way(net, step)}
        line = ("Frechet {frechet:.2f} (floor {frechet_floor:.2f}; the report's way {frechet_sixteen:.1f}), precision "
                "{precision:.3f} (floor {precision_floor:.3f}), recall {recall:.3f} (floor {recall_floor:.3f}), {n} "
                "samples on {extractor}; {diversity:.2f} times as far apart as real ones")
        return x, numbers, line.format(n=self.n, extractor=self.extractor, **numbers)

    @torch.no_grad()
    def report_way(self, net, step):
        """The Frechet distance as the report's notebook takes it: sixteen latents, again and again, through a generator
        in train mode, against training pictures."""
        net = copy.deepcopy(net).train()  # its batch statistics must not reach the model
        latents = rng.normal(self.config.seed, step, torch.arange(16), (net.config.latent,), stream=5)
        x = net(latents.to(next(net.parameters()).device)).cpu()
        return frechet_distance(self.read(x).repeat(-(-self.n // 16), 1)[:self.n], self.train)

    def verdict(self, net, step):
        """All that is said of the final weights: fresh noise in eval mode, and beside it the report's way."""
        x = generate(net, self.n, self.config.seed + 1)
        if self.digits:
            found = agreement.judge_digits(x, self.held_out.pixels, self.training.pixels, self.reader)
        else:
            real, train = (some(one, images.spread(one, most)) for one, most in ((self.held_out, 2000),
                                                                               (self.training, 10_000)))
            found = agreement.judge(x, real, train, self.reader)
        return {"extractor": self.extractor, "fresh noise, eval mode": found, "the report's way": {
            "latents": 16, "mode": "train", "n": self.n, "against": "training pictures",
            "frechet": self.report_way(net, step), "five other draws": [
                self.report_way(net, step + draw) for draw in range(1, 6)]}}


class PointJudge:
    """What is measured of samples of a mixture, whose modes are known."""

    def __init__(self, mixture):
        self.mixture = mixture
        self.real = mixture.points(-1, 0, torch.arange(POINTS))

    def measure(self, net, step):
        """(samples, numbers, one line): modes covered, share of samples within 3 deviations of one, diversity."""
        x = generate(net, POINTS, 0, batch=POINTS)
        numbers = modes_covered(x, self.mixture.means, self.mixture.deviation)
        numbers["diversity"] = diversity(x[:256], self.real[:256])
        line = "{covered} of {modes} modes covered, {quality:.1%} of {n:,} samples within 3 deviations of one"
        return x, numbers, line.format(**numbers)

    def verdict(self, net, step):
        """The numbers for fresh noise, and for points of the mixture itself."""
        x = generate(net, POINTS, 1, batch=POINTS)
        found = modes_covered(x, self.mixture.means, self.mixture.deviation)
        return {"fresh noise": found, "the mixture itself": modes_covered(self.real, self.mixture.means,
                                                                         self.mixture.deviation)}


def some(pictures_of, rows):
    """The pictures at places rows int64 [n] of a data set."""
    return torch.cat([pictures_of.read(part, part) for part in rows.split(250)])


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
        plots.save(plots.grid(x[:64], scale=zoom(x)), run.path(f"previews/{run.step:08d}.png"))
        torch.save(x[:8].clone(), run.path(f"previews/{run.step:08d}.pt"))
    draw_curves(run)


def draw_curves(run):
    """figure16 or figure19 (losses and Frechet distance over steps) and figure17 (are samples all alike?)."""
    number, history = 19 if run.config.loss.startswith("wasserstein") else 16, run.history
    losses = {"discriminator": history("loss"), "generator": history("generator"), "Wasserstein gap": history("gap")}
    pages = [plots.curves({name: line for name, line in losses.items() if line[0]}, run.config.loss, "step", "loss")]
    if history("frechet")[0]:
        lines = {"fresh noise": history("frechet"), "the report's way": history("frechet_sixteen"),
                 "floor (training pictures)": history("frechet_floor")}
        pages.append(plots.curves(lines, "Frechet distance", "step", log_y=True))
    else:
        pages.append(plots.curves({"modes covered": history("covered")}, "modes covered", "step"))
        pages.append(plots.curves({"quality": history("quality")}, "share within 3 deviations", "step"))
    plots.save(plots.stack(pages), run.path(f"figures/figure{number}_losses.png"))
    steps, values = history("diversity")
    lines = {"samples": (steps, values), "real": (steps, [1.0] * len(steps)),
             "warned of below": (steps, [run.config.alike] * len(steps))}
    plots.save(plots.curves(lines, "How far samples are apart, real ones = 1", "step"),
               run.path("figures/figure17_collapse.png"))


def finish(run, net, judge):
    """The last preview, samples by step from the same noise (tables 2 and 3), and the verdict; returns it."""
    preview(run, net, judge)
    files = sorted(run.folder.glob("previews/*.pt"))
    files = [files[i] for i in sorted({round(i / 7 * (len(files) - 1)) for i in range(8)})]
    drawn = [torch.load(file, weights_only=True) for file in files]
    labels = [f"step {int(file.stem)}" for file in files]
    number = 3 if run.config.loss.startswith("wasserstein") else 2
    if isinstance(judge, PointJudge):
        page = plots.sheet([[mixtures.scatter(x, judge.mixture) for x in drawn]], None, labels, run.config.loss)
    else:
        page = plots.sheet([list(x) for x in drawn], labels, title=f"{run.config.loss}: the same noise as training "
                           "goes on", scale=zoom(drawn[0]))
        plots.save(plots.grid(generate(net, 100, run.config.seed + 1), scale=zoom(drawn[0])),
                   run.path("samples.png"))
    plots.save(page, run.path(f"figures/table{number}_samples.png"))
    numbers = {"loss": run.config.loss, "steps": run.step, **judge.verdict(net, run.step)}
    write_text(run.path("judged.json"), json.dumps(numbers, indent=1) + "\n")
    if "the report's way" in numbers:
        found, theirs = numbers["fresh noise, eval mode"], numbers["the report's way"]
        run.print(f"{judge.n} samples of fresh noise: Frechet {found['frechet']:.2f} (floor "
                  f"{found['frechet_floor']:.2f}), recall {found['recall']:.3f} (floor {found['recall_floor']:.3f}), "
                  f"nearest training picture at {found['nearest_train']:.2f} (held-out pictures' "
                  f"{found['nearest_train_test']:.2f}) on {judge.extractor}; the same weights judged the "
                  f"report's way: {theirs['frechet']:.1f}")
    run.print(f"done: {run.folder}")
    return numbers


def zoom(x):
    """How many screen pixels a pixel of x [B, C, H, W] is drawn with."""
    return max(1, round(56 / x.shape[2]))


# --- four losses side by side ---------------------------------------------------------------------------------------

def compare_losses(config):
    """All four losses on the grid of 25 Gaussians, with --seeds seeds each: study.json, study.md and study.png."""
    check(not config.resume, "--study makes many runs; resume one of them by its own folder")
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
    config = dataclasses.replace(config, **named, channels=config.channels or start.get("channels", ""))
    config.steps = config.steps or start["passes"] // (1 + config.n_critic)
    config.preview_every = config.preview_every or max(1, config.steps // 10)
    return config


def widths(config, shape):
    """--channels as numbers, or as many as bring the side down to 4, doubling up to 512."""
    if config.channels:
        return whole_numbers("--channels", config.channels)
    found, side = [], max(shape[1:])
    while side > 4 or not found:
        found.append(min(512, (32 if config.data == "mnist" else 64) * 2 ** len(found)))
        side = -(-side // 2)
    return tuple(found)


def check_flags(config):
    """Raises UserError for every flag whose value alone is wrong, before anything is read or written."""
    check(config.loss in LOSSES, f'--loss "{config.loss}" is unknown; expected {", ".join(LOSSES)}'
          + nearest(config.loss, LOSSES))
    for name, least in dict(size=0, latent=0, leak=0, n_critic=0, penalty=0, judged=6, alike=0, seeds=1, steps=0,
                            batch=0, lr=0, preview_every=0).items():
        check(getattr(config, name) >= least, f"--{name} is {getattr(config, name)}; expected {least} or more")
    check(config.weight_clip > 0, f"--weight_clip is {config.weight_clip}; expected a number above 0, such as 0.01")
    check(0 <= config.beta1 < 1, f"--beta1 is {config.beta1}; expected 0 <= decay < 1, such as 0.5")
    check(config.accumulate == 1, f"--accumulate is {config.accumulate}; a GAN takes whole batches here, so expected 1")
    check(config.precision == "fp32", f"--precision is {config.precision}; a GAN trains in fp32 here")
    check(config.data not in mixtures.NAMED or not config.size, f"--size is for pictures, and --data {config.data} "
          "draws points; expected one of them")
    if config.channels:
        whole_numbers("--channels", config.channels)


if __name__ == "__main__":
    main()
