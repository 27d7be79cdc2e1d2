"""Draw pictures from a trained model.

    python -m nanodiff.sample --model runs/ddpm-001 --n 64 --sampler dpm++2m --steps 25
    python -m nanodiff.sample --model runs/ddpm-001 --image digit.png --strength 0.5     change a picture (SDEdit)

Writes a grid and the single pictures; each PNG's text holds the parameters that made it.
"""

from dataclasses import dataclass
from pathlib import Path

import torch

from . import ddpm, pictures
from .data import images
from .errors import nearest
from .flags import check, entry, parse
from .run import pick_device


@dataclass
class Config:
    model: str = ""  # a run of train_ddpm.py, its model folder, or a diffusers DDPM folder
    weights: str = "ema"  # ema (averaged) or raw (a run's last checkpoint as it is)
    n: int = 16  # number of pictures
    sampler: str = "dpm++2m"  # ddpm ddim pndm euler euler_a heun dpm++2m dpm++2m_karras unipc
    steps: int = 25  # sampling steps
    eta: float = 0.0  # ddim: share of DDPM's noise that each step adds
    seed: int = 0  # picture i depends on the seed and on i alone
    label: str = ""  # class name or number, for a conditional model (default: all in turn)
    guidance: float = -1.0  # scale of classifier-free guidance (1: off, -1: the model's own)
    image: str = ""  # start from this picture instead of noise
    strength: float = 0.5  # with --image: share of the steps that are made, above 0 and up to 1
    clip: float = 0.0  # cut each step's predicted picture to [-clip, clip], in the network's range (0: no)
    batch: int = 0  # pictures at once (0: by their size)
    device: str = "auto"  # cpu, cuda or cuda:1; auto takes a GPU when there is one
    out: str = "samples"  # folder for grid.png and the single pictures


@entry
def main(argv=None):
    """Draws the pictures that the command line asks for."""
    config, _ = parse(Config, argv, __doc__)
    check(config.model, "--model is missing; expected a run folder such as runs/ddpm-001")
    check(config.n >= 1 and config.batch >= 0, f"--n is {config.n} and --batch {config.batch}; expected 1 or more")
    model = ddpm.load(config.model, config.weights, pick_device(config.device))
    options, label = {}, labels(config, model)
    config.guidance = model.guidance if config.guidance == -1 else config.guidance
    if config.eta:
        check(config.sampler == "ddim", f"--eta belongs to --sampler ddim, not to {config.sampler}")
        options["eta"] = config.eta
    if config.clip:
        options["clip"] = config.clip
    if config.image:
        check(0 < config.strength <= 1, f"--strength is {config.strength}; expected above 0 and up to 1, such as 0.5")
        one = images.load(config.image, channels=model.shape[0])[None]
        one = images.resize(one, *model.shape[1:])
        options |= {"image": model.to_network(one).to(model.device), "strength": config.strength}

    x = model.generate(config.n, config.sampler, config.steps, config.seed, label, config.guidance,
                       batch=config.batch, **options)
    recorded = ("model", "weights", "sampler", "steps", "eta", "clip", "seed", "guidance", "image", "strength")
    text = {name: getattr(config, name) for name in recorded}
    folder = Path(config.out)
    for i, one in enumerate(x):
        named = {} if label is None else {"label": model.classes[label[i]]}
        pictures.save(one, folder / f"{config.seed:04d}-{i:05d}.png", {**text, "number": i, **named})
    pictures.save(pictures.grid(x, scale=max(1, 64 // model.shape[1])), folder / "grid.png", text)
    print(f"{config.n} pictures in {folder}")


def labels(config, model):
    """int64 [n], or None for a model without classes."""
    if not model.classes:
        check(not config.label and config.guidance in (-1, 1), "--label and --guidance need a model trained with "
              "--conditional; this one knows no classes")
        return None
    if not config.label:
        return torch.arange(config.n) % len(model.classes)
    known = model.classes + [str(i) for i in range(len(model.classes))]
    check(config.label in known, f'--label "{config.label}" is none of the model\'s classes '
          f"({', '.join(model.classes)}){nearest(config.label, known)}")
    return torch.full((config.n,), known.index(config.label) % len(model.classes))


if __name__ == "__main__":
    main()
