"""The DDPM U-Net: a picture and a time step in, the prediction (noise, v or x_0) out.

    x ─ conv_in ─ down 0 ─ down 1 ─ ... ─ mid ─ ... ─ up 1 ─ up 0 ─ norm, swish, conv_out
                    └────────┴── skips ───────────────┴───────┘

UNetBody is this picture, which Stable Diffusion's U-Net (cond_unet.py) shares; UNet adds attention, time and class.
Source: Ho et al. 2020 (arXiv 2006.11239), appendix B; report section 3.2, figures 28-33.
"""

from dataclasses import dataclass
from functools import partial

import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from nanodiff.errors import UserError, nearest
from nanodiff.models.blocks import (ACTIVATIONS, Downsample, MidBlock, ResnetBlock, SpatialAttention, TimeEmbedding,
                                    Upsample, initialise, time_embedding_table)


@dataclass
class UNetConfig:
    """Every size of a U-Net; the defaults are Ho et al.'s CIFAR-10 network (35.7 M parameters) with 4 heads."""

    in_channels: int = 3  # channels of the picture that comes in
    out_channels: int = 3  # channels of the prediction
    channels: tuple[int, ...] = (128, 256, 256, 256)  # width of each level, from full size downwards
    blocks: int = 2  # ResNet blocks a level on the way down (one more on the way up)
    attention: tuple[int, ...] = (1,)  # levels with self-attention (0 is full size; 1 is 16x16 of 32x32)
    up_attention: tuple[int, ...] | None = None  # the same on the way up, if it differs
    mid_attention: bool = True  # self-attention in the middle
    heads: int = 4  # attention heads
    head_dim: int | None = None  # channels of a head; if given, the number of heads is channels // head_dim
    groups: int = 32  # groups of every group normalisation
    mid_groups: int | None = None  # groups of the middle attention's normalisation, if they differ
    eps: float = 1e-6  # added to the variance in every group normalisation
    activation: str = "silu"  # silu (swish), gelu, relu or mish
    dropout: float = 0.0  # share of activations dropped before a block's second convolution
    patch: int = 1  # side of the pixel squares folded into channels before the first convolution
    num_classes: int = 0  # classes the network is told about; 0: none
    no_class: bool = True  # one more class embedding, for "no class": what classifier-free guidance needs
    time_channels: int | None = None  # width of the time embedding; None: four times channels[0]
    freq_shift: float = 1.0  # 1: the slowest sinusoid has frequency 1/10000 exactly; 0: just above
    flip_sin_to_cos: bool = False  # cosines before sines in the time embedding
    downsample_padding: int = 0  # 0 pads right and bottom, 1 pads all sides
    center_input: bool = False  # the picture comes in [0, 1] and is brought to [-1, 1] first

    def __post_init__(self):
        self.channels, self.attention = tuple(self.channels), tuple(self.attention)
        self.up_attention = None if self.up_attention is None else tuple(self.up_attention)
        check_levels(self, "patch", self.attention + (self.up_attention or ()))
        if self.channels[-1] % (self.mid_groups or self.groups):
            raise UserError(f"{self.channels[-1]} channels cannot be split into mid_groups {self.mid_groups}")
        for width in self.attention_channels():
            if self.head_dim is None and width % self.heads or width < (self.head_dim or 1):
                raise UserError(f"attention over {width} channels cannot be split into "
                                + (f"heads of {self.head_dim}" if self.head_dim else f"{self.heads} equal heads"))

    def attention_channels(self):
        """Widths of all the places with attention."""
        levels = set(self.attention) | set(self.up_attention or ())
        return [self.channels[level] for level in sorted(levels)] + [self.channels[-1]] * self.mid_attention

    @classmethod
    def cifar10(cls):
        """Ho et al.'s network for CIFAR-10, as published (google/ddpm-cifar10-32): one head, 35,746,307 parameters."""
        return cls(heads=1)


