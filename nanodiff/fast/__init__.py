"""The networks of models/ with the same weights and the same answers, faster: one call, `speed_up`, puts it in.

    net = fast.speed_up(net)                          a layer becomes a subclass of itself with another forward
    with fast.packed(net): ...                        convolutions hold their weights in the order that the CPU wants
    network = fast.once_a_run(unet, timesteps)        what stays the same over a sampling run is computed once

`NANODIFF_PLAIN=1` leaves all of it out: the three calls then change nothing. Order: the EMA's copy, adapters, speed_up,
then DistributedDataParallel or fully_shard. A compiled network is a plain one: `plain(net).compile()`.
"""

import os

import torch
from torch import nn

from nanodiff.fast import blocks, frozen, lora, networks, packing, transformer
from nanodiff.fast.once import once_a_run
from nanodiff.fast.packing import packed
from nanodiff.models import blocks as plain_blocks, clip_text, cond_unet, kl_autoencoder, lora as plain_lora, unet

__all__ = ["speed_up", "plain", "packed", "once_a_run", "cpu_has_bfloat16"]

FASTER = {  # a plain class: its subclass here, which has the same parameters
    nn.Conv2d: packing.Conv2d, nn.Linear: frozen.Linear, nn.GroupNorm: blocks.GroupNorm, nn.LayerNorm: blocks.LayerNorm,
    plain_blocks.ResnetBlock: blocks.ResnetBlock, plain_blocks.Attention: blocks.Attention,
    plain_blocks.Upsample: blocks.Upsample, cond_unet.GEGLU: transformer.GEGLU,
    cond_unet.FeedForward: transformer.FeedForward, cond_unet.TransformerBlock: transformer.TransformerBlock,
    cond_unet.SpatialTransformer: transformer.SpatialTransformer, clip_text.FeedForward: transformer.ClipFeedForward,
    unet.UNet: networks.UNet, cond_unet.CondUNet: networks.CondUNet, kl_autoencoder.Encoder: networks.Encoder,
    kl_autoencoder.Decoder: networks.Decoder, plain_lora.LoraLayer: lora.LoraLayer,
}
PLAINER = {faster: plain_class for plain_class, faster in FASTER.items()}


def speed_up(net):
    """net itself, with every layer that is known here swapped for its faster subclass, in place.

    The keys, Parameters and answers stay (answers within rounding). Idempotent; other layers are left as they are. Call
    it again after adapters were added: their layers are new. NANODIFF_PLAIN=1: nothing is swapped.
    """
    if os.environ.get("NANODIFF_PLAIN") == "1":
        return net
    for module in net.modules():
        if type(module) in FASTER and not (type(module) is nn.Conv2d and packing.is_unusual(module)):
            module.__class__ = FASTER[type(module)]
            if isinstance(module, networks.UNet):
                module.to(memory_format=torch.channels_last)
    return net


def plain(net):
    """net itself with the plain classes of models/ again, in place: for torch.compile."""
    for module in net.modules():
        if type(module) is packing.Conv2d:
            module.unpack()
        module.__class__ = PLAINER.get(type(module), type(module))
    return net


def cpu_has_bfloat16():
    """Whether this CPU multiplies bfloat16 matrices in hardware."""
    asked = (getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"))
    return any(ask() for ask in asked if ask)
