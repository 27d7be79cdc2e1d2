"""Classifier-free guidance: a denoiser that follows its condition more closely than the data does."""

import itertools

import torch


def classifier_free(network, context, negative=None, scale=1.0, prepare=None, acts=None):
    """A `denoise(x, t)` that steers `network(x, t, context)` by uncond + scale * (cond - uncond).

    network   (x [B, ...], t [B], context [B, ...]) -> prediction of any kind; called once a step, on a batch of 2B
    context   what is wanted, negative: what to move away from (the empty prompt, or the class for "none"): class
              labels [B] or [1], or embeddings [B, 77, D] or [1, 77, D]; a single one serves the whole batch
    scale     1 is off: one call of B with `context` alone; 0 is the negative context alone, 7.5 is usual for text
    prepare   a function of what network would be given as its context, [2B, ...] or (scale 1) [B, ...], whose result
              it is given instead: work that is the same at every step and is done at the first
    acts      an iterable of bools, whether guidance acts in each of the calls (None: in all): where it does not,
              `context` alone is asked, a batch of B. In the most noise guidance costs likeness and gains nothing
    ValueError: a scale other than 1 without a negative context.
    Source: Ho & Salimans 2022 (arXiv 2207.12598), equation 6, with scale = 1 + w; Imagen's and Stable Diffusion's form.
    acts: the interval of Kynkäänniemi et al. 2024 (arXiv 2404.07724).
    """
    if scale != 1 and negative is None:
        raise ValueError(f"guidance with scale {scale} needs a negative context: the empty prompt or the empty class")

    acts = itertools.repeat(True) if acts is None else iter(acts)
    joined = {}  # the contexts of a whole batch, by its size and whether it is steered: the same at every step

    def contexts(n, steered):
        if (n, steered) not in joined:
            parts = [negative, context] if steered else [context]
            both = torch.cat([part.expand(n, *part.shape[1:]) for part in parts])  # [2B, ...]
            joined[n, steered] = both if prepare is None else prepare(both)
        return joined[n, steered]

    def denoise(x, t):
        if not next(acts) or scale == 1:
            return network(x, t, contexts(len(x), False))
        uncond, cond = network(torch.cat([x, x]), torch.cat([t, t]), contexts(len(x), True)).chunk(2)
        return uncond + scale * (cond - uncond)

    return denoise
