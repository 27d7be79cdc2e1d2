"""The parts every convolutional network here is made of: ResNet block, attention, down, up, time embedding.

The DDPM U-Net, Stable Diffusion's U-Net and the KL autoencoder share them. Attribute names are
the keys of a diffusers checkpoint (norm1, conv1, to_q ...), so that loading one needs no table.
Sources: Ho et al. 2020 (arXiv 2006.11239), appendix B; report section 3.2, figures 28-33.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn

from nanodiff.models import frozen
from nanodiff.models.frozen import Linear
from nanodiff.models.packing import Conv2d

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
        self.linear_1 = Linear(dim, time_channels)
        self.linear_2 = Linear(time_channels, time_channels)

    def forward(self, table):
        return self.linear_2(F.silu(self.linear_1(table)))


class GroupNorm(nn.GroupNorm):
    """Group normalisation whose statistics are at least float32, also in a half-precision network."""

    def forward(self, x):
        if x.dtype in (torch.float32, torch.float64):
            return super().forward(x)
        wide = F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps)
        return wide.to(x.dtype)


class NormSiluConv(torch.autograd.Function):
    """conv(silu(group_norm(x))), 3x3, that keeps x alone for its backward pass and computes the rest of it anew.

    Norm and silu cost little beside the convolution, but their results are two thirds of a ResNet block's memory
    in training (measured by tests/benchmarks/bench_unet.py).
    """

    @staticmethod
    def forward(ctx, x, norm_weight, norm_bias, groups, eps, weight, bias):
        x = x.contiguous(memory_format=memory_format(x))
        sizes = (x.shape[0], x.shape[1], x[0, 0].numel(), groups)
        y, mean, rstd = torch.native_group_norm(x, norm_weight, norm_bias, *sizes, eps)
        ctx.save_for_backward(x, norm_weight, norm_bias, mean, rstd, weight)
        ctx.sizes, ctx.eps = sizes, eps
        y = F.silu(y, inplace=True)
        if any(ctx.needs_input_grad[5:]):
            return F.conv2d(y, weight, bias, padding=1)
        return frozen.convolve(y, weight, bias, (1, 1), (1, 1)).data  # no view: it is added to in place

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        x, norm_weight, norm_bias, mean, rstd, weight = ctx.saved_tensors
        need = ctx.needs_input_grad
        y = torch.native_group_norm(x, norm_weight, norm_bias, *ctx.sizes, ctx.eps)[0]
        if any(need[5:]):
            dy, dweight, dbias = torch.ops.aten.convolution_backward(
                grad, F.silu(y), weight, [len(weight)], [1, 1], [1, 1], [1, 1], False, [0, 0], 1,
                (any(need[:3]), need[5], need[6]))
        else:
            dy, dweight, dbias = frozen.input_gradient(grad, x.shape, weight, (1, 1), (1, 1)), None, None
        if not any(need[:3]):
            return None, None, None, None, None, dweight, dbias
        dy = torch.ops.aten.silu_backward(dy, y).contiguous(memory_format=memory_format(x))
        del y
        dx, dnorm_weight, dnorm_bias = torch.ops.aten.native_group_norm_backward(
            dy, x, mean, rstd, norm_weight, *ctx.sizes, need[:3])
        return dx, dnorm_weight, dnorm_bias, None, None, dweight, dbias


def memory_format(x):
    """channels_last where x [B, C, H, W] is laid out so, else the standard order."""
    return torch.channels_last if x.is_contiguous(memory_format=torch.channels_last) else torch.contiguous_format


def norm_activation_conv(x, norm, activation, conv, dropout=0.0):
    """conv(dropout(activation(norm(x)))): half a ResNet block; dropout is the share to drop now."""
    plain = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    if torch.is_grad_enabled() and isinstance(conv, Conv2d) and frozen.applies(conv, x):
        conv.put_channels_last()
    trains = torch.is_grad_enabled() and isinstance(conv, nn.Conv2d) and conv.weight.layout == torch.strided
    if x.device.type == "cpu" and plain and activation is F.silu and trains and not dropout:
        return NormSiluConv.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps, conv.weight, conv.bias)
    return conv(F.dropout(activation(norm(x)), dropout) if dropout else activation(norm(x)))


class ResnetBlock(nn.Module):
    """Two 3x3 convolutions around a residual path: [B, in, H, W] -> [B, out, H, W].

    time_channels    width of the time embedding added between the convolutions; None: the block has none. Where
                     forward is given a dict instead of an embedding, it holds this block's `time_shift` by the block
    groups, eps      of the two group normalisations (U-Nets of this family 1e-6 or 1e-5, autoencoders 1e-6)
    Source: Ho et al. 2020, appendix B; report figure 29.
    """

    def __init__(self, in_channels, out_channels, time_channels=None, groups=32, eps=1e-6, activation="silu",
                 dropout=0.0):
        super().__init__()
        self.activation = ACTIVATIONS[activation]
        self.norm1 = GroupNorm(groups, in_channels, eps)
        self.conv1 = Conv2d(in_channels, out_channels, 3, padding=1)
        self.time_emb_proj = Linear(time_channels, out_channels) if time_channels else None
        self.norm2 = GroupNorm(groups, out_channels, eps)
        self.dropout = dropout
        self.conv2 = Conv2d(out_channels, out_channels, 3, padding=1)
        self.conv_shortcut = Conv2d(in_channels, out_channels, 1) if in_channels != out_channels else None

    def forward(self, x, time=None):
        h = norm_activation_conv(x, self.norm1, self.activation, self.conv1)
        if self.time_emb_proj is not None:
            shift = time[self] if isinstance(time, dict) else self.time_shift(time)
            h += shift[:, :, None, None]  # in place: no new tensor of this size
        h = norm_activation_conv(h, self.norm2, self.activation, self.conv2, self.dropout * self.training)
        h += x if self.conv_shortcut is None else self.conv_shortcut(x)
        return h

    def time_shift(self, time):
        """What a time embedding [B, time_channels] adds to every pixel: [B, out]."""
        return self.time_emb_proj(self.activation(time))


class Attention(nn.Module):
    """Multi-head attention over tokens: x [B, N, channels], context [B, M, context_channels] -> [B, N, channels].

    Without a context the tokens look at themselves. heads * head_dim may differ from channels. A context may also be
    a dict that holds this layer's `keys_and_values` by the layer, made once for many calls.
    Source: Vaswani et al. 2017 (arXiv 1706.03762), section 3.2.
    """

    def __init__(self, channels, heads, head_dim, context_channels=None, bias=False):
        super().__init__()
        inner = heads * head_dim
        self.heads = heads
        self.to_q = Linear(channels, inner, bias=bias)
        self.to_k = Linear(context_channels or channels, inner, bias=bias)
        self.to_v = Linear(context_channels or channels, inner, bias=bias)
        self.to_out = nn.ModuleList([Linear(inner, channels)])

    def forward(self, x, context=None):
        k, v = context[self] if isinstance(context, dict) else self.keys_and_values(x if context is None else context)
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
        self.group_norm = GroupNorm(groups, channels, eps)

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
        self.conv = Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x):
        return self.conv(x if self.padding else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Doubles height and width (each pixel becomes four) and convolves: [B, C, H, W] -> [B, C, 2H, 2W].

    size: (height, width) to reach instead, for a skip of odd size.
    """

    def __init__(self, channels):
        super().__init__()
        self.conv = Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, size=None):
        height, width = size or (2 * x.shape[2], 2 * x.shape[3])
        if (height, width) == (2 * x.shape[2], 2 * x.shape[3]) and self.saves_products(x):
            return convolve_doubled(x, self.conv.plain_weight(), self.conv.bias)
        return self.conv(F.interpolate(x, (height, width), mode="nearest"))

    def saves_products(self, x):
        """Whether `convolve_doubled` is the faster way: always where it is trained, else with many pixels."""
        if not isinstance(self.conv, Conv2d):  # an adapter around it
            return False
        if torch.is_grad_enabled() and self.conv.weight.requires_grad:
            return True
        batch, channels, height, width = x.shape
        larger = (batch, channels, 2 * height, 2 * width)
        return batch * height * width >= 512 and not self.conv.takes_winograd(x, larger)


def convolve_doubled(x, weight, bias):
    """A 3x3 convolution of x with every pixel repeated 2x2, by 4/9 of the products: [B, C, H, W] -> [B, out, 2H, 2W].

    The three taps of a row fall on two pixels of x only: an even output row sees (w0, w1 + w2) of the pixels above and
    here, an odd one (w0 + w1, w2) of here and below. So each of the four kinds of output pixel is a 2x2 convolution.
    """
    def even_and_odd(w, dim):
        first, middle, last = w.unbind(dim)
        return torch.stack([first, middle + last], dim), torch.stack([first + middle, last], dim)

    rows = []
    for i, w in enumerate(even_and_odd(weight, 2)):
        pair = [F.conv2d(F.pad(x, (1 - j, j, 1 - i, i)), w, bias) for j, w in enumerate(even_and_odd(w, 3))]
        rows.append(torch.stack([y.permute(0, 2, 3, 1) for y in pair], 3))  # [B, H, W, 2, out]
    return torch.stack(rows, 2).flatten(3, 4).flatten(1, 2).permute(0, 3, 1, 2)  # channels last


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
