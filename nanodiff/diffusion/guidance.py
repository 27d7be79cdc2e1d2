"""Classifier-free guidance: a denoiser that follows its condition more closely than the data does."""

import torch


def classifier_free(network, context, negative=None, scale=1.0):
    """A `denoise(x, t)` that steers `network(x, t, context)` by uncond + scale * (cond - uncond).

    network   (x [B, ...], t [B], context [B, ...]) -> prediction of any kind; called once a step, on a batch of 2B
    context   what is wanted, negative: what to move away from (the empty prompt, or the class for "none"): class
              labels [B] or [1], or embeddings [B, 77, D] or [1, 77, D]; a single one serves the whole batch
    scale     1 is off: one call of B with `context` alone; 0 is the negative context alone, 7.5 is usual for text
    ValueError: a scale other than 1 without a negative context.
    Source: Ho & Salimans 2022 (arXiv 2207.12598), equation 6, with scale = 1 + w; Imagen's and Stable Diffusion's form.
    """
    if scale != 1 and negative is None:
        raise ValueError(f"guidance with scale {scale} needs a negative context: the empty prompt or the empty class")

    def denoise(x, t):
        wanted = context.expand(len(x), *context.shape[1:])
        if scale == 1:
            return network(x, t, wanted)
        unwanted = negative.expand(len(x), *negative.shape[1:])
        both = network(torch.cat([x, x]), torch.cat([t, t]), torch.cat([unwanted, wanted]))  # [2B, ...]
        uncond, cond = both.chunk(2)
        return uncond + scale * (cond - uncond)

    return denoise
