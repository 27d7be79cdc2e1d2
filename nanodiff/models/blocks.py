"""The parts every convolutional network here is made of: ResNet block, attention, down, up, time embedding.

The DDPM U-Net, Stable Diffusion's U-Net and the KL autoencoder share them. Attribute names are
the keys of a diffusers checkpoint (norm1, conv1, to_q ...), so that loading one needs no table.
Sources: Ho et al. 2020 (arXiv 2006.11239), appendix B; report section 3.2, figures 28-33.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

ACTIVATIONS = {"silu": F.silu, "swish": F.silu, "gelu": F.gelu, "relu": F.relu, "mish": F.mish}


def time_embedding_table(t, dim, freq_shift=0.0, flip_sin_to_cos=False, max_period=10000.0):
    """Sinusoids of the time steps t [B] (integer or float): float64 [B, dim].

    The dim // 2 frequencies fall geometrically from 1 to about 1 / max_period; freq_shift 1 makes the
    last one exactly that. Sines come first, or cosines with flip_sin_to_cos; an odd dim ends in a zero.
    Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.5; report figure 30.
    """
    half = dim // 2
    steps = torch.arange(half, dtype=torch.float64, device=t.device)
    frequency = torch.exp(-math.log(max_period) / (half - freq_shift) * steps)
    angle = t.to(torch.float64)[:, None] * frequency  # float64: at t = 999 float32 is off by 3e-5
    parts = [angle.cos(), angle.sin()] if flip_sin_to_cos else [angle.sin(), angle.cos()]
    return F.pad(torch.cat(parts, dim=1), (0, dim % 2))


class TimeEmbedding(nn.Module):
    """The two-layer network on top of the sinusoids: [B, dim] -> [B, time_channels]."""

    def __init__(self, dim, time_channels):
        super().__init__()
        self.linear_1 = nn.Linear(dim, time_channels)
        self.linear_2 = nn.Linear(time_channels, time_channels)

    def forward(self, table):
        return self.linear_2(F.silu(self.linear_1(table)))


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions around a residual path: [B, in, H, W] -> [B, out, H, W].

    time_channels    width of the time embedding added between the convolutions; None: the block has none
    groups, eps      of the two group normalisations (U-Nets of this family 1e-6 or 1e-5, autoencoders 1e-6)
    Source: Ho et al. 2020, appendix B; report figure 29.
    """

    def __init__(self, in_channels, out_channels, time_channels=None, groups=32, eps=1e-6, activation="silu",
                 dropout=0.0):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.norm1 = nn.GroupNorm(groups, in_channels, eps)
        self.conv1 = nn.Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = nn.Linear(time_channels, out_channels) if time_channels else None
        self.norm2 = nn.GroupNorm(groups, out_channels, eps)
        self.dropout = dropout
        self.conv2 = nn.Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x, time=None):
        h = self.conv1(self.activation(self.norm1(x)))
        if self.time_emb_proj is not None:
            h = h + self.time_shift(time)[:, :, None, None]
        h = self.conv2(F.dropout(self.activation(self.norm2(h)), self.dropout, self.training))
        return h + (x if self.conv_shortcut is None else self.conv_shortcut(x))

    def time_shift(self, time):
        """What a time embedding [B, time_channels] adds to every pixel: [B, out]."""
        return self.time_emb_proj(self.activation(time))


class Attention(nn.Module):
    """Multi-head attention over tokens: x [B, N, channels], context [B, M, context_channels] -> [B, N, channels].

    Without a context the tokens look at themselves. heads * head_dim may differ from channels.
    Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.2.
    """

    def __init__(self, channels, heads, head_dim, context_channels=None, bias=False):
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.to_q = nn.Linear(channels, inner, bias=bias)
        self.to_k = nn.Linear(context_channels or channels, inner, bias=bias)
        self.to_v = nn.Linear(context_channels or channels, inner, bias=bias)
        self.to_out = nn.ModuleList([nn.Linear(inner, channels)])

    def forward(self, x, context=None):
        k, v = self.keys_and_values(x if context is None else context)
        h = F.scaled_dot_product_attention(self.in_heads(self.to_q(x)), k, v)
        return self.to_out[0](h.transpose(1, 2).flatten(2))  # [B, N, channels]

    def keys_and_values(self, context):
        """What the queries meet: two [B, heads, M, head_dim] from a context [B, M, context_channels]."""
        return self.in_heads(self.to_k(context)), self.in_heads(self.to_v(context))

    def in_heads(self, y):
        return y.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [B, heads, N, head_dim]


class SpatialAttention(Attention):
    """Self-attention among the pixels of a feature map, normalised before and added to it: [B, C, H, W].

    Source: Ho et al. 2020, section 4; report section 3.2 (4 heads, at 16x16 and in the middle).
    """

    def __init__(self, channels, heads, head_dim, groups=32, eps=1e-6):
        super().__init__(channels, heads, head_dim, bias=True)
        self.group_norm = nn.GroupNorm(groups, channels, eps)

    def forward(self, x):
        tokens = self.group_norm(x).flatten(2).transpose(1, 2)  # [B, H*W, C]
        h = super().forward(tokens)
        return h.transpose(1, 2).unflatten(2, x.shape[2:]) + x


class Downsample(nn.Module):
    """Halves height and width by a strided 3x3 convolution: [B, C, H, W] -> [B, C, H/2, W/2].

    padding 1 pads all sides; 0 pads right and bottom only, as the first DDPM and every VAE of this family do.
    """

    def __init__(self, channels, padding=1):
        super().__init__()
        self.padding = padding
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x):
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width (each pixel becomes four) and convolves: [B, C, H, W] -> [B, C, 2H, 2W].

    size: (height, width) to reach instead, for a skip of odd size.
    """

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, size=None):
        return self.conv(F.interpolate(x, size or (2 * x.shape[2], 2 * x.shape[3]), mode="nearest"))


class MidBlock(nn.Module):
    """ResNet block, attention (None: left out), ResNet block at the smallest size: [B, C, H, W]."""

    def __init__(self, resnets, attention=None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        self.attentions = nn.ModuleList([attention] if attention is not None else [])

    def forward(self, x, time=None, *context):
        x = self.resnets[0](x, time)
        for attention in self.attentions:
            x = attention(x, *context)
        return self.resnets[1](x, time)


def initialise(net, generator=None):
    """Fresh weights in place, as Ho et al. draw them: uniform, variance 1 / mean of fan-in and fan-out; biases 0.

    The last layer of every ResNet and attention block becomes 0, so that each block starts as the identity.
    generator: a torch.Generator (None: torch's own). Returns net. Source: Ho et al.'s code, "default_init".
    """
    for module in net.modules():
        if isinstance(module, (nn.Linear, nn.Conv2d)):
            nn.init.xavier_uniform_(module.weight, generator=generator)
            if module.bias is not None:
                nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, generator=generator)
    for module in net.modules():
        if isinstance(module, ResnetBlock):
            nn.init.zeros_(module.conv2.weight)
        elif isinstance(module, Attention):
            nn.init.zeros_(module.to_out[0].weight)
    return net
