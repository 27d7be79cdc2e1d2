"""The autoencoder: a picture squeezed into a few numbers and drawn again from them (report section 2.1.1).

Two networks: fully connected layers, such as 784-500-120-32 and the same backwards, and the convolutional one of the
report's CIFAR-10 experiments. The halves are made by `encoder` and `decoder`, which the VAE (vae.py) uses too. A level
of grey or colour in 0 ... 1 is taken for the probability of a 1, so that the error is a cross-entropy in nats.
Source: Hinton & Salakhutdinov 2006, "Reducing the dimensionality of data with neural networks", Science 313.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nanodiff import rng
from nanodiff.errors import UserError, nearest

NETS = ("mlp", "conv")


@dataclass
class Sizes:
    """What an encoder and its decoder have in common."""

    net: str = "mlp"  # mlp (fully connected layers) or conv
    shape: tuple[int, int, int] = (1, 28, 28)  # channels, height, width of the pictures
    widths: tuple[int, ...] = (500, 120)  # mlp: of the hidden layers; conv: channels, each level half the side before
    latent: int = 32  # numbers that a picture becomes

    def __post_init__(self):
        self.shape, self.widths = tuple(self.shape), tuple(self.widths)
        if self.net not in NETS:
            raise UserError(f'the network "{self.net}" is unknown; expected {" or ".join(NETS)}'
                            + nearest(self.net, NETS))
        if len(self.shape) != 3 or min(*self.shape, *self.widths, self.latent) < 1:
            raise UserError(f"shape {self.shape}, widths {self.widths} and latent {self.latent} must be three, some and"
                            " one whole numbers of at least 1")
        if self.net == "conv" and not self.widths:
            raise UserError("a convolutional network needs at least one width, such as 12,24,48")
        factor = 2 ** len(self.widths)
        if self.net == "conv" and (self.shape[1] % factor or self.shape[2] % factor):
            fits = [max(factor, round(side / factor) * factor) for side in self.shape[1:]]
            raise UserError(f"pictures of {by(self.shape)} do not fit {len(self.widths)} halvings of the side: "
                            f"{factor} must divide both; {by((self.shape[0], *fits))} would fit")


@dataclass
class AutoencoderConfig(Sizes):
    """Every size of the autoencoder; the defaults are the report's 784-500-120-32 (913,736 parameters)."""

    latent_relu: bool = False  # no negative numbers in the latent, as in the report's first network


class Autoencoder(nn.Module):
    """Pictures x [B, C, H, W] in [-1, 1] to latents z [B, latent], these to logits of the levels [B, C, H, W]."""

    def __init__(self, config, generator=None):
        super().__init__()
        self.config = config
        self.encoder = encoder(config, config.latent)
        self.decoder = decoder(config)
        initialise(self, generator)

    def encode(self, x):
        """Latents [B, latent]. UserError for pictures of another shape."""
        check_pictures(x, self.config)
        z = self.encoder(levels(x)).to(x.dtype)
        return F.relu(z) if self.config.latent_relu else z

    def decode(self, z):
        """Logits [B, C, H, W] of latents [B, latent]: sigmoid(logits) are levels in 0 ... 1. UserError for others."""
        check_latents(z, self.config)
        return self.decoder(z).to(z.dtype)

    def forward(self, x):
        return self.decode(self.encode(x))


# --- the two halves -------------------------------------------------------------------------------------------------

def encoder(sizes, out):
    """Levels in 0 ... 1 [B, C, H, W] to `out` numbers [B, out]."""
    channels, height, width = sizes.shape
    if sizes.net == "mlp":
        return nn.Sequential(nn.Flatten(), *dense([channels * height * width, *sizes.widths, out]))
    layers, before = [], channels
    for after in sizes.widths:
        layers += [nn.Conv2d(before, after, 4, stride=2, padding=1), nn.ReLU()]
        before = after
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(math.prod(smallest(sizes)), out))


def decoder(sizes):
    """Latents [B, latent] to logits [B, C, H, W]: the encoder backwards."""
    channels, height, width = sizes.shape
    if sizes.net == "mlp":
        layers = dense([sizes.latent, *reversed(sizes.widths), channels * height * width])
        return nn.Sequential(*layers, nn.Unflatten(1, sizes.shape))
    widths = [channels, *sizes.widths]
    layers = [nn.Linear(sizes.latent, math.prod(smallest(sizes))), nn.Unflatten(1, smallest(sizes))]
    for before, after in zip(widths[:0:-1], widths[-2::-1]):
        layers += [nn.ReLU(), nn.ConvTranspose2d(before, after, 4, stride=2, padding=1)]
    return nn.Sequential(*layers)


