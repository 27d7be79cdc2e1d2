"""Convolutions and linear layers that are not trained, in a network that gradients pass through: LoRA, new words.

Replaces nn.Linear, and is the way of packing.py's convolution with gradients. Such a layer gives its input a gradient
and needs none itself, so nothing of its input is kept. On a CPU there is time to win, too: oneDNN wants the weight of a
convolution in an order of its own and reorders it in every call, forward and backward, which for many channels and few
pixels takes longer than the sum itself. Weights that are packed once would need a second copy, as the two directions
want two orders. So here the weight stays as it is, but with the input channels last, [O, kH, kW, C] in memory, where it
is the matrix of both directions:

    y = columns(x) W'        columns: the kH * kW * C numbers that an output pixel sees, a row each
    dx = the sum of each row of  dy W  back onto the pixels that it came from

With many pixels the convolution is left to oneDNN or, where that pays, made by Winograd's method (winograd.py); the
gradient of a 3x3 convolution is one with the kernel turned by 180 degrees and its channels exchanged.
Source: Chellapilla et al. 2006 (inria-00112631) for convolution as one product.
Gain: half the time of a convolution of SD 1.5's middle, forward and backward.
Measured by: python tests/benchmarks/bench_fast.py --only frozen
"""

import torch
import torch.nn.functional as F
from torch import nn

from nanodiff.fast import winograd

LEAST = 2**15  # numbers in a weight for which these ways are faster than PyTorch's own
FEW_ROWS = 64  # up to so many rows x, oneDNN is faster at W x' than at x W'
# An internal name of PyTorch: oneDNN's product of plain float32 matrices, faster than the BLAS. Without it: the BLAS.
AVAILABLE = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")


def applies(layer, x):
    """Whether a layer is frozen and x goes through it in a way that this file is for."""
    frozen = not layer.weight.requires_grad and (layer.bias is None or not layer.bias.requires_grad)
    fits = x.device.type == "cpu" and x.dtype == layer.weight.dtype and x.dtype in (torch.float32, torch.bfloat16)
    return frozen and fits and layer.weight.numel() >= LEAST and not torch.is_autocast_enabled("cpu")


# --- products ---------------------------------------------------------------------------------------------------------

def product(x, weight, bias=None):
    """x [N, in] times weight [out, in] transposed, plus bias: [N, out]."""
    if not AVAILABLE or x.dtype != torch.float32 or not len(x):
        return F.linear(x, weight, bias)
    if len(x) > FEW_ROWS:
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    y = torch.ops.mkldnn._linear_pointwise(weight, x, None, "none", [], "").T.contiguous()
    return y if bias is None else y.add_(bias)


def product_back(grad, weight):
    """grad [N, out] times weight [out, in]: [N, in]."""
    if not AVAILABLE or grad.dtype != torch.float32 or not len(grad):
        return grad @ weight
    return torch.ops.mkldnn._linear_pointwise(grad, weight.T, None, "none", [], "")


class Linear(nn.Linear):
    """nn.Linear that, where it is frozen, keeps nothing of its input for the backward pass and is faster on a CPU."""

    def forward(self, x):
        if torch.is_grad_enabled() and applies(self, x):
            return FrozenLinear.apply(x, self.weight, self.bias)
        return super().forward(x)


