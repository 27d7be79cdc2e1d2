"""The tiny parts and flags with which the tests of train_ldm.py train a model in a second."""

import torch

from nanodiff.formats.stable_diffusion_folder import save_autoencoder, save_text_encoder
from nanodiff.models.clip_text import ClipText, ClipTextConfig, Tokenizer
from nanodiff.models.kl_autoencoder import KLAutoencoder, KLAutoencoderConfig, VQAutoencoder

SCALE = 1.7  # of the tiny autoencoder's latents, unlike any default
NAMES = "striped,dotted"


def make_parts(folder):
    """A folder with vae/ (f = 4), text_encoder/ and tokenizer/: tiny networks with random weights; codes/: a VQ one."""
    generator = torch.Generator().manual_seed(0)
    sizes = dict(channels=(4, 8, 8), latent_channels=2, blocks=1, groups=4, scaling_factor=SCALE)
    save_autoencoder(KLAutoencoder(KLAutoencoderConfig(**sizes), generator), folder / "vae")
    save_autoencoder(VQAutoencoder(KLAutoencoderConfig(**sizes, codes=8), generator), folder / "codes")
    text = ClipText(ClipTextConfig(width=16, layers=1, heads=1, mlp=16), generator)
    save_text_encoder(text, Tokenizer.shipped(), folder)
    return folder


def words(parts, out, **changes):
    """Flags of a training that takes a second."""
    flags = {"out": out, "autoencoder": parts / "vae", "text": parts, "size": 16, "pictures": 24, "names": NAMES,
             "channels": "8,16", "attention": "1", "head_width": 8, "text_width": 16, "text_layers": 1, "steps": 4,
             "batch": 4, "gradient_accumulation": 2, "warmup": 1, "workers": 0, "log_every": 1, "sample_steps": 1,
             "preview_every": 2, "checkpoint_every": 2, "device": "cpu", **changes}
    flags = {name: value for name, value in flags.items() if value is not None}
    return [f"--{name}" if value is True else f"--{name}={value}" for name, value in flags.items()]
