"""The model of any family from its run, as something that draws: for `nanodiff.sample` and `nanodiff.report.trilemma`.

    model = load("runs/gan-001")
    x = model.draw(16, seed=0)                # [16, C, H, W] in [-1, 1]; picture i depends on the seed and i alone

Reads finished runs of train_autoencoder.py, train_vae.py, train_vqgan.py, train_gan.py and train_ddpm.py, or their model/
folders.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from nanodiff.errors import UserError, check, nearest
from nanodiff.files import read_json
from nanodiff.formats.model_folder import load_model
from nanodiff.models import autoencoder, gan, vae
from nanodiff.pipelines import ddpm, vqgan

GANS = {"minimax": "GAN (minimax)", "non-saturating": "GAN", "wasserstein": "WGAN", "wasserstein-gp": "WGAN-GP"}


@dataclass
class Model:
    """name: its family; shape: (C, H, W) of its pictures, or (d,) of points; draw(n, seed, first=0): pictures
    first ... first+n-1 of a seed, [n, *shape] in [-1, 1], on the CPU; networks: modules that run once for each call of a
    network; how: the way to new pictures, in words; run: where it came from."""
    name: str
    shape: tuple
    draw: callable
    networks: tuple
    how: str
    run: str = ""


@dataclass
class Options:
    """How to draw: sampler and steps of a DDPM; temperature of a GPT's codes and label, the name or number of the class
    that they are of ("": all in turn); root: where the training data of an autoencoder lie (default: where its run found
    them)."""
    sampler: str = "dpm++2m"
    steps: int = 25
    temperature: float = 1.0
    label: str = ""
    root: str = ""


def load(path, options=None, device="cpu"):
    """The Model in a run folder or its model/; UserError when there is none that draws."""
    inside, settings, kind = Path(path), {}, kind_of(path)
    if (inside / "model").is_dir():
        inside = inside / "model"
        settings = read_json(path, "config.json") if (Path(path) / "config.json").is_file() else {}  # the run's flags
    if kind == "VQVAE":
        raise UserError(f"{path} holds a VQ-VAE, which draws no new pictures without a GPT that writes its codes; "
                        f"expected a run of: python train_vqgan.py --autoencoder {path}")
    check(kind in FAMILIES, f"{path} holds {f'a {kind}' if kind else 'no model'}; expected a finished run of "
          "train_autoencoder.py, train_vae.py, train_vqgan.py, train_gan.py or train_ddpm.py")
    model = FAMILIES[kind](inside, settings, options or Options(), device)
    model.run = Path(path).name
    return model


def kind_of(path):
    """What a run folder, or its model/, says it holds, such as "VAE"; None when it says nothing. UserError for no folder."""
    check(str(path) and Path(path).is_dir(), f"{path or '(nothing)'} is no folder; expected a finished run such as runs/"
          f"vae-001{nearest(Path(path).name, [one.name for one in neighbours(path)])}")
    folder = Path(path) / "model" if (Path(path) / "model").is_dir() else Path(path)
    if (folder / "unet" / "config.json").is_file():
        return "DDPM" if (folder / "nanodiff.json").is_file() else "UNet without its pictures' shape"
    names = [name for name in ("config.json", "nanodiff.json") if (folder / name).is_file()]
    return read_json(folder, names[0]).get("model") if names else None


def neighbours(path):
    """The folders beside `path`."""
    return [one for one in Path(path).parent.iterdir() if one.is_dir()] if Path(path).parent.is_dir() else []


def class_number(label, classes):
    """The number of a class that --label names or counts."""
    known = [*classes, *map(str, range(len(classes)))]
    check(label in known, f'--label "{label}" is none of the model\'s classes ({", ".join(classes) or "it has none"})'
          + nearest(label, known))
    return known.index(label) % len(classes)


# Each loader: the Model of a model folder; settings: its run's flags, {} where they are not known.

def load_autoencoder(folder, settings, options, device):
    """An autoencoder, given a prior that it was not trained with: a Gaussian fitted to its latents."""
    from nanodiff.data import images  # not above: loading Stable Diffusion imports this file, and needs no pictures
    from nanodiff.training import datasets
    net = load_model(folder, autoencoder.Autoencoder, autoencoder.AutoencoderConfig).to(device)
    name = settings.get("data") or ("mnist" if net.config.shape == (1, 28, 28) else "")
    check(name, f"{folder} does not say what it was trained on, and new pictures of an autoencoder need a Gaussian fitted to "
          "latents of training pictures; expected the folder of its run")
    training = datasets.load(name, "train", flip=False, root=options.root or settings.get("root") or None,
                             size=net.config.shape[1:], channels=net.config.shape[0])
    some = images.spread(training, 10_000)
    z = torch.cat([net.encode(training.read(rows, rows).to(device)).cpu() for rows in some.split(500)])
    fit = autoencoder.fit_gaussian(z)

    def draw(n, seed, first=0):
        return autoencoder.generate(net, fit, n, seed, first)
    return Model("autoencoder", net.config.shape, draw, (net.decoder,), f"a Gaussian fitted to the latents of {len(z):,} "
                 "training pictures, decoded: nothing in its training asks for that")


def load_vae(folder, settings, options, device):
    """A VAE: its prior, decoded."""
    net = load_model(folder, vae.VAE, vae.VAEConfig).to(device)

    def draw(n, seed, first=0):
        return vae.generate(net, n, seed, first)
    return Model("VAE", net.config.shape, draw, (net.decoder,), "N(0, 1) decoded, means of the levels")


def load_gan(folder, settings, options, device):
    """The generator of any of train_gan.py's losses, named by the loss when the run says which."""
    net = load_model(folder, gan.Generator, gan.GANConfig).to(device)

    def draw(n, seed, first=0):
        return gan.generate(net, n, seed, first)
    return Model(GANS.get(settings.get("loss"), "GAN"), net.config.shape, draw, (net.net,), "N(0, 1) through the generator, "
                 "in eval mode")


def load_vqgan(folder, settings, options, device):
    """A VQGAN with its GPT, or a VQ-VAE that train_vqgan.py gave one."""
    model = vqgan.load(folder, device)
    judged = settings.get("adversarial", 1) and not settings.get("autoencoder")
    number = class_number(options.label, model.classes) if options.label else None

    def draw(n, seed, first=0):
        label = None if number is None else torch.full((n,), number)
        return model.generate(n, seed, label, options.temperature, first=first)
    return Model("VQGAN + GPT" if judged else "VQ-VAE + GPT", model.shape, draw, (model.gpt.head, model.autoencoder.decoder),
                 f"codes written one by one at temperature {options.temperature:g}, "
                 + (f"all of class {options.label}" if options.label else "all classes in turn"))


def load_ddpm(folder, settings, options, device):
    """A DDPM with the sampler and steps of the options."""
    model = ddpm.load(folder, device=device)
    check(options.steps <= model.schedule.T, f"--steps is {options.steps}; expected 1 to the schedule's "
          f"{model.schedule.T}")

    def draw(n, seed, first=0):
        return model.generate(n, options.sampler, options.steps, seed, first=first).clamp(-1, 1)
    return Model("DDPM", model.shape, draw, (model.net,), f"{options.sampler}, {options.steps} steps")


FAMILIES = {"Autoencoder": load_autoencoder, "VAE": load_vae, "Generator": load_gan, "VQGAN": load_vqgan,
            "DDPM": load_ddpm}
