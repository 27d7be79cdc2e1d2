"""Pictures as the latents of a frozen autoencoder, encoded once: the data set that latent diffusion trains on.

What is kept is each latent's distribution, not one draw from it: every time a picture is read its latent is drawn anew.
Random crops and flips are kept as `variants` of each picture. Source: Rombach et al. 2022 (arXiv 2112.10752), section
3.1; report section 4.1.1.
"""

import torch

from nanodiff import randomness


class Latents:
    """mean, std [N, V, C, h, w]: the latents of V variants of N pictures, of about unit variance; a data set of them.

    read(index, draw) -> [B, C, h, w]; which variant, and where in its distribution, follows from `draw` [B] alone.
    """

    def __init__(self, mean, std, labels=None, classes=(), captions=None):
        self.mean, self.std = mean, std
        self.shape, self.in_memory = tuple(mean.shape[2:]), True
        self.labels, self.classes, self.captions = labels, list(classes), captions

    def __len__(self):
        return len(self.mean)

    def read(self, index, draw):
        variant = (randomness.uniform(draw, 1) * self.mean.shape[1]).long()
        noise = randomness.normal(0, 0, draw, self.shape, stream=6)
        return self.mean[index, variant] + self.std[index, variant] * noise


@torch.no_grad()
def encode(autoencoder, data, variants=1, batch=64, seed=0, on_batch=None):
    """The Latents of a data set of pictures under a frozen autoencoder, times its scaling factor.

    variants   random crops and flips of each picture that are kept
    on_batch   called with the number of pictures encoded so far
    """
    device, scale = next(autoencoder.parameters()).device, autoencoder.config.scaling_factor
    means, stds, done = [], [], 0
    for index in torch.arange(len(data)).split(max(1, batch // variants)):
        index = index.repeat_interleave(variants)
        draw = randomness.scramble(seed, 7, index, torch.arange(len(index)) % variants)
        posterior = autoencoder.encode(data.read(index, draw).to(device))
        means.append((scale * posterior.mean).float().cpu().unflatten(0, (-1, variants)))
        stds.append((scale * torch.exp(0.5 * posterior.logvar)).float().cpu().unflatten(0, (-1, variants)))
        done += len(index) // variants
        if on_batch:
            on_batch(done)
    return Latents(torch.cat(means), torch.cat(stds), data.labels, data.classes, data.captions)
