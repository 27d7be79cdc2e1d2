"""Pictures as the latents of a frozen autoencoder, captions as the states of a frozen text encoder: both made once.

What is kept is each latent's distribution, not one draw from it: every time a picture is read its latent is drawn anew.
Random crops and flips are kept as `variants` of each picture. Source: Rombach et al. 2022 (arXiv 2112.10752), section
3.1; report section 4.1.1.
"""

import time

import torch

from nanodiff import fast, rng


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
        variant = (rng.uniform(draw, 1) * self.mean.shape[1]).long()
        noise = rng.normal(0, 0, draw, self.shape, stream=rng.POSTERIOR)
        return self.mean[index, variant] + self.std[index, variant] * noise


@torch.no_grad()
def encode(autoencoder, data, variants=1, batch=64, seed=0, say=None):
    """The Latents of a data set of pictures under a frozen autoencoder, times its scaling factor.

    variants   random crops and flips of each picture that are kept
    say        called with a line of text on how long it takes, every 20 seconds
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
def text_states(text, ids, batch=256):
    """What a frozen text encoder says of captions, ids [N, 77], made once: a function of rows [B] to [B, 77, D].

    Kept in half precision where they lie (N captions of 77 x 96 numbers are N x 15 kB); equal captions are kept once.
    """
    ids, place = ids.unique(dim=0, return_inverse=True)
    device = next(text.parameters()).device
    known = torch.cat([text(some.to(device))[0].half().cpu() for some in ids.split(batch)])
    return lambda row: known[place[row]].to(device).float()