def dense(widths):
    """Linear layers from each width to the next, with a ReLU between two."""
    layers = []
    for before, after in zip(widths, widths[1:]):
        layers += [nn.Linear(before, after), nn.ReLU()]
    return layers[:-1]


def smallest(sizes):
    """Channels, height and width at the narrowest place of the convolutional network."""
    factor = 2 ** len(sizes.widths)
    return sizes.widths[-1], sizes.shape[1] // factor, sizes.shape[2] // factor


def initialise(net, generator=None):
    """Weights and biases, in place, uniform within 1 / sqrt(numbers that one output is made of): PyTorch's own rule,
    from a generator of ours (None: torch's own)."""
    for module in net.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d, nn.ConvTranspose2d)):
            bound = 1 / math.sqrt(module.weight[0].numel())
            for parameter in module.parameters():  # the weight, and the bias where there is one
                nn.init.uniform_(parameter, -bound, bound, generator)


# --- the error ------------------------------------------------------------------------------------------------------

def cross_entropy(logits, level):
    """-log p(level) in nats, summed over a picture's values: [...] from logits [..., C, H, W] and levels in 0 ... 1.

    Levels may lack leading dimensions that the logits have. A level between 0 and 1 is the probability of a 1, so that
    the least possible value is not 0 but `entropy(level)`.
    """
    each = F.binary_cross_entropy_with_logits(logits, level.expand_as(logits), reduction="none")
    return each.flatten(-3).sum(-1)


def entropy(level):
    """The entropy of levels in 0 ... 1 [..., C, H, W] in nats, summed over a picture: what no network gets below."""
    return (torch.special.entr(level) + torch.special.entr(1 - level)).flatten(-3).sum(-1)


def levels(x):
    """Pictures in [-1, 1] as levels in 0 ... 1: (x + 1) / 2 bit for bit, in one pass over the memory."""
    return torch.add(0.5, x, alpha=0.5)


def picture(logits):
    """The picture in [-1, 1] that logits [..., C, H, W] stand for."""
    return 2 * torch.sigmoid(logits) - 1


@torch.no_grad()
def drawn(net, z, batch=500):
    """The pictures [N, C, H, W] in [-1, 1], on the CPU, that a network decodes latents z [N, latent] to."""
    device = next(net.parameters()).device
    return torch.cat([picture(net.decode(part.to(device))).cpu() for part in z.split(batch)])


# --- new pictures ---------------------------------------------------------------------------------------------------

def fit_gaussian(z):
    """(mean [d], factor [d, d]) of the Gaussian with the mean and covariance of latents z [n, d], n > 1."""
    mean = z.mean(0)
    values, vectors = torch.linalg.eigh(torch.cov(z.T).view(z.shape[1], z.shape[1]))
    return mean, vectors * values.clamp(min=0).sqrt()


def generate(net, fit, n, seed=0, first=0):
    """Pictures first ... first+n-1 of `seed`, [n, C, H, W] in [-1, 1], on the CPU, from a Gaussian over the latents.

    fit: what `fit_gaussian` made of the latents of real pictures. Nothing in an autoencoder's training asks that points
    of such a Gaussian be decoded to pictures: that they are is measured, not meant.
    """
    mean, factor = fit
    noise = rng.normal(seed, 0, torch.arange(first, first + n), (len(mean),), stream=4)
    return drawn(net, mean + noise @ factor.T)


# --- wrong input ----------------------------------------------------------------------------------------------------

def by(shape):
    """A shape as text, such as 1x28x28."""
    return "x".join(str(side) for side in shape)


def check_pictures(x, sizes):
    """Raises UserError, with both shapes, unless x [B, C, H, W] are pictures of this network."""
    if x.ndim != 4 or tuple(x.shape[1:]) != sizes.shape:
        raise UserError(f"pictures of {by(x.shape[1:])} do not fit this network; expected {by(sizes.shape)}")


def check_latents(z, sizes):
    """Raises UserError, with both sizes, unless z [..., latent] are latents of this network."""
    if z.ndim < 2 or z.shape[-1] != sizes.latent:
        raise UserError(f"latents of shape {list(z.shape)} do not fit this network; expected [B, {sizes.latent}]")
