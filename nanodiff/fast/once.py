"""What stays the same in all steps of a sampling run, computed once: the words' keys and values, the time shifts.

The plain U-Net projects the text in every cross-attention and the time embedding in every ResNet block, at every step.
Here a tensor carries what the layers made of it, `tensor.made = {layer: result}`, and a fast layer that is given such a
tensor takes it from there. Gain measured by: python tests/benchmarks/bench_fast.py --only once
"""

import collections

import torch

from nanodiff.fast import networks
from nanodiff.models.blocks import ResnetBlock


def once_a_run(unet, timesteps):
    """A function (x, t, context) -> prediction, as the U-Net itself is, for one sampling run under torch.no_grad().

    timesteps  all t that the run visits: Python numbers, or a tensor [N]
    x          [B, in_channels, H, W], as for the U-Net
    t          a Python number. Of those in `timesteps` the shifts are computed here, all at once; those of another
               number, or of a tensor, at the call
    context    [B, 77, D]. Its keys and values are computed when the tensor is first given, and remembered for the last
               four tensors, by identity: concatenate guidance's two texts once a run, not at every step
    The weights must stay the same: make a new function after an adapter was added, scaled, merged or removed.
    Of a plain or a compiled U-Net, and of one without a text, the U-Net itself is returned.
    """
    if type(unet) is not networks.CondUNet or unet._compiled_call_impl is not None:
        return unet
    moments = time_shifts(unet, timesteps)
    contexts = collections.deque(maxlen=4)  # pairs: a tensor as it is given, and one that remembers

    def network(x, t, context):
        own = next((own for given, own in contexts if given is context), None)
        if own is None:
            own = context.to(unet.dtype).detach()  # another tensor with the same numbers
            own.made = {}
            contexts.append((context, own))
        return unet(x, moments.get(t, t) if isinstance(t, (int, float)) else t, own)

    return network


@torch.no_grad()
def time_shifts(unet, timesteps):
    """{t: its time embedding [1, time_channels], which carries what every ResNet block adds for it}."""
    timesteps = torch.as_tensor(timesteps, dtype=torch.float64).flatten()
    embeddings = unet.embed_time(timesteps)
    rows = {block: block.time_shift(embeddings) for block in unet.modules() if isinstance(block, ResnetBlock)}
    moments = {}
    for i, t in enumerate(timesteps.tolist()):
        moments[t] = embeddings[i : i + 1]
        moments[t].made = {block: shifts[i : i + 1] for block, shifts in rows.items()}
    return moments


def remembered(layer, tensor, compute):
    """compute(tensor), or what the layer made of this tensor before, where the tensor remembers."""
    made = getattr(tensor, "made", None)
    if made is None:
        return compute(tensor)
    if layer not in made:
        made[layer] = compute(tensor)
    return made[layer]
