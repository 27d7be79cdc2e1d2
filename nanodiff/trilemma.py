"""Every family of generative models on the same digits: good pictures, all kinds of them, fast. Who has which two?

    python -m nanodiff.trilemma --models runs/autoencoder-001,runs/vae-001,runs/vqgan-001,runs/gan-001,runs/ddpm-001
    python -m nanodiff.trilemma --models runs/ddpm-001 --sampler ddim --steps 50

Reads finished runs on MNIST of train_autoencoder.py, train_vae.py, train_vqgan.py, train_gan.py and train_ddpm.py (or
their model/ folders), draws as many samples of each, and writes trilemma.md, trilemma.json and trilemma.png, a row of
samples for each. Training digits go through the same as the first row: what a model cannot be expected to pass.
Source: Xiao et al. 2022 (arXiv 2112.07804), figure 1; report section 2.2.2 and figure 23.
"""

import json
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from . import data, ddpm, pictures
from .checkpoint import write_text
from .diffusion import samplers
from .errors import UserError, nearest
from .files import read_json
from .flags import check, check_folder, entry, parse
from .formats import vqgan_folder
from .formats.model_folder import load_model
from .machine import pick_device
from .metrics import digits
from .models import autoencoder, gan, vae
from .run import free_folder

SHAPE = (1, 28, 28)
GANS = {"minimax": "GAN (minimax)", "non-saturating": "GAN", "wasserstein": "WGAN", "wasserstein-gp": "WGAN-GP"}
SEEN = 0.01  # share of the samples from which on a digit counts as one that the model draws


@dataclass
class Config:
    models: str = ""  # folders of finished runs on mnist, with commas between them
    n: int = 1000  # samples of each
    sampler: str = "dpm++2m"  # of DDPMs
    steps: int = 25  # its steps
    temperature: float = 1.0  # of a GPT's codes
    seed: int = 1  # of the samples
    root: str = ""  # where mnist lies (default: the repository's data folder)
    device: str = "auto"  # cpu, cuda or cuda:1; auto takes a GPU when there is one
    out: str = ""  # folder of the table (default: the next free runs/trilemma-001, -002, ...)


@dataclass
class Model:
    """name: its family; run: where it came from; draw(n, seed): pictures [n, 1, 28, 28] in [-1, 1], on the CPU;
    networks: modules that run once for each call of a network; how: the way to new pictures, in words."""
    name: str
    run: str
    draw: callable
    networks: tuple
    how: str


@entry
def main(argv=None):
    """Draws from every model, judges and times the samples, and prints, writes and draws the table."""
    config, _ = parse(Config, argv, __doc__)
    check(config.models, "--models is missing; expected folders of finished runs with commas between, such as "
          "runs/vae-001,runs/gan-001")
    check(config.n >= 6, f"--n is {config.n}; expected 6 samples or more")
    check(config.sampler in samplers.by_name, f'--sampler "{config.sampler}" is unknown; expected one of '
          f"{', '.join(samplers.by_name)}{nearest(config.sampler, samplers.by_name)}")
    for name, least in dict(steps=1, temperature=0).items():
        check(getattr(config, name) >= least, f"--{name} is {getattr(config, name)}; expected {least} or more")
    check_folder("--out", config.out or ".")
    device, reader = pick_device(config.device), digits.load_digit_reader()
    training, held_out = (data.load("mnist", split, root=config.root or None) for split in ("train", "test"))
    models = [real_digits(training), *(load(path, config, training, device) for path in config.models.split(","))]
    folder = free_folder(config.out, "trilemma")
    folder.mkdir(parents=True, exist_ok=True)

    rows, drawn = [], []
    for model in models:
        calls, seconds, x = timed(model, config)
        rows.append({"family": model.name, "run": model.run, "how": model.how, "calls": calls, "seconds": seconds,
                     **measure(x, held_out, training, reader)})
        drawn.append(list(x[:20]))
        print(f"{model.name} ({model.run}): {sentence(rows[-1])}", flush=True)
    page = table(rows, f"{device}, {torch.get_num_threads()} threads, batches of up to 250")
    print(page)
    write_text(folder / "trilemma.json", json.dumps(rows, indent=1) + "\n")
    write_text(folder / "trilemma.md", page + "\n")
    pictures.save(pictures.sheet(drawn, [f"{model.name} ({model.run})" for model in models], scale=2),
                  folder / "trilemma.png")
    print(f"done: {folder}")


