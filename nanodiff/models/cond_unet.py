"""Stable Diffusion's U-Net: a latent, a time step and a text in, the prediction (noise or v) out.

DDPM's U-Net (unet.py) with one addition: where it has attention, a transformer lets every pixel look at the other
pixels and then at the words of the prompt.

    z ─ conv_in ─ down 0 ─ down 1 ─ ... ─ mid ─ ... ─ up 1 ─ up 0 ─ norm, silu, conv_out
                    └────────┴── skips ───────────────┴───────┘         each with its transformers: words ──┘

Attribute names are the keys of a diffusers UNet2DConditionModel. Source: Rombach et al. 2022 (arXiv 2112.10752),
section 3.3 and appendix E.2.1; report section 4.1, figure 38.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nanodiff.errors import UserError, nearest
from nanodiff.models.blocks import (ACTIVATIONS, Attention, Downsample, GroupNorm, MidBlock, ResnetBlock, TimeEmbedding,
                                    Upsample, initialise, time_embedding_table)
from nanodiff.models.clip_text import LayerNorm
from nanodiff.models.frozen import Linear
from nanodiff.models.packing import Conv2d
from nanodiff.models.unet import DownBlock, UpBlock


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
        if self.activation not in ACTIVATIONS:
            raise UserError(f'activation "{self.activation}" is unknown; expected one of {", ".join(ACTIVATIONS)}'
                            + nearest(self.activation, ACTIVATIONS))
        if not self.channels or min(self.channels) < 1 or min(self.blocks, self.groups, self.transformer_layers) < 1:
            raise UserError(f"channels {self.channels}, blocks {self.blocks}, groups {self.groups} and "
                            f"transformer_layers {self.transformer_layers} must all be at least 1")
        if len(self.heads) != len(self.channels):
            raise UserError(f"heads {self.heads} must hold one number for each level of channels {self.channels}")
        for level in self.attention:
            if not 0 <= level < len(self.channels):
                raise UserError(f"attention at level {level} is impossible: channels {self.channels} make levels "
                                f"0 to {len(self.channels) - 1}")
        for level, (width, heads) in enumerate(zip(self.channels, self.heads)):
            if width % self.groups:
                raise UserError(f"{width} channels cannot be split into {self.groups} groups: "
                                "groups must divide every entry of channels")
            attends = level in self.attention or self.mid_attention and level == len(self.channels) - 1
            if attends and (heads < 1 or width % heads):
                raise UserError(f"attention over {width} channels cannot be split into {heads} equal heads")
        if self.downsample_padding not in (0, 1):
            raise UserError("downsample_padding must be 0 (right and bottom) or 1 (all sides), "
                            f"not {self.downsample_padding}")


class GEGLU(nn.Module):
    """A gated linear unit: half of the projected numbers times the GELU of the other half (arXiv 2002.05202)."""

    def __init__(self, channels, inner):
        super().__init__()
        self.proj = Linear(channels, 2 * inner)

    def forward(self, x):
        y, gate = self.proj(x).chunk(2, dim=-1)
        if torch.is_grad_enabled() or x.device.type != "cpu":
            return y * F.gelu(gate)
        return y.mul_(torch.ops.aten.gelu.out(gate, out=gate))  # in place: these are a transformer's largest tensors


class FeedForward(nn.Module):
    """Two linear layers on each pixel by itself, four times as wide between them: [B, N, C] -> [B, N, C]."""

    ROWS = 1024  # pixels at a time where no gradient is wanted: larger results would be new memory at every call

    def __init__(self, channels):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(channels, 4 * channels), nn.Identity(), Linear(4 * channels, channels)])

    def forward(self, x):
        if torch.is_grad_enabled() or x.device.type != "cpu":
            return self.net[2](self.net[0](x))
        y = torch.empty_like(x, memory_format=torch.contiguous_format)  # its rows are views of it
        for some, out in zip(x.flatten(0, 1).split(self.ROWS), y.flatten(0, 1).split(self.ROWS)):
            out.copy_(self.net[2](self.net[0](some)))
        return y


class TransformerBlock(nn.Module):
    """Pixels look at each other, then at the words, then each thinks by itself; all residual, normalised before.

    x [B, N, C] pixels, context [B, M, context_channels] words (or their keys and values, see Attention) -> [B, N, C].
    """

    def __init__(self, channels, heads, context_channels):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (LayerNorm(channels) for _ in range(3))
        self.attn1 = Attention(channels, heads, channels // heads)
        self.attn2 = Attention(channels, heads, channels // heads, context_channels)
        self.ff = FeedForward(channels)

    def forward(self, x, context):
        x = self.attn1(self.norm1(x)).add_(x)  # in place: the left side is a fresh tensor
        x = self.attn2(self.norm2(x), context).add_(x)
        return self.ff(self.norm3(x)).add_(x)


class SpatialTransformer(nn.Module):
    """Transformer layers over the pixels of a feature map, added to it: x [B, C, H, W] -> [B, C, H, W]."""

    def __init__(self, channels, heads, context_channels, layers=1, groups=32, linear_projection=False):
        super().__init__()
        self.norm = GroupNorm(groups, channels, 1e-6)
        self.proj_in = Linear(channels, channels) if linear_projection else Conv2d(channels, channels, 1)
        self.transformer_blocks = nn.ModuleList(
            [TransformerBlock(channels, heads, context_channels) for _ in range(layers)])
        self.proj_out = Linear(channels, channels) if linear_projection else Conv2d(channels, channels, 1)
        self.linear_projection = linear_projection

    def forward(self, x, context):
        h = self.norm(x)
        if self.linear_projection:
            h = self.proj_in(to_tokens(h))
        else:
            h = to_tokens(self.proj_in(h))  # [B, H * W, C]
        for block in self.transformer_blocks:
            h = block(h, context)
        if self.linear_projection:
            h = to_map(self.proj_out(h), x)
        else:
            h = self.proj_out(to_map(h, x))  # [B, C, H, W]
        return h.add_(x)


def to_tokens(x):
    """[B, C, H, W] as a row of pixels [B, H * W, C]; a view where x is in channels_last."""
    return x.permute(0, 2, 3, 1).flatten(1, 2)


def to_map(tokens, like):
    """[B, H * W, C] as a map [B, C, H, W] in channels_last, with the height and width of `like`."""
    return tokens.unflatten(1, like.shape[2:]).permute(0, 3, 1, 2)


class CondUNet(nn.Module):
    """Stable Diffusion's U-Net: forward(x, t, context) -> prediction.

    x        [B, in_channels, H, W]: latents of unit variance, in any size
    t        [B] or a single number, integer or float, 0 ... T-1
    context  text states [B, 77, context_channels]
    out      [B, out_channels, H, W]
    In a run of many steps with one text, `keys_and_values` and `time_shifts` may take the places of context and t.
    generator: draws the initial weights (None: torch's own); under torch.device("meta") there are none to draw.
    checkpointing: set it to True, and training keeps what goes into each level alone and computes the rest a second
    time in its backward pass (Chen et al. 2016, arXiv 1604.06174).
    """

    checkpointing = False

    def __init__(self, config, generator=None):
        super().__init__()
        self.config = c = config
        width, last = c.channels[0], len(c.channels) - 1
        self.time_channels = c.time_channels or 4 * width
        self.conv_in = Conv2d(c.in_channels, width, 3, padding=1)
        self.time_embedding = TimeEmbedding(width, self.time_channels)

        skips = [width]  # widths of the skips, in the order in which the way down makes them
        self.down_blocks = nn.ModuleList()
        for level, out in enumerate(c.channels):
            resnets = [self.resnet(width if i == 0 else out, out) for i in range(c.blocks)]
            attentions = [self.transformer(level) for _ in resnets if level in c.attention]
            downsample = Downsample(out, c.downsample_padding) if level < last else None
            self.down_blocks.append(DownBlock(resnets, attentions, downsample))
            skips += [out] * (c.blocks + (level < last))
            width = out

        middle = self.transformer(last) if c.mid_attention else None
        self.mid_block = MidBlock([self.resnet(width, width), self.resnet(width, width)], middle)

        self.up_blocks = nn.ModuleList()
        for level, out in reversed(list(enumerate(c.channels))):
            resnets = [self.resnet((width if i == 0 else out) + skips.pop(), out) for i in range(c.blocks + 1)]
            attentions = [self.transformer(level) for _ in resnets if level in c.attention]
            self.up_blocks.append(UpBlock(resnets, attentions, Upsample(out) if level > 0 else None))
            width = out

        self.conv_norm_out = GroupNorm(c.groups, width, c.eps)
        self.conv_out = Conv2d(width, c.out_channels, 3, padding=1)
        if not self.conv_in.weight.is_meta:
            initialise(self, generator)
            nn.init.zeros_(self.conv_out.weight)

    def resnet(self, in_channels, out_channels):
        c = self.config
        return ResnetBlock(in_channels, out_channels, self.time_channels, c.groups, c.eps, c.activation, c.dropout)

    def transformer(self, level):
        c = self.config
        return SpatialTransformer(c.channels[level], c.heads[level], c.context_channels, c.transformer_layers, c.groups,
                                  c.linear_projection)

    def forward(self, x, t, context):
        if x.shape[1] != self.config.in_channels:
            raise UserError(f"this U-Net takes {self.config.in_channels} channels, but {x.shape[1]} were given"
                            + (": an inpainting model wants a mask" if self.config.in_channels == 9 else ""))
        dtype = self.conv_in.weight.dtype
        context = context if isinstance(context, dict) else context.to(dtype)
        time = t if isinstance(t, dict) else self.embed(t, len(x))
        x = self.conv_in(x.to(dtype).contiguous(memory_format=torch.channels_last))
        skips = [x]
        again = self.checkpointing and torch.is_grad_enabled()
        call = partial(checkpoint, use_reentrant=False) if again else lambda block, *inputs, **more: block(*inputs, **more)
        for block in self.down_blocks:
            x, more = call(block, x, time, context)
            skips += more
        x = call(self.mid_block, x, time, context)
        for block in self.up_blocks:
            n = len(block.resnets)
            below = skips[-n - 1].shape[2:] if len(skips) > n else None  # what the next level's skips measure
            x = call(block, x, skips[-n:], time, context, size=below)
            del skips[-n:]
        return self.conv_out(F.silu(self.conv_norm_out(x)))

    def embed(self, t, batch=None):
        """What every ResNet block is told about the time steps t [B], or about one number for a whole batch."""
        weight = self.time_embedding.linear_1.weight
        t = torch.as_tensor(t, device=weight.device)
        t = t if batch is None else t.expand(batch)
        table = time_embedding_table(t, self.config.channels[0], self.config.freq_shift, self.config.flip_sin_to_cos)
        return self.time_embedding(table.to(weight.dtype))

    def keys_and_values(self, context):
        """Every cross-attention's keys and values of a text [B, M, context_channels], by the layer: once for a run."""
        return {module.attn2: module.attn2.keys_and_values(context)
                for module in self.modules() if isinstance(module, TransformerBlock)}

    def time_shifts(self, t):
        """For each of the time steps t [N], what the ResNet blocks add, by the block: N dicts, once for a run."""
        time = self.embed(t)
        rows = {module: module.time_shift(time) for module in self.modules() if isinstance(module, ResnetBlock)}
        return [{module: row[i : i + 1] for module, row in rows.items()} for i in range(len(t))]