class FrozenLinear(torch.autograd.Function):
    """x [..., in] -> [..., out]; a gradient for x alone."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(weight)
        y = product(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], len(weight))
        return y.data  # to autograd a tensor of its own, which may be changed in place, and no view of one

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        weight, = ctx.saved_tensors
        dx = product_back(grad.reshape(-1, grad.shape[-1]), weight)
        return dx.view(*grad.shape[:-1], weight.shape[1]), None, None


# --- convolutions -----------------------------------------------------------------------------------------------------

class FrozenConv(torch.autograd.Function):
    """x [B, C, H, W] -> [B, O, H', W'], groups and dilation 1; a gradient for x alone."""

    @staticmethod
    def forward(ctx, x, weight, bias, stride, padding):
        ctx.save_for_backward(weight)
        ctx.shape, ctx.stride, ctx.padding = x.shape, stride, padding
        return convolve(x, weight, bias, stride, padding).data  # no view, as above

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        return input_gradient(grad, ctx.shape, *ctx.saved_tensors, ctx.stride, ctx.padding), None, None, None, None


def convolve(x, weight, bias, stride, padding):
    """The convolution of x [B, C, H, W] with weight [O, C, kH, kW]; no graph."""
    way = fastest(x.shape, x.dtype, weight, stride, padding)
    if way == "winograd":
        return winograd.convolve(x, weight, bias)
    if way == "plain":
        return F.conv2d(x, weight, bias, stride, padding)
    height, width = output_size(x.shape, weight, stride, padding)
    y = product(columns(x, weight.shape[2:], stride, padding), matrix(weight), bias)  # [B * H' * W', O]
    return y.view(len(x), height, width, -1).permute(0, 3, 1, 2)  # channels last


def input_gradient(grad, shape, weight, stride, padding):
    """The gradient for a `convolve`'s input of a shape [B, C, H, W], from that for its output [B, O, H', W']."""
    way = fastest(shape, grad.dtype, weight, stride, padding)
    if way == "winograd" and winograd.pays(grad.shape, weight.shape[1]):
        return winograd.convolve(grad, weight.flip(2, 3).transpose(0, 1), None)
    if way == "product":
        rows = product_back(grad.permute(0, 2, 3, 1).reshape(-1, len(weight)), matrix(weight))
        return from_columns(rows, shape, weight.shape[2:], stride, padding)
    x = torch.empty(shape, dtype=grad.dtype, memory_format=torch.channels_last)  # asked for its shape only
    return torch.ops.aten.convolution_backward(grad, x, weight, None, stride, padding, (1, 1), False, (0, 0), 1,
                                               (True, False, False))[0]


def fastest(shape, dtype, weight, stride, padding):
    """"winograd", "product" or "plain": how an input of a shape [B, C, H, W] is convolved."""
    kernel = tuple(weight.shape[2:])
    if (kernel, *stride, *padding, dtype) == ((3, 3), 1, 1, 1, 1, torch.float32) and winograd.pays(shape, len(weight)):
        return "winograd"
    height, width = output_size(shape, weight, stride, padding)
    one = (kernel, *stride, *padding) == ((1, 1), 1, 1, 0, 0)  # a linear layer on every pixel
    few = 4 * shape[0] * height * width <= len(weight)  # else its columns cost more than reordering the weight
    return "product" if weight.numel() >= LEAST and (one or few) else "plain"


def output_size(shape, weight, stride, padding):
    """(H', W') for an input of a shape [B, C, H, W]."""
    return [(n + 2 * p - k) // s + 1 for n, k, s, p in zip(shape[2:], weight.shape[2:], stride, padding)]


def matrix(weight):
    """A weight [O, C, kH, kW] as [O, kH * kW * C]: a view where the channels are last in memory."""
    return weight.permute(0, 2, 3, 1).reshape(len(weight), -1)


def columns(x, kernel, stride, padding):
    """What each output pixel sees of x [B, C, H, W]: [B * H' * W', kH * kW * C]."""
    x = F.pad(x, (padding[1], padding[1], padding[0], padding[0])) if any(padding) else x
    rows = x.unfold(2, kernel[0], stride[0]).unfold(3, kernel[1], stride[1])  # [B, C, H', W', kH, kW]
    return rows.permute(0, 2, 3, 4, 5, 1).reshape(-1, kernel[0] * kernel[1] * x.shape[1])


def from_columns(rows, shape, kernel, stride, padding):
    """The reverse of `columns`: what pixels are worth to all rows that see them, [B, C, H, W] in channels_last."""
    batch, channels, height, width = shape
    padded = [n + 2 * p for n, p in zip((height, width), padding)]
    steps = [(n - k) // s + 1 for n, k, s in zip(padded, kernel, stride)]
    rows = rows.view(batch, *steps, *kernel, channels)
    if tuple(kernel) == (1, 1) and (height, width) == tuple(steps):
        return rows[:, :, :, 0, 0].permute(0, 3, 1, 2)
    x = rows.new_zeros(batch, *padded, channels)
    for i in range(kernel[0]):
        seen = x[:, i : i + stride[0] * steps[0] : stride[0]]  # [B, H', W + 2p, C]
        for j in range(kernel[1]):
            seen[:, :, j : j + stride[1] * steps[1] : stride[1]] += rows[:, :, :, i, j]
    return x[:, padding[0] : padding[0] + height, padding[1] : padding[1] + width].permute(0, 3, 1, 2)
