"""Classifier-free guidance: a network's prediction, pushed towards its condition further than the data go."""

import torch


def classifier_free(network, context, negative=None, scale=1.0):
    """A denoise(x, t) that steers network(x, t, context) by uncond + scale * (cond - uncond).

    network   (x [B, ...], t [B], context [B, ...]) -> prediction of any kind; called once a step, on a batch of 2B
    context   what is wanted, negative: what to move away from (the empty prompt, or the class for "none"): class
              labels [B] or [1], or embeddings [B, 77, D] or [1, 77, D]; a single one serves the whole batch
    scale     1 is off: one call of B with `context` alone; 0 is the negative context alone, 7.5 is usual for text
    ValueError for a scale other than 1 without a negative context.
    Source: Ho & Salimans 2022 (arXiv 2207.12598), equation 6, with scale = 1 + w; Imagen's and Stable Diffusion's form.
    """
    if scale != 1 and negative is None:
        raise ValueError(f"guidance with scale {scale} needs a negative context: the empty prompt or the empty class")

    def denoise(x, t):
        if scale == 1:
            return network(x, t, _whole_batch(context, x))
        both = torch.cat([_whole_batch(negative, x), _whole_batch(context, x)])  # [2B, ...]
        return combine(network(torch.cat([x, x]), torch.cat([t, t]), both), scale)

    return denoise


def combine(predictions, scale):
    """uncond + scale * (cond - uncond) [B, ...] from predictions [2B, ...], those for the negative context first."""
    uncond, cond = predictions.chunk(2)
    return uncond + scale * (cond - uncond)


def below(t, guided, unguided):
    """A predict(x, level) that asks `guided` at levels below step t, and `unguided` where there is more noise.

    In the most noise guidance costs likeness and gains nothing (Kynkäänniemi et al. 2024, arXiv 2404.07724).
    """
    return lambda x, level: (guided if level.t < t else unguided)(x, level)


def _whole_batch(context, x):
    return context.expand(len(x), *context.shape[1:])
