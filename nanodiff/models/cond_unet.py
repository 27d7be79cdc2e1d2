"""Stable Diffusion's U-Net: a latent, a time step and a text in, the prediction (noise or v) out.

DDPM's U-Net (unet.py) with one addition: where it has attention, a transformer lets every pixel look at the other
pixels and then at the words of the prompt.

    z ─ conv_in ─ down 0 ─ down 1 ─ ... ─ mid ─ ... ─ up 1 ─ up 0 ─ norm, silu, conv_out
                    └────────┴── skips ───────────────┴───────┘         each with its transformers: words ──┘

Attribute names are the keys of a diffusers UNet2DConditionModel. Source: Rombach et al. 2022 (arXiv 2112.10752),
section 3.3 and appendix E.2.1; report section 4.1, figure 38.
"""

from dataclasses import dataclass

import torch.nn.functional as F
from torch import nn

from nanodiff.errors import UserError
from nanodiff.models.blocks import Attention
from nanodiff.models.unet import UNetBody, check_levels


@dataclass
class CondUNetConfig:
    """Every size of Stable Diffusion's U-Net; the defaults are those of SD 1.x (859,520,964 parameters)."""

    in_channels: int = 4  # channels that come in: the latent's; 9 for inpainting (latent, mask, latent of the rest)
    out_channels: int = 4  # channels of the prediction
    channels: tuple[int, ...] = (320, 640, 1280, 1280)  # width of each level, from full size downwards
    blocks: int = 2  # ResNet blocks a level on the way down (one more on the way up)
    attention: tuple[int, ...] = (0, 1, 2)  # levels with transformers
    mid_attention: bool = True  # a transformer in the middle
    transformer_layers: int = 1  # layers of each transformer
    heads: tuple[int, ...] = (8, 8, 8, 8)  # attention heads of each level (SD 2.x: 5, 10, 20, 20)
    context_channels: int = 768  # width of the text states (SD 2.x: 1024)
    linear_projection: bool = False  # into and out of a transformer by linear layers (SD 2.x), not 1x1 convolutions
    groups: int = 32  # groups of every group normalisation
    eps: float = 1e-5  # added to the variance in the group normalisations (the transformers' own have 1e-6)
    activation: str = "silu"  # silu (swish), gelu, relu or mish
    dropout: float = 0.0  # share of activations dropped before a ResNet block's second convolution
    time_channels: int | None = None  # width of the time embedding; None: four times channels[0]
    freq_shift: float = 0.0  # 1: the slowest sinusoid has frequency 1/10000 exactly; 0: just above
    flip_sin_to_cos: bool = True  # cosines before sines in the time embedding
    downsample_padding: int = 1  # 1 pads all sides, 0 right and bottom

    def __post_init__(self):
        self.channels, self.attention = tuple(self.channels), tuple(self.attention)
        self.heads = tuple(self.heads)
        check_levels(self, "transformer_layers", self.attention)
        if len(self.heads) != len(self.channels):
            raise UserError(f"heads {self.heads} must hold one number for each level of channels {self.channels}")
        for level, (width, heads) in enumerate(zip(self.channels, self.heads)):
            attends = level in self.attention or self.mid_attention and level == len(self.channels) - 1
            if attends and (heads < 1 or width % heads):
                raise UserError(f"attention over {width} channels cannot be split into {heads} equal heads")


class GEGLU(nn.Module):
    """A gated linear unit: half of the projected numbers times the GELU of the other half (arXiv 2002.05202)."""

    def __init__(self, channels, inner):
        super().__init__()
        self.proj = nn.Linear(channels, 2 * inner)

    def forward(self, x):
        y, gate = self.proj(x).chunk(2, dim=-1)
        return y * F.gelu(gate)


class FeedForward(nn.Module):
    """Two linear layers on each pixel by itself, four times as wide between them: [B, N, C] -> [B, N, C]."""

    def __init__(self, channels):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), nn.Linear(4 * channels, channels)])

    def forward(self, x):
        return self.net[2](self.net[0](x))


class TransformerBlock(nn.Module):
    """Pixels look at each other, then at the words, then each thinks by itself; all residual, normalised before.

    x [B, N, C] pixels, context [B, M, context_channels] words -> [B, N, C].
    """

    def __init__(self, channels, heads, context_channels):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(channels) for _ in range(3))
        self.attn1 = Attention(channels, heads, channels // heads)
        self.attn2 = Attention(channels, heads, channels // heads, context_channels)
        self.ff = FeedForward(channels)

    def forward(self, x, context):
        x = x + self.attn1(self.norm1(x))
        x = x + self.attn2(self.norm2(x), context)
        return x + self.ff(self.norm3(x))


class SpatialTransformer(nn.Module):
    """Transformer layers over the pixels of a feature map, added to it: x [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, channels, heads, context_channels, layers=1, groups=32, linear_projection=False):
        super().__init__()
        self.norm = nn.GroupNorm(groups, channels, 1e-6)
        self.proj_in = nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(channels, heads, context_channels) for _ in range(layers)])
        self.proj_out = nn.Linear(channels, channels) if linear_projection else nn.Conv2d(channels, channels, 1)
        self.linear_projection = linear_projection

    def forward(self, x, context):
        return x + self.change(x, context)

    def change(self, x, context):
        """What the layers add to the feature map: [B, C, H, W]."""
        h = self.norm(x)
        if self.linear_projection:
            h = self.proj_in(to_tokens(h))
        else:
            h = to_tokens(self.proj_in(h))  # [B, H * W, C]
        for block in self.transformer_blocks:
            h = block(h, context)
        return to_map(self.proj_out(h), x) if self.linear_projection else self.proj_out(to_map(h, x))


def to_tokens(x):
    """[B, C, H, W] as a row of pixels [B, H * W, C]; a view where x is in channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_map(tokens, like):
    """[B, H * W, C] as a map [B, C, H, W] in channels_last, with the height and width of `like`."""
    return tokens.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


class CondUNet(UNetBody):
    """Stable Diffusion's U-Net: forward(x, t, context) -> prediction.

    x        [B, in_channels, H, W]: latents of unit variance, in any size
    t        [B] or a single number, integer or float, 0 ... T-1
    context  text states [B, 77, context_channels]
    out      [B, out_channels, H, W]
    generator, checkpointing: see UNetBody.
    """

    def __init__(self, config, generator=None):
        super().__init__(config, (config.in_channels, config.out_channels), config.attention, generator=generator)

    def attention(self, level, middle=False):
        c = self.config
        return SpatialTransformer(c.channels[level], c.heads[level], c.context_channels, c.transformer_layers, c.groups,
                                  c.linear_projection)

    def forward(self, x, t, context):
        if x.shape[1] != self.config.in_channels:
            raise UserError(f"this U-Net takes {self.config.in_channels} channels, but {x.shape[1]} were given"
                            + (": an inpainting model wants a mask" if self.config.in_channels == 9 else ""))
        return self.down_and_up(x.to(self.dtype), self.embed_time(t, len(x)), context.to(self.dtype))
