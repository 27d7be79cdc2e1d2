"""Caches for latent diffusion: pictures as latents of a frozen autoencoder, captions as states of a text encoder.

The cache stores the distribution of each latent: every read of a picture draws its latent anew. Random crops and flips
are stored as `variants` of each picture. Source: Rombach et al. 2022 (arXiv 2112.10752), section 3.1; report section
4.1.1.
"""

import time

import torch

from nanodiff import fast, rng


class Latents:
    """A data set of latents, from mean and std [N, V, C, h, w] of V variants of N pictures, of about unit variance.

    read(index, draw) -> [B, C, h, w]; the variant and the draw from its distribution follow from `draw` [B] alone.
    """

    def __init__(self, mean, std, labels=None, classes=(), captions=None):
        self.mean, self.std = mean, std
        self.shape, self.in_memory = tuple(mean.shape[2:]), True
        self.labels, self.classes, self.captions = labels, list(classes), captions

    def __len__(self):
        return len(self.mean)

    def read(self, index, draw):
        variant = (rng.uniform(draw, 1) * self.mean.shape[1]).long()
        noise = rng.normal(0, 0, draw, self.shape, stream=rng.POSTERIOR)
        return self.mean[index, variant] + self.std[index, variant] * noise


@torch.no_grad()
def encode(autoencoder, data, variants=1, batch=64, seed=0, say=None):
    """The Latents of a data set of pictures under a frozen autoencoder, times its scaling factor.

    variants   random crops and flips to store of each picture
    say        called every 20 seconds with a line of text on the time left
    """
    device, scale = next(autoencoder.parameters()).device, autoencoder.config.scaling_factor
    means, stds, started, told = [], [], time.time(), time.time()
    with fast.packed(autoencoder):
        for index in torch.arange(len(data)).split(max(1, batch // variants)):
            done = int(index[-1]) + 1
            index = index.repeat_interleave(variants)
            draw = rng.scramble(seed, rng.ENCODING, index, torch.arange(len(index)) % variants)
            posterior = autoencoder.encode(data.read(index, draw).to(device))
            means.append((scale * posterior.mean).float().cpu().unflatten(0, (-1, variants)))
            stds.append((scale * torch.exp(0.5 * posterior.logvar)).float().cpu().unflatten(0, (-1, variants)))
            if say and time.time() - told > 20:
                told = time.time()
                say(f"encoded {done:,} of {len(data):,}, {(told - started) / done * (len(data) - done):.0f} s left")
    return Latents(torch.cat(means), torch.cat(stds), data.labels, data.classes, data.captions)


@torch.no_grad()
def cache_text_states(text, ids, batch=256):
    """A function from rows [B] to the states [B, 77, D] that a frozen text encoder gives captions, ids [N, 77].

    All states are computed now and stored on the CPU in half precision: 15 kB for a caption of 77 x 96 numbers. Equal
    captions are stored once.
    """
    ids, unique_row = ids.unique(dim=0, return_inverse=True)
    device = next(text.parameters()).device
    states = torch.cat([text(part.to(device))[0].half().cpu() for part in ids.split(batch)])
    return lambda row: states[unique_row[row]].to(device).float()