# --- the families ---------------------------------------------------------------------------------------------------

def real_digits(training):
    """Training digits as if a model had drawn them."""
    def draw(n, seed):
        rows = torch.randperm(len(training), generator=torch.Generator().manual_seed(seed))[:n]
        return training.read(rows, rows)
    return Model("training digits", "data", draw, (), "drawn without repetition")


def load(path, config, training, device):
    """The Model in a run folder or its model/; UserError when there is none that draws digits of 28x28."""
    check(Path(path).is_dir(), f"--models: {path or '(nothing)'} is no folder; expected a finished run such as runs/"
          f"vae-001{nearest(Path(path).name, [one.name for one in neighbours(path)])}")
    inside = Path(path) / "model" if (Path(path) / "model").is_dir() else Path(path)
    kind, settings = kind_of(inside), {}
    if inside != Path(path) and (Path(path) / "config.json").is_file():
        settings = read_json(path, "config.json")  # the run's flags
    found = FAMILIES[kind](inside, settings, config, training, device) if kind in FAMILIES else None
    if kind == "VQVAE":
        raise UserError(f"{path} holds a VQ-VAE, which draws no new pictures without a GPT that writes its codes; "
                        f"expected a run of: python train_vqgan.py --autoencoder {path}")
    check(found, f"{path} holds {f'a {kind}' if kind else 'no model'}; expected a finished run on mnist of "
          "train_autoencoder.py, train_vae.py, train_vqgan.py, train_gan.py or train_ddpm.py")
    model, shape = found
    check(tuple(shape) == SHAPE, f"{path} draws {' x '.join(map(str, shape))}; expected a model of mnist's 1 x 28 x 28")
    model.run = Path(path).name
    return model


def neighbours(path):
    """The folders beside `path`."""
    return [one for one in Path(path).parent.iterdir() if one.is_dir()] if Path(path).parent.is_dir() else []


def kind_of(folder):
    """What a model folder says it holds, such as "VAE"; None when it says nothing."""
    if (folder / "unet" / "config.json").is_file():
        return "DDPM" if (folder / "nanodiff.json").is_file() else "UNet without its pictures' shape"
    names = [name for name in ("config.json", "nanodiff.json") if (folder / name).is_file()]
    return read_json(folder, names[0]).get("model") if names else None


# Each loader: (Model, shape of its pictures) of a model folder; settings: its run's flags, {} where they are not known.

def load_autoencoder(folder, settings, config, training, device):
    """An autoencoder, given a prior that it was not trained with: a Gaussian fitted to its latents."""
    net = load_model(folder, autoencoder.Autoencoder, autoencoder.AutoencoderConfig).to(device)
    if net.config.shape != SHAPE:
        return None, net.config.shape
    some = data.spread(training, 10_000)
    z = torch.cat([net.encode(training.read(rows, rows).to(device)).cpu() for rows in some.split(500)])
    fit = autoencoder.fit_gaussian(z)

    def draw(n, seed):
        return autoencoder.generate(net, fit, n, seed)
    return Model("autoencoder", "", draw, (net.decoder,), f"a Gaussian fitted to the latents of {len(z):,} training "
                 "digits, decoded: nothing in its training asks for that"), SHAPE


def load_vae(folder, settings, config, training, device):
    """A VAE: its prior, decoded."""
    net = load_model(folder, vae.VAE, vae.VAEConfig).to(device)
    return Model("VAE", "", lambda n, seed: vae.generate(net, n, seed), (net.decoder,), "N(0, 1) decoded, means of the "
                 "levels"), net.config.shape


def load_gan(folder, settings, config, training, device):
    """The generator of any of train_gan.py's losses, named by the loss when the run says which."""
    net = load_model(folder, gan.Generator, gan.GANConfig).to(device)
    name = GANS.get(settings.get("loss"), "GAN")
    return Model(name, "", lambda n, seed: gan.generate(net, n, seed), (net.net,), "N(0, 1) through the generator, in "
                 "eval mode"), net.config.shape