def check_levels(config, count, attention):
    """UserError unless the levels of a U-Net's config fit together; count: one more field that must be at least 1."""
    c = config
    if c.activation not in ACTIVATIONS:
        raise UserError(f'activation "{c.activation}" is unknown; expected one of {", ".join(ACTIVATIONS)}'
                        + nearest(c.activation, ACTIVATIONS))
    if not c.channels or min(c.channels) < 1 or min(c.blocks, c.groups, getattr(c, count)) < 1:
        raise UserError(f"channels {c.channels}, blocks {c.blocks}, groups {c.groups} and {count} {getattr(c, count)} "
                        "must all be at least 1")
    for level in attention:
        if not 0 <= level < len(c.channels):
            raise UserError(f"attention at level {level} is impossible: channels {c.channels} make levels "
                            f"0 to {len(c.channels) - 1}")
    for width in c.channels:
        if width % c.groups:
            raise UserError(f"{width} channels cannot be split into {c.groups} groups: "
                            "groups must divide every entry of channels")
    if c.downsample_padding not in (0, 1):
        raise UserError("downsample_padding must be 0 (right and bottom) or 1 (all sides), "
                        f"not {c.downsample_padding}")


class DownBlock(nn.Module):
    """One level on the way down: ResNet blocks, each with or without attention, then half the size."""

    def __init__(self, resnets, attentions, downsample=None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.downsamplers = nn.ModuleList([downsample] if downsample is not None else [])

    def forward(self, x, time, *context):
        skips = []
        for i, resnet in enumerate(self.resnets):
            x = resnet(x, time)
            if self.attentions:
                x = self.attentions[i](x, *context)
            skips.append(x)
        for downsample in self.downsamplers:
            x = downsample(x)
            skips.append(x)
        return x, skips


class UpBlock(nn.Module):
    """One level on the way up: each ResNet block also reads a skip from the way down; then twice the size."""

    def __init__(self, resnets, attentions, upsample=None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList(attentions)
        self.upsamplers = nn.ModuleList([upsample] if upsample is not None else [])

    def forward(self, x, skips, time, *context, size=None):
        for i, resnet in enumerate(self.resnets):
            x = resnet(torch.cat([x, skips[-1 - i]], dim=1), time)
            if self.attentions:
                x = self.attentions[i](x, *context)
        for upsample in self.upsamplers:
            x = upsample(x, size)
        return x


class UNetBody(nn.Module):
    """The way down and up that the U-Nets share; a subclass has `attention(level, middle)` and calls `down_and_up`.

    config         its own fields are read alone that both configs have
    channels       (of what comes into the first convolution, of what leaves the last)
    up_attention   levels with attention on the way up (on the way down: config.attention)
    classes        rows of the class embedding; 0: there is none
    generator      draws the initial weights (None: torch's own); under torch.device("meta") there are none to draw
    checkpointing: set it to True, and training keeps what goes into each level alone and computes the rest a second
    time in its backward pass (Chen et al. 2016, arXiv 1604.06174).
    """

    checkpointing = False

    def __init__(self, config, channels, up_attention, classes=0, generator=None):
        super().__init__()
        self.config = c = config
        width, last = c.channels[0], len(c.channels) - 1
        self.time_channels = c.time_channels or 4 * width
        self.conv_in = nn.Conv2d(channels[0], width, 3, padding=1)
        self.time_embedding = TimeEmbedding(width, self.time_channels)
        self.class_embedding = nn.Embedding(classes, self.time_channels) if classes else None

        skips = [width]  # widths of the skips, in the order in which the way down makes them
        self.down_blocks = nn.ModuleList()
        for level, out in enumerate(c.channels):
            resnets = [self.resnet(width if i == 0 else out, out) for i in range(c.blocks)]
            attentions = [self.attention(level) for _ in resnets if level in c.attention]
            downsample = Downsample(out, c.downsample_padding) if level < last else None
            self.down_blocks.append(DownBlock(resnets, attentions, downsample))
            skips += [out] * (c.blocks + (level < last))
            width = out

        middle = self.attention(last, middle=True) if c.mid_attention else None
        self.mid_block = MidBlock([self.resnet(width, width), self.resnet(width, width)], middle)

        self.up_blocks = nn.ModuleList()
        for level, out in reversed(list(enumerate(c.channels))):
            resnets = [self.resnet((width if i == 0 else out) + skips.pop(), out) for i in range(c.blocks + 1)]
            attentions = [self.attention(level) for _ in resnets if level in up_attention]
            self.up_blocks.append(UpBlock(resnets, attentions, Upsample(out) if level > 0 else None))
            width = out

        self.conv_norm_out = nn.GroupNorm(c.groups, width, c.eps)
        self.conv_out = nn.Conv2d(width, channels[1], 3, padding=1)
        if not self.conv_in.weight.is_meta:
            initialise(self, generator)
            nn.init.zeros_(self.conv_out.weight)

    def resnet(self, in_channels, out_channels):
        c = self.config
        return ResnetBlock(in_channels, out_channels, self.time_channels, c.groups, c.eps, c.activation, c.dropout)

    @property
    def dtype(self):
        """Of the weights; the norms' are never in an order of their own."""
        return self.conv_norm_out.weight.dtype

    def embed_time(self, t, batch=None):
        """The time embedding [B, time_channels] of time steps t [B], or of one number for a whole batch."""
        t = torch.as_tensor(t, device=self.conv_norm_out.weight.device)
        t = t if batch is None else t.expand(batch)
        table = time_embedding_table(t, self.config.channels[0], self.config.freq_shift, self.config.flip_sin_to_cos)
        return self.time_embedding(table.to(self.dtype))

    def down_and_up(self, x, time, *context):
        """[B, channels[0], H, W] -> [B, channels[1], H, W]; every ResNet block sees time, every attention context."""
        call = partial(checkpoint, use_reentrant=False) if self.checkpointing else call_block
        x = self.conv_in(x)
        skips = [x]
        for block in self.down_blocks:
            x, more = call(block, x, time, *context)
            skips += more
        x = call(self.mid_block, x, time, *context)
        for block in self.up_blocks:
            n = len(block.resnets)
            below = skips[-n - 1].shape[2:] if len(skips) > n else None  # the size of the next level's skips
            x = call(block, x, skips[-n:], time, *context, size=below)
            del skips[-n:]
        return self.conv_out(F.silu(self.conv_norm_out(x)))


def call_block(block, *inputs, **options):
    """block(*inputs, **options): what torch's `checkpoint` does, without checkpointing."""
    return block(*inputs, **options)


class UNet(UNetBody):
    """Ho et al.'s U-Net: forward(x, t, label=None) -> prediction.

    x      [B, in_channels, H, W]; H and W must divide by patch * 2 ** (levels - 1), else UserError
    t      [B] or a single number, integer or float, 0 ... T-1
    label  int64 [B], 0 ... num_classes - 1, or num_classes for "no class"; None: no class for all
    out    [B, out_channels, H, W]
    generator, checkpointing: see UNetBody.
    Source: Ho et al. 2020, appendix B; report section 3.2, figures 28-33.
    """

    def __init__(self, config, generator=None):
        c = config
        super().__init__(c, (c.in_channels * c.patch**2, c.out_channels * c.patch**2),
                         c.attention if c.up_attention is None else c.up_attention,
                         c.num_classes + c.no_class if c.num_classes else 0, generator)

    def attention(self, level, middle=False):
        c = self.config
        channels, groups = c.channels[level], c.mid_groups if middle else None
        head_dim = c.head_dim or channels // c.heads
        return SpatialAttention(channels, channels // head_dim, head_dim, groups or c.groups, c.eps)

    def forward(self, x, t, label=None):
        self.check_size(x)
        c, time = self.config, self.embed(t, label, len(x))
        x = 2 * x - 1 if c.center_input else x
        x = F.pixel_unshuffle(x, c.patch) if c.patch > 1 else x  # [B, C * patch^2, H / patch, W / patch]
        x = self.down_and_up(x, time)
        return F.pixel_shuffle(x, c.patch) if c.patch > 1 else x  # [B, out_channels, H, W]

    def embed(self, t, label, batch):
        """What every ResNet block sees of time and class: [B, time_channels]."""
        c, time = self.config, self.embed_time(t, batch)
        if self.class_embedding is None:
            if label is not None:
                raise UserError("this network was made without classes (num_classes 0), but a label was given")
            return time
        if label is None:
            if not c.no_class:
                raise UserError(f"this network needs a label of 0 to {c.num_classes - 1} for every picture")
            label = torch.full((batch,), c.num_classes, device=time.device)
        return time + self.class_embedding(label)

    def check_size(self, x):
        divisor = self.config.patch * 2 ** (len(self.config.channels) - 1)
        height, width = x.shape[2:]
        if height % divisor or width % divisor:
            raise UserError(f"a picture of {height}x{width} does not fit this U-Net: both sides must be multiples of "
                            f"{divisor}; {round_to(height, divisor)}x{round_to(width, divisor)} would fit")


def round_to(n, divisor):
    """The multiple of divisor nearest to n, at least divisor."""
    return max(divisor, round(n / divisor) * divisor)
