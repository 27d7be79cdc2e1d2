"""Tiny data, models and flags: every training script trains on them in about a second.

    words("ddpm", places, out, steps=1)  ->  ["--data=...", "--out=...", ...]
"""

import importlib

import numpy as np
from PIL import Image

import tiny_ldm
import tiny_sd

EVERY = dict(seed=3, steps=4, device="cpu", workers=0, log_every=1, preview_every=100, checkpoint_every=2, warmup=1)
VQ = dict(channels=8, residual_layers=1, residual_channels=4, codes=12, code_channels=4, patience=2)
TEACH = dict(model="{sd1}", data="zigzagged", pictures=6, batch=2, sample_steps=1, each=1, retention="two zebras",
             workers=1)
PRIOR = dict(with_prior_preservation=True, class_data="worlds", num_class_images=12)

FLAGS = {
    "autoencoder": dict(data="{pictures}", batch=4, widths="16,8", latent=3),
    "vae": dict(data="{pictures}", batch=4, widths="16", latent=3, importance=0, tsne=0),
    "vqvae": dict(data="{pictures}", batch=4, size=12, **VQ),
    "gan": dict(data="grid", channels="8,8", latent=2, batch=8, n_critic=2, lr=1e-3, judged=8),
    "vqgan": dict(data="{kinds}", batch=4, **VQ, disc_channels=8, disc_start=0, adversarial_start=0, perceptual=0,
                  gpt_batch=4, gpt_steps=3, gpt_width=8, gpt_layers=1, gpt_heads=2, samples=2),
    "ddpm": dict(data="{pictures}", batch=4, size=12, channels="8,8", blocks=1, attention="none", heads=1, T=8,
                 prediction="v", schedule="cosine", conditional=True, guidance=2.0, sample_steps=2, figures=False),
    "kl_autoencoder": dict(data="{colours}", batch=4, size=32, crop=16, channels="8,8", latent_channels=2, disc_start=0,
                           adversarial_start=0, whole=0, disc_channels=8, codes=8),
    "clip": dict(pictures=24, variants=2, width=32, layers=1, heads=2, batch=8),
    "ldm": dict(autoencoder="{parts}/vae", text="{parts}", size=16, pictures=24, names=tiny_ldm.NAMES, channels="8,16",
                attention="1", head_width=8, text_width=16, text_layers=1, batch=4, sample_steps=1),
    "finetune": TEACH,
    "textual_inversion": dict(TEACH, num_vectors=2),
    "dreambooth": dict(TEACH, **PRIOR, instance_prompt="a sks texture"),
    "lora": dict(TEACH, **PRIOR, instance_prompt="a <new> texture", placeholder_token="<new>"),
    "pivotal": dict(TEACH, **PRIOR, word_steps=2),
}


def module(script):
    """The module train_SCRIPT.py."""
    return importlib.import_module(f"train_{script}")


def words(script, places, out, **changes):
    """Command-line words of a tiny training; a flag that is changed to None is left out."""
    flags = {**EVERY, **FLAGS[script], "out": out, **changes}
    return [word(name, value, places) for name, value in flags.items() if value is not None]


def word(name, value, places):
    """A flag and its value as one command-line word; {sd1} and the like become folders."""
    if isinstance(value, str):
        for place, folder in places.items():
            value = value.replace(f"{{{place}}}", str(folder))
    return f"--{name}={value}" if type(value) is not bool else f"--{name}" if value else f"--no-{name}"


def make_places(root):
    """{name: folder}: pictures 12x12 in grey, kinds 16x16 (both in two classes), colours 32x32, two tiny Stable
    Diffusion models (sd1 predicts noise, sd2 v) and the parts of a latent diffusion model."""
    places = {name: root / name for name in ("pictures", "kinds", "colours", "sd1", "sd2", "parts")}
    draw = np.random.default_rng(0)
    for i in range(10):
        for name, shape in (("pictures", (12, 12)), ("kinds", (16, 16)), ("colours", (32, 32, 3))):
            folder = places[name] if name == "colours" else places[name] / ("stripes" if i % 2 else "blobs")
            folder.mkdir(parents=True, exist_ok=True)
            Image.fromarray(draw.integers(0, 256, shape, dtype=np.uint8)).save(folder / f"{i}.png")
    for name in ("sd1", "sd2"):
        tiny_sd.write_model(name, places[name])
    tiny_ldm.make_parts(places["parts"])
    return places
