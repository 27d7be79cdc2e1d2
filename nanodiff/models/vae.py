"""The variational autoencoder: a latent is a distribution, held near N(0, 1), so that N(0, 1) gives new pictures.

With q(z|x) the encoder's Gaussian, p(x|z) the decoder's levels and p(z) = N(0, 1), training minimises

    (1)  -E_q[log p(x|z)] + E_q[log q(z|x) - log p(z)]      both expectations from L samples z
    (2)  -E_q[log p(x|z)] + KL(q(z|x) || p(z))              the second in closed form

which exceed -log p(x) by KL(q(z|x) || p(z|x)). Equation numbers are the report's.
Source: Kingma & Welling 2014 (arXiv 1312.6114), equations 6 and 7; Burda et al. 2016 (arXiv 1509.00519), equation 8,
for the tighter bound; report section 2.1.2.
"""

import math
from dataclasses import dataclass

import torch
from torch import nn

from nanodiff import rng
from nanodiff.models.autoencoder import (Sizes, check_latents, check_pictures, decoder, drawn, encoder, initialise,
                                         levels)
from nanodiff.models.kl_autoencoder import DiagonalGaussian


@dataclass
class VAEConfig(Sizes):
    """Every size of the VAE; the defaults are the report's 784-400-20 (652,824 parameters)."""

    widths: tuple[int, ...] = (400,)
    latent: int = 20


class VAE(nn.Module):
    """Pictures x [B, C, H, W] in [-1, 1] to Gaussians over z [B, latent], z to logits of the levels [B, C, H, W]."""

    def __init__(self, config, generator=None):
        super().__init__()
        self.config = config
        self.encoder = encoder(config, 2 * config.latent)
        self.decoder = decoder(config)
        initialise(self, generator)

    def encode(self, x):
        """q(z|x), a DiagonalGaussian over [B, latent]. UserError for pictures of another shape."""
        check_pictures(x, self.config)
        mean, logvar = self.encoder(levels(x)).to(x.dtype).chunk(2, dim=1)
        return DiagonalGaussian(mean, logvar)

    def decode(self, z):
        """Logits [..., C, H, W] of z [..., latent]; their sigmoids are levels in 0 ... 1. UserError for other sizes."""
        check_latents(z, self.config)
        logits = self.decoder(z.flatten(0, -2)).to(z.dtype)
        return logits.view(*z.shape[:-1], *self.config.shape)

    def forward(self, x, noise):
        """(logits [L, B, C, H, W], z [L, B, latent], q(z|x)) of pictures x, through the latents that noise [L, B, latent]
        draws."""
        posterior = self.encode(x)
        z = posterior.mean + torch.exp(0.5 * posterior.logvar) * noise
        return self.decode(z), z, posterior


def generate(net, n, seed=0, first=0):
    """Pictures first ... first+n-1 of `seed` from latents of N(0, 1): [n, C, H, W] in [-1, 1], on the CPU."""
    return drawn(net, rng.normal(seed, 0, torch.arange(first, first + n), (net.config.latent,), stream=4))


def log_normal(z, mean, logvar):
    """log N(z; mean, exp(logvar)) in nats, summed over the last dimension: [...]; numbers or tensors that broadcast."""
    logvar = torch.as_tensor(logvar, dtype=z.dtype, device=z.device)
    each = (z - mean) ** 2 * torch.exp(-logvar) + logvar + math.log(2 * math.pi)
    return -0.5 * each.sum(-1)


def sampled_kl(z, posterior):
    """log q(z|x) - log p(z) [L, B] of draws z [L, B, latent] from the posterior: its mean estimates KL(q || p)."""
    return log_normal(z, posterior.mean, posterior.logvar) - log_normal(z, 0.0, 0.0)


def importance_weighted_bound(log_likelihood, z, posterior):
    """A lower bound on log p(x) in nats [B] from k draws z [k, B, latent] and log p(x|z) [k, B].

    log of the mean of p(x|z) p(z) / q(z|x): with k = 1 it is equation (1), and it rises to log p(x) with k.
    Source: Burda et al. 2016, equation 8.
    """
    return torch.logsumexp(log_likelihood - sampled_kl(z, posterior), 0) - math.log(len(z))
