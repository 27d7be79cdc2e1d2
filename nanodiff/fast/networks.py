"""U-Nets and autoencoders whose feature maps are channels_last in memory: [B, H, W, C], the order of fast convolutions.

Replaces nothing but the order: every layer that follows keeps the one that it is given. A U-Net's weights are brought
into it, too (speed_up does that). Gain measured by: python tests/benchmarks/bench_fast.py --only networks
"""

import torch

from nanodiff.models import cond_unet, kl_autoencoder, unet


def channels_last(x):
    """x [B, C, H, W] with the channels last in memory."""
    return x.contiguous(memory_format=torch.channels_last)


class UNet(unet.UNet):
    """DDPM's U-Net."""

    def down_and_up(self, x, time):
        return super().down_and_up(channels_last(x), time)


class CondUNet(cond_unet.CondUNet):
    """Stable Diffusion's U-Net, which also takes a time embedding in the place of t: see once.py."""

    def embed_time(self, t, batch=None):
        return t if hasattr(t, "made") else super().embed_time(t, batch)

    def down_and_up(self, x, time, context):
        return super().down_and_up(channels_last(x), time, context)


class Encoder(kl_autoencoder.Encoder):
    """The encoder of Stable Diffusion's autoencoder."""

    def forward(self, x):
        return super().forward(channels_last(x))


class Decoder(kl_autoencoder.Decoder):
    """The decoder of Stable Diffusion's autoencoder."""

    def forward(self, z):
        return super().forward(channels_last(z))
