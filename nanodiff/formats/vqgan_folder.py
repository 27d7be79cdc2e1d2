"""A VQGAN as a folder: its two networks in autoencoder/ and gpt/, what else it needs to know in nanodiff.json.

    save(model, "runs/vqgan-001/model")
    model = load("runs/vqgan-001")
"""

from pathlib import Path

from nanodiff.errors import UserError
from nanodiff.files import read_json
from nanodiff.formats.model_folder import load_model, save_model
from nanodiff.formats.weights import write_folder
from nanodiff.models.gpt import GPT, GPTConfig
from nanodiff.models.vqgan import VQGAN
from nanodiff.models.vqvae import VQVAE, VQVAEConfig


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
