"""ResNet blocks, upsampling, norms and cross-attention of models/blocks.py, with less memory and fewer products.

Replaces ResnetBlock (in training norm and silu are computed again in the backward pass, for a third of the memory),
Upsample (4/9 of the products: half the time in training), Attention (a text's keys and values once a run), and torch's
norms in half precision (statistics in float32 on every device).
Measured by: python tests/benchmarks/bench_fast.py --only blocks
"""

import torch
import torch.nn.functional as F
from torch import nn

from nanodiff.fast import frozen
from nanodiff.fast.once import remembered
from nanodiff.fast.packing import Conv2d
from nanodiff.models import blocks


# --- norms ------------------------------------------------------------------------------------------------------------

class GroupNorm(nn.GroupNorm):
    """Group normalisation whose statistics are at least float32, also in a half-precision network."""

    def forward(self, x):
        if x.dtype in (torch.float32, torch.float64):
            return super().forward(x)
        wide = F.group_norm(x.float(), self.num_groups, self.weight.float(), self.bias.float(), self.eps)
        return wide.to(x.dtype)


class LayerNorm(nn.LayerNorm):
    """Layer normalisation whose statistics are at least float32, also in a half-precision network."""

    def forward(self, x):
        if x.dtype in (torch.float32, torch.float64):
            return super().forward(x)
        wide = F.layer_norm(x.float(), self.normalized_shape, self.weight.float(), self.bias.float(), self.eps)
        return wide.to(x.dtype)


# --- ResNet blocks ----------------------------------------------------------------------------------------------------

class ResnetBlock(blocks.ResnetBlock):
    """The ResNet block with norm, silu and convolution as one function in training, and sums in place."""

    def forward(self, x, time=None):
        h = norm_activation_conv(x, self.norm1, self.activation, self.conv1)
        if self.time_emb_proj is not None:
            h += self.time_shift(time)[:, :, None, None]  # in place: no new tensor of this size
        h = norm_activation_conv(h, self.norm2, self.activation, self.conv2, self.dropout * self.training)
        h += x if self.conv_shortcut is None else self.conv_shortcut(x)
        return h

    def time_shift(self, time):
        return remembered(self, time, super().time_shift)


def norm_activation_conv(x, norm, activation, conv, dropout=0.0):
    """conv(dropout(activation(norm(x)))): half a ResNet block; dropout is the share to drop now."""
    wide = x.dtype in (torch.float32, torch.float64) and not torch.is_autocast_enabled("cpu")
    if torch.is_grad_enabled() and isinstance(conv, Conv2d) and frozen.applies(conv, x):
        conv.put_channels_last()
    trains = torch.is_grad_enabled() and isinstance(conv, Conv2d)
    if x.device.type == "cpu" and wide and activation is F.silu and trains and not dropout:
        return NormSiluConv.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps, conv.weight, conv.bias)
    return conv(F.dropout(activation(norm(x)), dropout) if dropout else activation(norm(x)))


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


# --- attention --------------------------------------------------------------------------------------------------------

class Attention(blocks.Attention):
    """Attention that takes the keys and values of a text which remembers them: see once.py."""

    def keys_and_values(self, context):
        return remembered(self, context, super().keys_and_values)


# --- upsampling -------------------------------------------------------------------------------------------------------

class Upsample(blocks.Upsample):
    """Doubling and convolution in one, where that saves products."""

    def forward(self, x, size=None):
        height, width = size or (2 * x.shape[2], 2 * x.shape[3])
        if (height, width) == (2 * x.shape[2], 2 * x.shape[3]) and self.saves_products(x):
            return convolve_doubled(x, self.conv.plain_weight(), self.conv.bias)
        return self.conv(F.interpolate(x, (height, width), mode="nearest"))

    def saves_products(self, x):
        """Whether `convolve_doubled` is the faster way: always where it is trained, else with many pixels."""
        if not isinstance(self.conv, Conv2d):  # an adapter around it
            return False
        if torch.is_grad_enabled() and self.conv.trains:
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
