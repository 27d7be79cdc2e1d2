"""A trained VQGAN as one thing: the GPT writes a map of codes, the autoencoder draws it.

    model = vqgan.load("runs/vqgan-001")           # a folder: autoencoder/, gpt/ and nanodiff.json
    pictures = model.generate(16, seed=0)          # [16, C, H, W] in [-1, 1]
    vqgan.save(model, "somewhere")

Source: Esser et al. 2021 (arXiv 2012.09841).
"""

from pathlib import Path

import torch

from nanodiff import rng
from nanodiff.errors import UserError
from nanodiff.files import read_json
from nanodiff.formats.model_folder import load_model, save_model
from nanodiff.formats.weights import write_folder
from nanodiff.models.gpt import GPT, GPTConfig
from nanodiff.models.vqvae import VQVAE, VQVAEConfig


class VQGAN:
    """autoencoder: a VQVAE; gpt: a GPT over its codes, read row by row; shape: (C, H, W) of the pictures; classes:
    names, in the order of the GPT's class tokens, empty for pictures without classes; data: the data set's name.

    UserError when the GPT writes other codes, or more or fewer of them, than the autoencoder draws such pictures from.
    """

    def __init__(self, autoencoder, gpt, shape, classes=(), data=""):
        self.autoencoder, self.gpt, self.shape = autoencoder, gpt, tuple(shape)
        self.classes, self.data = list(classes), data
        autoencoder.check_size(self.shape)
        ours = (autoencoder.config.codes, self.grid[0] * self.grid[1], max(1, len(self.classes)))
        theirs = (gpt.config.codes, gpt.config.length, gpt.config.classes)
        if ours != theirs:
            said = [f"{length} codes out of {codes} in {classes} classes" for codes, length, classes in (theirs, ours)]
            raise UserError(f"the GPT writes {said[0]}, but the autoencoder draws its pictures from {said[1]}; "
                            "expected a GPT that was trained on this autoencoder's codes")

    @property
    def grid(self):
        """Rows and columns of a picture's map of codes."""
        return self.shape[1] // 4, self.shape[2] // 4

    def generate(self, n, seed=0, label=None, temperature=1.0, top_k=0, first=0, batch=250):
        """Pictures first ... first+n-1 of `seed`: [n, C, H, W] in [-1, 1], on the CPU.

        label: int64 [n]; None takes all classes in turn. A picture depends on its number, its class and the seed, not
        on n or batch (but for the rounding of what is computed together).
        """
        device = next(self.gpt.parameters()).device
        if label is None:
            label = torch.arange(first, first + n) % self.gpt.config.classes
        drawn = []
        for index in torch.arange(n).split(batch):
            generators = [rng.generator(seed, rng.CODES, first + i) for i in index.tolist()]
            codes = self.gpt.sample(label[index].to(device), None, temperature, top_k, generators)
            with torch.no_grad():
                drawn.append(self.autoencoder.decode_codes(codes.unflatten(1, self.grid)).clamp(-1, 1).cpu())
        return torch.cat(drawn)


def save(model, folder):
    """Write a VQGAN; nanodiff.json is written last."""
    folder = Path(folder)
    save_model(model.autoencoder, folder / "autoencoder")
    save_model(model.gpt, folder / "gpt")
    ours = {"model": "VQGAN", "shape": model.shape, "classes": model.classes, "data": model.data}
    write_folder(folder, {"nanodiff.json": ours}, {})


def load(path, device="cpu"):
    """The VQGAN in a run folder of train_vqgan.py or in its model/; UserError when it holds another model."""
    folder = Path(path) / "model" if (Path(path) / "model").is_dir() else Path(path)
    extra = read_json(folder, "nanodiff.json")
    if extra.pop("model", None) != "VQGAN" or set(extra) != {"shape", "classes", "data"}:
        raise UserError(f"{folder} holds no VQGAN; expected a run folder of train_vqgan.py or the model/ in it")
    autoencoder = load_model(folder / "autoencoder", VQVAE, VQVAEConfig)
    gpt = load_model(folder / "gpt", GPT, GPTConfig)
    try:
        return VQGAN(autoencoder.to(device), gpt.to(device), **extra)
    except UserError as error:
        raise UserError(f"{folder}: {error}") from None