def load_vqgan(folder, settings, config, training, device):
    """A VQGAN with its GPT, or a VQ-VAE that train_vqgan.py gave one."""
    model = vqgan_folder.load(folder, device)
    judged = settings.get("adversarial", 1) and not settings.get("autoencoder")

    def draw(n, seed):
        return model.generate(n, seed, temperature=config.temperature)
    return Model("VQGAN + GPT" if judged else "VQ-VAE + GPT", "", draw, (model.gpt.head, model.autoencoder.decoder),
                 f"codes written one by one at temperature {config.temperature:g}, all classes in turn"), model.shape


def load_ddpm(folder, settings, config, training, device):
    """A DDPM with the sampler and steps of the flags."""
    model = ddpm.load(folder, device=device)
    check(config.steps <= model.schedule.T, f"--steps is {config.steps}; expected 1 to the schedule's "
          f"{model.schedule.T}")

    def draw(n, seed):
        return model.generate(n, config.sampler, config.steps, seed).clamp(-1, 1)
    return Model("DDPM", "", draw, (model.net,), f"{config.sampler}, {config.steps} steps"), model.shape


FAMILIES = {"Autoencoder": load_autoencoder, "VAE": load_vae, "Generator": load_gan, "VQGAN": load_vqgan,
            "DDPM": load_ddpm}


# --- measuring ------------------------------------------------------------------------------------------------------

def timed(model, config):
    """(calls of networks for one batch, seconds an image, the pictures); a batch of 2 warms up and is counted."""
    calls = []
    hooks = [net.register_forward_pre_hook(lambda *_: calls.append(1)) for net in model.networks]
    model.draw(2, config.seed)
    for hook in hooks:
        hook.remove()
    started = time.perf_counter()
    x = model.draw(config.n, config.seed)  # on the CPU: what a GPU was asked for is there
    return len(calls), (time.perf_counter() - started) / len(x), x


def measure(x, held_out, training, reader):
    """What the digit reader says of samples x, as `digits.judge_digits`, and `seen`: how many of the ten digits are
    drawn at all."""
    found = digits.judge_digits(x, held_out.pixels, training.pixels, reader)
    return {**found, "seen": sum(share >= SEEN for share in found["digit_shares"])}


def sentence(row):
    """One model's numbers in a line."""
    return ("{digit_share:.1%} read as a digit, Frechet {frechet:.2f} (floor {frechet_floor:.2f}), recall {recall:.3f} "
            "(floor {recall_floor:.3f}), rarest digit {smallest_digit_share:.1%}, n = {n}".format(**row)
            + f", {1000 * row['seconds']:.2f} ms an image")


def table(rows, machine):
    """All models as a Markdown table, with what its columns mean and who is first in each corner."""
    first, models = rows[0], rows[1:]
    lines = ["| family | run | read as a digit | Frechet | kernel | precision | recall | digits drawn, rarest | "
             "copies | calls | ms an image |", "|" + "---|" * 11]
    for row in rows:
        lines.append("| {family} | {run} | {digit_share:.1%} | {frechet:.2f} | {kernel:.2f} | {precision:.3f} | "
                     "{recall:.3f} | {seen}, {smallest_digit_share:.1%} | {copies} | {calls} | {ms} |".format(
                         **row, copies="-" if row is first else f"{row['copied_share']:.1%}",
                         ms="-" if row is first else f"{1000 * row['seconds']:.2f}"))
    best = {"quality (Frechet)": min(models, key=lambda row: row["frechet"]),
            "coverage (recall)": max(models, key=lambda row: row["recall"]),
            "speed": min(models, key=lambda row: row["seconds"])}
    lines += ["", f"{first['n']:,} samples each against {first['compared']:,} test digits on the digit reader's 64 "
              f"features (not FID, not KID); floors, training against test digits: Frechet {first['frechet_floor']:.2f}"
              f", kernel {first['kernel_floor']:.2f}, recall {first['recall_floor']:.3f}. Read as a digit: with "
              f"probability 0.9 or more. Digits drawn: of ten, those with {SEEN:.0%} of the samples. Speed: {machine}.",
              "", "First in " + ", ".join(f"{corner}: {row['family']} ({row['run']})" for corner, row in best.items())
              + ".", "",
              *(f"- {row['family']} ({row['run']}): {row['how']}" for row in models)]
    return "\n".join(lines)


if __name__ == "__main__":
    main()
